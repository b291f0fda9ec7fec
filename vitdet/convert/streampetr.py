"""exiawsh/StreamPETR: the image backbone of its ViT-L models, and the file its document makes.

docs/ViT_Large.md renames an EVA-02 detector: `backbone.net.X` to `img_backbone.X` and
`backbone.simfpX` to `img_backbone.adapter.simfpX`. Training checkpoints have the same names under
"state_dict" beside the 3-D head. projects/mmdet3d_plugin/models/backbones/eva_vit.py has the class.
"""

from __future__ import annotations

from vitdet.convert.eva02 import MORE_LEVELS, ROPE, ROPE_WHY
from vitdet.convert.rules import Drop, File, Format, Rename


def _recognise(file: File) -> bool:
    return file.has(r"img_backbone\.patch_embed\.proj\.weight$")


FORMAT = Format(
    name="streampetr",
    what="StreamPETR (img_backbone of its ViT-L, with or without adapter)",
    recognise=_recognise,
    rules=(
        Rename(r"adapter\.simfp", "/backbone.simfp"),
        Drop(ROPE, ROPE_WHY),
    ),
    outside=(Drop(r"(pts_bbox_head|img_roi_head|img_neck)\.", "StreamPETR's own neck and heads"),),
    kinds=("eva02", "vit"),
    # a file has a pyramid at most, of StreamPETR's five levels or of an EVA-02 detector's four
    optional=(r"/(proposal_generator|roi_heads)\.", *MORE_LEVELS),
    detector=True,
)
