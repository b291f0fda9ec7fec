"""Mask R-CNN, plain ViT-H, simple feature pyramid: COCO, 75 epochs.

Source      ViTDet (arXiv 2203.16527), Tables 5 and 9; detectron2 projects/ViTDet, model 329145471
Published   box AP 56.7, mask AP 50.2 on val2017 at 1024 pixels, plain NMS; the paper has 56.7/50.1
Parameters  661.20 M
Cost        64 A100, 1 image each: 1.098 s an image (138281 x 1.098 s = 42 h), 31.5 GB; inference
            0.178 s an image
Schedule    138281 iterations x 64 images = 8.85 M images = 75 x 118000; lr / 10 at 122916 (88.9%)
            and 133159 (96.3%); warm-up 187.5 iterations (detectron2 keeps the fraction 250 /
            184375 of the 100-epoch recipe)
Start       mae_pretrain_vit_huge_p14to16.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/COCO/mask_rcnn_vitdet_h_75ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/mask_rcnn_vitdet_h_75ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Unlike ViT-B and ViT-L, the published run decays norms and positions too.
Note        This file is that of MAE with its 14-pixel patches resized to 16; converter.py
            --resize-patch-embed does the like (not compared).
"""

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_vitdet import model
from ..common.optim import optimizer
from ..common.schedule import schedule
from ..common.train import train

model.backbone.net.update(embed_dim=1280, depth=32, num_heads=16, drop_path_rate=0.5)
model.backbone.net.global_block_indexes = [7, 15, 23, 31]

optimizer.layer_decay_rate = 0.9
optimizer.weight_decay_norm = None
optimizer.no_decay = []
train.init_checkpoint = "weights/coco_mask_rcnn_vitdet_h_init.pth"
train.num_images = 138281 * 64
schedule.num_images = 138281 * 64
schedule.milestones = [122916 * 64, 133159 * 64]
schedule.warmup = 12000  # 187.5 * 64
