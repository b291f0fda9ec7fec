"""Mask R-CNN, plain ViT-B, simple feature pyramid: LVIS v1, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Table 10; detectron2 projects/ViTDet, model 329225748
Published   box AP 40.2, mask AP 38.2 on LVIS v1 val at 1024 pixels, plain NMS; the paper has
            40.1/38.1
Parameters  116.94 M
Cost        64 A100, 1 image each: 0.317 s an image (156250 x 0.317 s = 14 h), 14.4 GB; inference
            0.085 s an image
Schedule    156250 iterations x 64 images = 10.00 M images = 100 x 100000; lr / 10 at 138889
            (88.9%) and 150463 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/LVIS/mask_rcnn_vitdet_b_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/LVIS/mask_rcnn_vitdet_b_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        1203 classes, federated loss, repeat factor sampling; else the model of
            COCO/mask_rcnn_vitdet_b_100ep.py.
"""

from ..COCO.mask_rcnn_vitdet_b_100ep import model, optimizer, schedule, train
from ..common.data.lvis import dataloader
from ..common.models.lvis import lvis_heads

model.roi_heads = lvis_heads(model.roi_heads)

optimizer.lr = 2e-4
train.init_checkpoint = "weights/lvis_mask_rcnn_vitdet_b_init.pth"
train.eval_every = 30000 * 64
train.num_images = 156250 * 64
schedule.num_images = 156250 * 64
schedule.milestones = [138889 * 64, 150463 * 64]
