"""exiawsh/StreamPETR: the image backbone of its ViT-L models, and the file its document makes.

docs/ViT_Large.md renames an EVA-02 detector: `backbone.net.X` to `img_backbone.X` and
`backbone.simfpX` to `img_backbone.adapter.simfpX`. Training checkpoints have the same names under
"state_dict" beside the 3-D head. projects/mmdet3d_plugin/models/backbones/eva_vit.py has the class.
"""

from __future__ import annotations

from vitdet.convert.rules import Drop, File, Format, Rename

_ROPE = r"(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)$"


def _recognise(file: File) -> bool:
    return file.has(r"img_backbone\.patch_embed\.proj\.weight$")


FORMAT = Format(
    name="streampetr",
    what="StreamPETR (img_backbone of its ViT-L, with or without adapter)",
    recognise=_recognise,
    rules=(
        Rename(r"adapter\.simfp", "/backbone.simfp"),
        Drop(_ROPE, "rotary table, computed from the recipe's sizes"),
    ),
    outside=(Drop(r"(pts_bbox_head|img_roi_head|img_neck)\.", "StreamPETR's own neck and heads"),),
    kinds=("eva02", "vit"),
    # the file has a pyramid at most
    optional=(r"/(proposal_generator|roi_heads)\.",),
    detector=True,
)
