"""Mask R-CNN on detectron2's Swin-B with a feature pyramid network, at 1024 x 1024 pixels.

The pyramid has LayerNorm over channels after each convolution. Swin itself keeps its default
norm, LayerNorm with eps 1e-5, as published.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling import FPN, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from vitdet.layers.norms import channel_layer_norm

from .mask_rcnn import model

model.backbone = L(FPN)(
    bottom_up=L(SwinTransformer)(
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=7,
        drop_path_rate=0.4,
    ),
    in_features=["p0", "p1", "p2", "p3"],  # Swin's own names of strides 4, 8, 16, 32
    out_channels=256,
    top_block=L(LastLevelMaxPool)(),
    norm=L(channel_layer_norm)(eps=1e-6),
    square_pad=1024,
)
