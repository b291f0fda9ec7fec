"""Mask R-CNN, a tiny EVA-02: the embedded data set of drawn shapes, on a CPU.

Source      this project. The parts are those of EVA-02 (arXiv 2303.11331), as small as the ViT of
            mask_rcnn_vitdet_shapes.py, from which everything else is; every parameter decays, as
            in EVA's training. `make demo` trains it: from nothing and with few images it learns
            faster than the ViT.
Schedule    12000 images = 3000 iterations x 4, cosine, warm-up 200 iterations
"""

from detectron2.config import LazyCall as L

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.heads import StandardROIHeads

from .mask_rcnn_vitdet_shapes import dataloader, model, optimizer, schedule, train

model.backbone.net = L(EVA02ViT)(
    img_size=128,
    patch_size=8,
    embed_dim=96,
    depth=4,
    num_heads=3,
    mlp_ratio=4 * 2 / 3,
    drop_path_rate=0.0,
    rope_pretrain_grid=16,
    window_size=8,
    global_block_indexes=[1, 3],
    residual_block_indexes=[0, 1, 2, 3],
    pretrain_img_size=128,
    pretrain_use_cls_token=False,
    attention_backend="eager",  # at 64 and 256 tokens faster than torch's fused kernel on a CPU
    out_feature="last_feat",
)
model.roi_heads._target_ = StandardROIHeads  # with the switches for soft-NMS and maskness
optimizer.update(weight_decay_norm=None, no_decay=[])
train.update(num_images=12000, checkpoint_every=4000, output_dir="output/eva02_shapes")
schedule.num_images = 12000
