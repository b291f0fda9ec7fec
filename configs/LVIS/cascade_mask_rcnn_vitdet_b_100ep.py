"""Cascade Mask R-CNN, plain ViT-B, simple feature pyramid: LVIS v1, 100 epochs.

Source      detectron2 projects/ViTDet, model 329226874; the paper (arXiv 2203.16527) has no such
            row
Published   box AP 43.0, mask AP 38.9 on LVIS v1 val at 1024 pixels, plain NMS
Parameters  144.90 M
Cost        64 A100, 1 image each: 0.356 s an image (156250 x 0.356 s = 15 h), 15.2 GB; inference
            0.099 s an image
Schedule    156250 iterations x 64 images = 10.00 M images = 100 x 100000; lr / 10 at 138889
            (88.9%) and 150463 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_vitdet_b_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_vitdet_b_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Everything but the box heads is from mask_rcnn_vitdet_b_100ep.py.
"""

from ..common.models.cascade import cascade
from .mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train

model.roi_heads = cascade(model.roi_heads)

train.init_checkpoint = "weights/lvis_cascade_mask_rcnn_vitdet_b_init.pth"
