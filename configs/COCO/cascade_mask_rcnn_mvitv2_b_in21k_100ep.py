"""Cascade Mask R-CNN, MViTv2-B (ImageNet-21K, supervised), FPN: COCO, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Tables 5 and 9; detectron2 projects/ViTDet, model 325820315
Published   box AP 55.6, mask AP 48.1 on val2017 at 1024 pixels, plain NMS; the paper has 55.6/48.1
Parameters  103.15 M
Cost        64 A100, 1 image each: 0.475 s an image (184375 x 0.475 s = 24 h), 8.9 GB; inference
            0.090 s an image
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889
            (88.9%) and 177546 (96.3%); warm-up 250 iterations
Start       MViTv2_B_in21k.pyth, which converter.py does not read yet
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_mvitv2_b_in21k_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_mvitv2_b_in21k_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
"""

from ..common.data.coco import dataloader
from ..common.models.cascade import cascade
from ..common.models.mask_rcnn_mvit import model
from ..common.optim import optimizer
from ..common.schedule import schedule
from ..common.train import train

model.roi_heads = cascade(model.roi_heads)

optimizer.lr = 8e-5
train.init_checkpoint = "weights/coco_cascade_mask_rcnn_mvitv2_b_in21k_init.pth"
train.num_images = 184375 * 64
schedule.num_images = 184375 * 64
schedule.milestones = [163889 * 64, 177546 * 64]
