"""alibaba/EasyCV from v0.7 on: ViTDet detectors, models/backbones/vitdet.py and necks/sfp.py.

The backbone is detectron2's under other names. The norms of the pyramid and of the heads are
GroupNorm with one group. Their weights have the shapes of a LayerNorm's, so only the recipe can
tell which it is.
"""

from __future__ import annotations

from vitdet.convert.mmdet_heads import HEADS
from vitdet.convert.rules import File, Format, Rename


def _recognise(file: File) -> bool:
    return file.has(r"neck\.sfp_0\.")


def _level(k: int) -> tuple[Rename, ...]:
    to = f"backbone.simfp_{k + 2}."
    return (
        Rename(rf"neck\.sfp_{k}\.(\d+)\.conv\.", rf"{to}\1."),
        Rename(rf"neck\.sfp_{k}\.(\d+)\.gn\.", rf"{to}\1.norm."),
        Rename(rf"neck\.sfp_{k}\.", to),
    )


FORMAT = Format(
    name="easycv",
    what="EasyCV ViTDet, v0.7 and later",
    recognise=_recognise,
    outside=(*_level(0), *_level(1), *_level(2), *_level(3), *HEADS),
    detector=True,
    settings=(
        ("norm_eps", 1e-6),
        *(("pyramid.norm", "GN1"), ("box_head.norm", "GN1"), ("mask_head.norm", "GN1")),
    ),
)
