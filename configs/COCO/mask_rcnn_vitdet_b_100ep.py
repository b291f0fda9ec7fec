"""Mask R-CNN, plain ViT-B, simple feature pyramid: COCO, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Tables 5 and 9; detectron2 projects/ViTDet, model 325346929
Published   box AP 51.6, mask AP 45.9 on val2017 at 1024 pixels, plain NMS; the paper has 51.6/45.9
Parameters  110.90 M
Cost        64 A100, 1 image each: 0.314 s an image (184375 x 0.314 s = 16 h), 10.9 GB; inference
            0.079 s an image
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889
            (88.9%) and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/COCO/mask_rcnn_vitdet_b_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/mask_rcnn_vitdet_b_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
"""

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_vitdet import model
from ..common.training import optimizer, schedule, train

optimizer.layer_decay_rate = 0.7
train.init_checkpoint = "weights/coco_mask_rcnn_vitdet_b_init.pth"
train.num_images = 184375 * 64
schedule.num_images = 184375 * 64
schedule.milestones = [163889 * 64, 177546 * 64]
