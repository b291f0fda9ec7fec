"""Mask R-CNN, a small Vision Longformer: the embedded data set of drawn shapes, on a CPU.

Source      this project. The backbone is ViL-Tiny (arXiv 2103.15358) with a third of the blocks and
            narrower last stages; heads and data are those of mask_rcnn_vitdet_shapes.py.
Schedule    12000 images = 3000 iterations x 4, cosine, warm-up 200 iterations
"""

from detectron2.config import LazyCall as L
from detectron2.modeling import FPN

from vitdet.backbones.msvit import MsViT

from .mask_rcnn_vitdet_shapes import dataloader, model, optimizer, schedule, train

model.backbone = L(FPN)(
    bottom_up=L(MsViT)(
        arch=None,
        embed_dim=[48, 96, 128],
        depth=[1, 2, 2],
        num_heads=[1, 3, 4],
        patch_size=[4, 2, 2],
        num_global_tokens=[1, 1, 1],
        attention=["vil", "vil", "vil"],
        attention_size=[4, 4, 4],
        use_abs_pos=[False, False, False],
        img_size=128,
        out_features=["layer1", "layer2", "layer3"],
    ),
    in_features="${.bottom_up.out_features}",
    out_channels=64,
    norm="",
)
train.update(output_dir="output/shapes_vil", num_images=12000)
schedule.num_images = 12000
