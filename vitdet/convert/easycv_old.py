"""alibaba/EasyCV before v0.7: ViTDet detectors with attention or convolution propagation.

models/backbones/vitdet.py and necks/sfp.py of v0.6. A norm stands after the last block, relative
positions are learned for scaled queries (the tables are multiplied by head_dim ** -0.5), the
position embedding has no class row, and propagation blocks are called `conv_aggregation`. Norms of
pyramid and heads: see `vitdet.convert.easycv`.
"""

from __future__ import annotations

from vitdet.convert.mmdet_heads import HEADS, lateral_convolutions
from vitdet.convert.rules import File, Format, Rename
from vitdet.convert.vitae import SCALED_REL_POS


def _recognise(file: File) -> bool:
    return file.has(r"neck\.top_downs\.")


FORMAT = Format(
    name="easycv_old",
    what="EasyCV ViTDet, before v0.7",
    recognise=_recognise,
    rules=(
        Rename(r"(blocks\.\d+)\.conv_aggregation\.conv(\d)\.", r"\1.residual.conv\2."),
        Rename(r"(blocks\.\d+)\.conv_aggregation\.bn(\d)\.", r"\1.residual.norm\2."),
    ),
    outside=(
        Rename(r"neck\.top_downs\.0\.1\.ln\.", "backbone.simfp_2.1."),
        Rename(r"neck\.top_downs\.0\.([03])\.", r"backbone.simfp_2.\1."),
        Rename(r"neck\.top_downs\.1\.", "backbone.simfp_3.0."),
        *lateral_convolutions(),
        *HEADS,
    ),
    makes=(SCALED_REL_POS,),
    detector=True,
    settings=(
        ("norm_eps", 1e-6),
        *(("pyramid.norm", "GN1+LN"), ("box_head.norm", "GN1"), ("mask_head.norm", "GN1")),
    ),
)
