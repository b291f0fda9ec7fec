"""Mask R-CNN, plain ViT-H, simple feature pyramid: LVIS v1, 100 epochs.

Source      detectron2 projects/ViTDet, model 332434656; the paper (arXiv 2203.16527) has no such
            row
Published   box AP 49.1, mask AP 46.0 on LVIS v1 val at 1024 pixels, plain NMS
Parameters  667.25 M
Cost        64 A100, 1 image each: 1.059 s an image (156250 x 1.059 s = 46 h), 35.3 GB; inference
            0.186 s an image
Schedule    156250 iterations x 64 images = 10.00 M images = 100 x 100000; lr / 10 at 138889
            (88.9%) and 150463 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_huge_p14to16.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/LVIS/mask_rcnn_vitdet_h_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/LVIS/mask_rcnn_vitdet_h_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        1203 classes, federated loss, repeat factor sampling; else the model of
            COCO/mask_rcnn_vitdet_h_75ep.py, with drop path 0.4.
Note        Unlike ViT-B and ViT-L, the published run decays norms and positions too.
Note        This file is that of MAE with its 14-pixel patches resized to 16; converter.py
            --resize-patch-embed does the like (not compared).
"""

from ..COCO.mask_rcnn_vitdet_h_75ep import model, optimizer, schedule, train
from ..common.data.lvis import dataloader
from ..common.models.lvis import lvis_heads

model.roi_heads = lvis_heads(model.roi_heads)
model.backbone.net.drop_path_rate = 0.4

optimizer.lr = 1e-4
train.init_checkpoint = "weights/lvis_mask_rcnn_vitdet_h_init.pth"
train.eval_every = 30000 * 64
train.num_images = 156250 * 64
schedule.num_images = 156250 * 64
schedule.milestones = [138889 * 64, 150463 * 64]
schedule.warmup = 250 * 64
