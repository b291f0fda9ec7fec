"""Which function builds which model of which family, and one that runs a case by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from . import easycv, mmdet3, timm_tokens, vil, vitae
from .build import (
    Built,
    Change,
    Mode,
    detectron2_pyramid,
    detectron2_vit,
    run,
)
from .cases import Case, UnsupportedCase, read
from .compare import Comparison, compare
from .detectors import detector
from .eva import (
    eva01_vit,
    eva02_detector,
    eva02_pyramid,
    eva02_vit,
    streampetr_vit,
)
from .mapped import hf_backbone, sam_encoder

# (family, "model" of the JSON file): builder
BUILDERS: dict[tuple[str, str], Callable[[Case, Mode], Built]] = {
    ("detectron2", "ViT"): detectron2_vit,
    ("detectron2", "SimpleFeaturePyramid"): detectron2_pyramid,
    ("detectron2", "GeneralizedRCNN"): detector,
    ("sam", "ImageEncoderViT"): sam_encoder,
    ("hf_vitdet", "VitDetBackbone"): hf_backbone,
    ("timm", "VisionTransformer"): timm_tokens.vision_transformer,
    ("timm", "Eva"): timm_tokens.eva,
    ("eva02_det", "ViT"): eva02_vit,
    ("eva02_det", "SimpleFeaturePyramid"): eva02_pyramid,
    ("eva02_det", "GeneralizedRCNN"): eva02_detector,
    ("eva01_det", "ViT"): eva01_vit,
    ("streampetr", "EVAViT"): streampetr_vit,
    ("vitae_vitdet", "ViT"): vitae.vit,
    ("vitae_vitdet", "ViTAE"): vitae.vitae_b,
    ("vitae_vitdet", "ViTAE_S"): vitae.vitae_s,
    ("vitae_vitdet", "FPN"): vitae.fpn,
    ("vitae_vitdet", "RPNHead"): vitae.rpn_head,
    ("vitae_vitdet", "Shared4Conv1FCBBoxHead"): vitae.bbox_head,
    ("vitae_vitdet", "FCNMaskHead"): vitae.fcn_mask_head,
    ("easycv", "ViTDet"): easycv.backbone,
    ("easycv", "SFP"): easycv.pyramid,
    ("easycv", "RPNHead"): easycv.rpn_head,
    ("easycv", "Shared4Conv1FCBBoxHead"): easycv.bbox_head,
    ("easycv", "FCNMaskHead"): easycv.fcn_mask_head,
    ("mmdet3_vitdet", "SimpleFPN"): mmdet3.pyramid,
    ("mmdet3_vitdet", "ViT"): mmdet3.backbone,
    ("mmdet3_vitdet", "RPNHead"): mmdet3.rpn_head,
    ("mmdet3_vitdet", "Shared4Conv1FCBBoxHead"): mmdet3.bbox_head,
    ("mmdet3_vitdet", "FCNMaskHead"): mmdet3.fcn_mask_head,
    ("vil", "slidingchunk_2d"): vil.operator,
    ("vil", "Long2DSCSelfAttention"): vil.attention,
    ("vil", "MsViT"): vil.backbone,
    ("vil", "build_msvit_fpn_backbone"): vil.fpn,
    ("vil", "build_retinanet_msvit_fpn_backbone"): vil.fpn,
}

# family: function from a case of a conversion to its outputs, by the case's names
CONVERSIONS: dict[str, Callable[[Case], dict[str, torch.Tensor]]] = {
    "vitae_vitdet": vitae.loaded,
    "vil": vil.conversion,
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
    if case.info.get("conversion"):
        if case.family not in CONVERSIONS:
            raise UnsupportedCase(f"{name}: no conversion of this family is built")
        return compare(case, CONVERSIONS[case.family](case), {}, {}, [])
    model = case.info["model"]
    if (case.family, model) not in BUILDERS:
        known = [known for family, known in BUILDERS if family == case.family]
        raise UnsupportedCase(f"{name}: model {model!r}, known of this family are {known}")
    return run(BUILDERS[case.family, model](case, mode), case, mode, change)
