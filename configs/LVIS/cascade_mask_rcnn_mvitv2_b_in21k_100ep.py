"""Cascade Mask R-CNN, MViTv2-B (ImageNet-21K, supervised), FPN: LVIS v1, 100 epochs.

Source      detectron2 projects/ViTDet, model 329477206; the paper (arXiv 2203.16527) has no such
            row
Published   box AP 46.3, mask AP 42.0 on LVIS v1 val at 1024 pixels, plain NMS
Parameters  106.89 M
Cost        64 A100, 1 image each: 0.475 s an image (156250 x 0.475 s = 21 h), 11.8 GB; inference
            0.100 s an image
Schedule    156250 iterations x 64 images = 10.00 M images = 100 x 100000; lr / 10 at 138889
            (88.9%) and 150463 (96.3%); warm-up 250 iterations
Start       MViTv2_B_in21k.pyth, which converter.py does not read yet
Train       python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_mvitv2_b_in21k_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_mvitv2_b_in21k_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        1203 classes, federated loss, repeat factor sampling; else the model of
            COCO/cascade_mask_rcnn_mvitv2_b_in21k_100ep.py.
"""

from ..COCO.cascade_mask_rcnn_mvitv2_b_in21k_100ep import model, optimizer, schedule, train
from ..common.data.lvis import dataloader
from ..common.models.lvis import lvis_heads

model.roi_heads = lvis_heads(model.roi_heads)

optimizer.lr = 1e-4
train.init_checkpoint = "weights/lvis_cascade_mask_rcnn_mvitv2_b_in21k_init.pth"
train.eval_every = 30000 * 64
train.num_images = 156250 * 64
schedule.num_images = 156250 * 64
schedule.milestones = [138889 * 64, 150463 * 64]
