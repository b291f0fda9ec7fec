"""ViTAE-Transformer/ViTDet: detectors with ViT-B, ViTAE-B or ViTAE-S (mmdet 2.18 names).

mmdet/models/backbones/{vit,vitae,vitae_s}.py, necks/fpn.py. The deconvolutions of the pyramid lie
inside the backbone there. Relative positions are learned for scaled queries: the tables are
multiplied by head_dim ** -0.5 (vit.py:96, 251). A file of the runner has its weights under
"state_dict"; "state_dict_ema" goes first (mmcv_custom/checkpoint.py:314).
"""

from __future__ import annotations

from vitdet.convert.mmdet_heads import HEADS, lateral_convolutions
from vitdet.convert.rules import File, Format, Make, Rename
from vitdet.convert.tensors import scaled_by_head

SCALED_REL_POS = Make(r".*\.rel_pos_[hw]$", (r"\g<0>",), scaled_by_head)
LAYER_SCALE = Rename(r"(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma")


def _recognise(file: File) -> bool:
    return file.has(r"(backbone\.)?fpn1\.1\.ln\.weight$")


FORMAT = Format(
    name="vitae",
    what="ViTAE-Transformer/ViTDet (ViT-B, ViTAE-B, ViTAE-S detectors)",
    recognise=_recognise,
    anchor="",
    rules=(
        Rename(r"fpn1\.1\.ln\.", "/backbone.simfp_2.1."),
        Rename(r"fpn1\.([03])\.", r"/backbone.simfp_2.\1."),
        Rename(r"fpn2\.0\.", "/backbone.simfp_3.0."),
        LAYER_SCALE,
    ),
    outside=(*lateral_convolutions(), *HEADS),
    makes=(SCALED_REL_POS,),
    kinds=("vit", "vitae", "vitae_s"),
    detector=True,
    settings=(
        ("norm_eps", 1e-6),
        *(("pyramid.norm", "LN"), ("box_head.norm", "LN"), ("mask_head.norm", "LN")),
    ),
)
