"""Cascade Mask R-CNN on EVA-01 (1B) with the simple feature pyramid, at 1280 x 1280 pixels.

Source: "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale" (arXiv
2211.07636), Sec. 3.2, with the numbers of baaivision/EVA, EVA-01/det
(COCO/cascade_mask_rcnn_vitdet_eva.py). Heads as in `cascade.py`. At 1536 pixels it was evaluated
with `square_pad=1536` and `net.rel_pos_resize="beit"`, and the tables of 1280.
"""

from .cascade import cascade
from .mask_rcnn_vitdet import model

model.backbone.square_pad = 1280
model.backbone.net.update(
    img_size=1280,
    embed_dim=1408,
    depth=40,
    num_heads=16,
    mlp_ratio=6144 / 1408,
    qkv_bias="qv",
    drop_path_rate=0.6,
    rel_pos_resize="interpolate",
    window_size=16,
    global_block_indexes=list(range(3, 40, 4)),  # every fourth block
    checkpoint_blocks=list(range(40)),
    layer_scale=False,
    freeze_patch_embed=True,
)
model.roi_heads = cascade(model.roi_heads)
