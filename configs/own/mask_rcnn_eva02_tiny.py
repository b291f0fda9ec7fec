"""Mask R-CNN, a tiny EVA-02 at 256 pixels, on your own images: a first try, also on a CPU.

Source      this project. The blocks are those of configs/mini/mask_rcnn_eva02_shapes.py, wider and
            six; anchors and heads those of configs/mini/mask_rcnn_vitdet_coco_mini.py
Data        class names and their number come from the json
              dataloader.train.dataset.json=TRAIN.json dataloader.train.dataset.images=FOLDER
              dataloader.test.dataset.json=VAL.json    dataloader.test.dataset.images=FOLDER
Schedule    8000 images = 1000 iterations x 8, cosine, warm-up 100 iterations; train.epochs=N makes
            it N rounds of the data and keeps its shape
Start       random weights: no published file has this shape
Train       vitdet train --data FOLDER --size tiny, or
            python train_net.py --config-file configs/own/mask_rcnn_eva02_tiny.py DATA...
"""

from detectron2.config import LazyCall as L

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.heads import StandardROIHeads

from ..common.own import own_data
from ..mini.mask_rcnn_vitdet_coco_mini import (
    SIZE,
    dataloader,
    model,
    optimizer,
    schedule,
    train,
)

model.backbone.net = L(EVA02ViT)(
    img_size=SIZE,
    patch_size=16,
    embed_dim=192,
    depth=6,
    num_heads=6,
    mlp_ratio=4 * 2 / 3,
    drop_path_rate=0.0,
    rope_pretrain_grid=16,
    window_size=8,
    global_block_indexes=[2, 5],
    residual_block_indexes=[0, 1, 2, 3, 4, 5],
    pretrain_img_size=SIZE,
    pretrain_use_cls_token=False,
    out_feature="last_feat",
)
model.roi_heads._target_ = StandardROIHeads  # with the switches for soft-NMS and maskness

own_data(dataloader, SIZE, min_scale=0.5, max_scale=1.5)
dataloader.train.update(num_workers=2)
optimizer.update(weight_decay_norm=None, no_decay=[])  # every parameter decays, as in EVA-02
train.output_dir = "output/own"
train.eval_every = 2000
