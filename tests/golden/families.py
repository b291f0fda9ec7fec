"""Which function builds which model of which family, and one that runs a case by its name."""

from __future__ import annotations

from collections.abc import Callable

from . import detectors, mmdet_nets, pe, plain, vil
from .build import Built, Mode, run
from .cases import Case, UnsupportedCase, read
from .compare import compare
from .mmdet import heads

Builder = Callable[[Case, Mode], Built]
# {family: {"model" of the JSON file: builder}}
BUILDERS = {
    "detectron2": {
        "ViT": plain.detectron2_vit,
        "SimpleFeaturePyramid": plain.detectron2_vit,
        "GeneralizedRCNN": detectors.detector,
    },
    "sam": {"ImageEncoderViT": plain.sam_encoder},
    "hf_vitdet": {"VitDetBackbone": plain.hf_backbone},
    "timm": {"VisionTransformer": plain.timm_vit, "Eva": plain.timm_eva},
    "eva02_det": {
        "ViT": plain.eva02_vit,
        "SimpleFeaturePyramid": plain.eva02_vit,
        "GeneralizedRCNN": detectors.detector,
    },
    "eva01_det": {"ViT": plain.eva01_vit},
    "pe_det": {"PEv1_det": pe.pe_det_vit, "SimpleFeaturePyramid": pe.pe_det_vit},
    "pe": {"VisionTransformer": pe.pe_encoder},
    "sam3_trunk": {"ViT": pe.sam3_trunk},
    "streampetr": {"EVAViT": plain.streampetr_vit},
    "vitae_vitdet": {
        "ViT": mmdet_nets.vitae_vit,
        "ViTAE": mmdet_nets.vitae_vit,
        "ViTAE_S": mmdet_nets.vitae_s,
        "FPN": mmdet_nets.vitae_fpn,
        **heads("vitae"),
    },
    "easycv": {"ViTDet": mmdet_nets.backbone, "SFP": mmdet_nets.pyramid, **heads("easycv")},
    "mmdet3_vitdet": {
        "ViT": mmdet_nets.backbone,
        "SimpleFPN": mmdet_nets.pyramid,
        **heads("mmdet3"),
    },
    "vil": {
        "slidingchunk_2d": vil.operator,
        "Long2DSCSelfAttention": vil.attention,
        "MsViT": vil.backbone,
        "build_msvit_fpn_backbone": vil.fpn,
        "build_retinanet_msvit_fpn_backbone": vil.fpn,
    },
}
# family: function from a case of a conversion to its outputs, by the case's names
CONVERSIONS = {
    "vitae_vitdet": mmdet_nets.vitae_loaded,
    "vil": vil.conversion,
    "pe_det": pe.conversion,
}


def modes(info, every):
    """Return the modes in which a case is run: one where it has neither blocks nor a kernel."""
    model = info.get("model")
    if model in ("slidingchunk_2d", "Long2DSCSelfAttention"):  # the two kernels of the chunks
        return [Mode("eager"), Mode()]
    heads_and_pyramids = {"FPN", "SFP", "SimpleFPN", *heads("")}
    alone = model in heads_and_pyramids and "backbone" not in info["config"]
    return [Mode()] if alone or model == "checkpoint conversion" else every


def compare_case(root, name, mode, change=None):
    """Build the case family/name of the folder `root`, run it and compare.

    `change` is applied to the finished model before it runs. Raises UnsupportedCase where the case
    asks for something that vitdet does not have.
    """
    case = read(root, name)
    if case.info.get("conversion"):
        if case.family not in CONVERSIONS:
            raise UnsupportedCase(f"{name}: no conversion of this family is built")
        return compare(case, CONVERSIONS[case.family](case), {}, {}, [])
    builders, model = BUILDERS.get(case.family, {}), case.info["model"]
    if model not in builders:
        raise UnsupportedCase(f"{name}: model {model!r}, known of this family are {[*builders]}")
    return run(builders[model](case, mode), case, mode, change)
