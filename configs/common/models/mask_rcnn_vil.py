"""Mask R-CNN on ViL-Tiny with a feature pyramid network, images at most 1333 pixels long.

Heads as detectron2's defaults: one hidden convolution in the RPN, two fully connected layers in the
box head, no norm in pyramid and heads. Other sizes are in configs/vil.py.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from vitdet.backbones.msvit import MsViT

from .mask_rcnn import model

model.backbone = L(FPN)(
    bottom_up=L(MsViT)(
        arch=None,  # or an ARCH string of the published code, and null for the lists below
        embed_dim=[48, 96, 192, 384],  # ViL-Tiny (Table 1); configs/vil.py has the other sizes
        depth=[1, 1, 9, 1],
        num_heads=[1, 3, 3, 6],
        patch_size=[4, 2, 2, 2],  # strides 4, 8, 16, 32
        num_global_tokens=[1, 1, 1, 0],
        attention=["vil", "vil", "vil", "vil"],
        attention_size=[7, 7, 7, 7],
        use_abs_pos=[False, False, False, False],  # relative positions
        img_size=1333,  # positions for 1344 x 1344, a multiple of 32
        drop_path_rate=0.0,
        norm_embed=True,
        share_global_weights=True,
        out_features=["layer1", "layer2", "layer3", "layer4"],
    ),
    in_features="${.bottom_up.out_features}",
    out_channels=256,
    top_block=L(LastLevelMaxPool)(),  # p6
    norm="",
)

model.proposal_generator.head.conv_dims = [-1]
_heads = model.roi_heads
_heads.box_head.update(conv_dims=[], fc_dims=[1024, 1024], conv_norm="")
_heads.mask_head.conv_norm = ""
