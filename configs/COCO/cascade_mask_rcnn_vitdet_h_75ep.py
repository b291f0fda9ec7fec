"""Cascade Mask R-CNN, plain ViT-H, simple feature pyramid: COCO, 75 epochs.

Source      ViTDet (arXiv 2203.16527), Tables 5 and 9; detectron2 projects/ViTDet, model 328730692
Published   box AP 58.7, mask AP 51.0 on val2017 at 1024 pixels, plain NMS; the paper has 58.7/50.9
Parameters  691.47 M
Cost        64 A100, 1 image each: 1.137 s an image (138281 x 1.137 s = 44 h), 32.9 GB; inference
            0.196 s an image
Schedule    138281 iterations x 64 images = 8.85 M images = 75 x 118000; lr / 10 at 122916 (88.9%)
            and 133159 (96.3%); warm-up 187.5 iterations (detectron2 keeps the fraction 250 /
            184375 of the 100-epoch recipe)
Start       mae_pretrain_vit_huge_p14to16.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_vitdet_h_75ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_vitdet_h_75ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Everything but the box heads is from mask_rcnn_vitdet_h_75ep.py.
Note        Unlike ViT-B and ViT-L, the published run decays norms and positions too.
Note        This file is that of MAE with its 14-pixel patches resized to 16; converter.py
            --resize-patch-embed does the like (not compared).
"""

from ..common.models.cascade import cascade
from .mask_rcnn_vitdet_h_75ep import dataloader, model, optimizer, schedule, train

model.roi_heads = cascade(model.roi_heads)

train.init_checkpoint = "weights/coco_cascade_mask_rcnn_vitdet_h_init.pth"
