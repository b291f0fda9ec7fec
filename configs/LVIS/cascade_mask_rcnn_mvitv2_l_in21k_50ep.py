"""Cascade Mask R-CNN, MViTv2-L (ImageNet-21K, supervised), FPN: LVIS v1, 50 epochs.

Source      detectron2 projects/ViTDet, model 329661552; the paper (arXiv 2203.16527) has no such
            row
Published   box AP 49.4, mask AP 44.2 on LVIS v1 val at 1024 pixels, plain NMS
Parameters  268.85 M
Cost        64 A100, 1 image each: 0.844 s an image (78125 x 0.844 s = 18 h), 21.0 GB; inference
            0.172 s an image
Schedule    78125 iterations x 64 images = 5.00 M images = 50 x 100000; lr / 10 at 69444 (88.9%)
            and 75231 (96.3%); warm-up 250 iterations
Start       MViTv2_L_in21k.pyth, which converter.py does not read yet
Train       python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_mvitv2_l_in21k_50ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_mvitv2_l_in21k_50ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        1203 classes, federated loss, repeat factor sampling; else the model of
            COCO/cascade_mask_rcnn_mvitv2_l_in21k_50ep.py.
"""

from ..COCO.cascade_mask_rcnn_mvitv2_l_in21k_50ep import model, optimizer, schedule, train
from ..common.data.lvis import dataloader
from ..common.models.lvis import lvis_heads

model.roi_heads = lvis_heads(model.roi_heads)

optimizer.lr = 4e-5
train.init_checkpoint = "weights/lvis_cascade_mask_rcnn_mvitv2_l_in21k_init.pth"
train.eval_every = 30000 * 64
train.num_images = 78125 * 64
schedule.num_images = 78125 * 64
schedule.milestones = [69444 * 64, 75231 * 64]
schedule.warmup = 250 * 64
