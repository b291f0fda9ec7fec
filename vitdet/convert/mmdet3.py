"""open-mmlab/mmdetection 3.x, projects/ViTDet: vitdet/vit.py and simple_fpn.py.

The backbone is detectron2's, number by number, under the same names. All LayerNorms of the project
have an epsilon of 1e-5 (mmcv's default), which the recipe must say.
"""

from __future__ import annotations

from vitdet.convert.mmdet_heads import HEADS, lateral_convolutions
from vitdet.convert.rules import Drop, File, Format, Rename


def _recognise(file: File) -> bool:
    return file.has(r"neck\.fpn1\.1\.weight$")


FORMAT = Format(
    name="mmdet3",
    what="mmdetection 3.x projects/ViTDet",
    recognise=_recognise,
    outside=(
        Drop(r"data_preprocessor\.", "constant of the recipe, not a weight"),
        Rename(r"neck\.fpn1\.", "backbone.simfp_2."),
        Rename(r"neck\.fpn2\.", "backbone.simfp_3."),
        *lateral_convolutions(),
        *HEADS,
    ),
    detector=True,
    settings=(
        ("norm_eps", 1e-5),
        *(("pyramid.norm", "LN"), ("box_head.norm", "LN"), ("mask_head.norm", "LN")),
    ),
)
