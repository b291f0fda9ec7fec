"""Cascade Mask R-CNN, Swin-L (ImageNet-21K, supervised), FPN: LVIS v1, 50 epochs.

Source      detectron2 projects/ViTDet, model 329222724; the paper (arXiv 2203.16527) has no such
            row
Published   box AP 46.0, mask AP 41.4 on LVIS v1 val at 1024 pixels, plain NMS
Parameters  251.55 M
Cost        64 A100, 1 image each: 0.486 s an image (78125 x 0.486 s = 11 h), 13.8 GB; inference
            0.105 s an image
Schedule    78125 iterations x 64 images = 5.00 M images = 50 x 100000; lr / 10 at 69444 (88.9%)
            and 75231 (96.3%); warm-up 250 iterations
Start       swin_large_patch4_window7_224_22k.pth, which converter.py does not read yet
Train       python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_swin_l_in21k_50ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_swin_l_in21k_50ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        1203 classes, federated loss, repeat factor sampling; else the model of
            COCO/cascade_mask_rcnn_swin_l_in21k_50ep.py, with drop path 0.3.
Note        detectron2 halves 100 epochs because Swin is better with 50.
"""

from ..COCO.cascade_mask_rcnn_swin_l_in21k_50ep import model, optimizer, schedule, train
from ..common.data.lvis import dataloader
from ..common.models.lvis import lvis_heads

model.roi_heads = lvis_heads(model.roi_heads)
model.backbone.bottom_up.drop_path_rate = 0.3

optimizer.lr = 1e-4
train.init_checkpoint = "weights/lvis_cascade_mask_rcnn_swin_l_in21k_init.pth"
train.eval_every = 30000 * 64
train.num_images = 78125 * 64
schedule.num_images = 78125 * 64
schedule.milestones = [69444 * 64, 75231 * 64]
schedule.warmup = 250 * 64
