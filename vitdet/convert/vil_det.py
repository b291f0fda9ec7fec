"""microsoft/VisionLongformerForObjectDetection: detectors, and what its converter.py writes."""

from __future__ import annotations

from vitdet.convert.rules import Drop, File, Format
from vitdet.convert.vil import MAKES, OPTIONAL, RULES

_CONSTANT = "constant of the recipe, not a weight"


def _recognise(file: File) -> bool:
    return "vitdet" not in file.keys and file.has(r"backbone\.bottom_up\.layer1\.1\.")


FORMAT = Format(
    name="vil_det",
    what="Vision Longformer detectors, in detectron2's names",
    recognise=_recognise,
    rules=RULES,
    outside=(
        Drop(r"(pixel_mean|pixel_std)$", _CONSTANT),
        Drop(r"(proposal_generator\.)?anchor_generator\.cell_anchors\.", _CONSTANT),
    ),
    makes=MAKES,
    kinds=("vil",),
    optional=OPTIONAL,
    detector=True,
)
