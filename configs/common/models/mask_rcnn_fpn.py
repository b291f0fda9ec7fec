"""Mask R-CNN on detectron2's Swin-B and MViTv2-B with an FPN, at 1024 x 1024 pixels.

The pyramid has LayerNorm over channels after each convolution. Swin keeps its default norm,
LayerNorm with eps 1e-5. MViT's relative position tables keep the size of 224-pixel pre-training
(`img_size` is detectron2's default) and are interpolated in every forward pass. All as published.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling import FPN, MViT, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from vitdet.layers.norms import channel_layer_norm, layer_norm

from .mask_rcnn import model as mvit
from .mask_rcnn import model as swin

swin.backbone = L(FPN)(
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
mvit.backbone = L(FPN)(
    bottom_up=L(MViT)(
        img_size=224,
        embed_dim=96,
        depth=24,
        num_heads=1,
        last_block_indexes=[1, 4, 20, 23],  # last block of each stage
        residual_pooling=True,
        drop_path_rate=0.4,
        norm_layer=L(layer_norm)(eps=1e-6),
        use_act_checkpoint=False,
        out_features=["scale2", "scale3", "scale4", "scale5"],  # strides 4, 8, 16, 32
    ),
    in_features="${.bottom_up.out_features}",
    out_channels=256,
    top_block=L(LastLevelMaxPool)(),
    norm=L(channel_layer_norm)(eps=1e-6),
    square_pad=1024,
)
