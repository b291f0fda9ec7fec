"""Which function builds which model of which family, and one that runs a case by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .build import (
    Built,
    Change,
    Mode,
    detectron2_pyramid,
    detectron2_vit,
    run,
)
from .cases import Case, UnsupportedCase, read
from .compare import Comparison
from .detectors import detector
from .mapped import hf_backbone, sam_encoder, timm_map

# (family, "model" of the JSON file): builder
BUILDERS: dict[tuple[str, str], Callable[[Case, Mode], Built]] = {
    ("detectron2", "ViT"): detectron2_vit,
    ("detectron2", "SimpleFeaturePyramid"): detectron2_pyramid,
    ("detectron2", "GeneralizedRCNN"): detector,
    ("sam", "ImageEncoderViT"): sam_encoder,
    ("hf_vitdet", "VitDetBackbone"): hf_backbone,
    ("timm", "VisionTransformer"): timm_map,
}


def compare_case(root: Path, name: str, mode: Mode, change: Change | None = None) -> Comparison:
    """Build the case `name` of the folder `root`, run it and compare.

    Args:
        root: folder of the cases.
        name: family/name.
        mode: attention kernel or checkpointing.
        change: applied to the finished model before it runs.

    Raises:
        UnsupportedCase: the case asks for something that vitdet does not have.
    """
    case = read(root, name)
    model = case.info["model"]
    if (case.family, model) not in BUILDERS:
        known = [known for family, known in BUILDERS if family == case.family]
        raise UnsupportedCase(f"{name}: model {model!r}, known of this family are {known}")
    return run(BUILDERS[case.family, model](case, mode), case, mode, change)
