"""Faster R-CNN, ViT-B, pyramid and heads with GroupNorm of one group: COCO boxes, 100 epochs.

Source      alibaba/EasyCV v0.7, configs/detection/vitdet/vitdet_faster_rcnn.py
Published   no AP
Parameters  108.25 M
Schedule    as mask_rcnn_vitdet_b_100ep.py
Start       mae_pretrain_vit_base.pth (1600 epochs), through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/easycv/faster_rcnn_vitdet_b_100ep.py
              --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        Masks are read to take boxes again after the crop, and used for nothing else.
"""

from ..common.models.mask_rcnn_easycv import boxes_only
from .mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train

boxes_only(model)

train.init_checkpoint = "weights/easycv_faster_rcnn_vitdet_b_init.pth"
