"""Cascade Mask R-CNN, plain ViT-L, simple feature pyramid: COCO, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Tables 5 and 9; detectron2 projects/ViTDet, model 328021305
Published   box AP 57.6, mask AP 50.0 on val2017 at 1024 pixels, plain NMS; the paper has 57.6/49.8
Parameters  360.95 M
Cost        64 A100, 1 image each: 0.643 s an image (184375 x 0.643 s = 33 h), 22.3 GB; inference
            0.142 s an image
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889
            (88.9%) and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_large.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_vitdet_l_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_vitdet_l_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Everything but the box heads is from mask_rcnn_vitdet_l_100ep.py.
"""

from ..common.models.cascade import cascade
from .mask_rcnn_vitdet_l_100ep import dataloader, model, optimizer, schedule, train

model.roi_heads = cascade(model.roi_heads)

train.init_checkpoint = "weights/coco_cascade_mask_rcnn_vitdet_l_init.pth"
