"""Mask R-CNN, ViT-B, pyramid and heads with GroupNorm of one group: COCO, 100 epochs.

Source      alibaba/EasyCV v0.7, configs/detection/vitdet/vitdet_mask_rcnn.py
Published   box AP 50.65, mask AP 45.41 on val2017
Parameters  110.90 M
Cost        4 x 8 GPUs, 2 images each: 13.3 GB; inference 138 ms an image on a V100
Schedule    100 x 117266 = 11.73 M images; lr / 10 after 88 and 96 epochs; warm-up 250 iterations
            of 64 from 0.001
Start       mae_pretrain_vit_base.pth (1600 epochs), through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/easycv/mask_rcnn_vitdet_b_100ep.py
              --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/easycv/mask_rcnn_vitdet_b_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Their pull request 177 explains the 1 AP below detectron2 by MMDetection's Mask R-CNN,
            which is weaker on ResNet-50 too.
"""

from ..common.data.coco import dataloader
from ..common.easycv import optimizer, schedule, train
from ..common.models.mask_rcnn_easycv import model

train.init_checkpoint = "weights/easycv_mask_rcnn_vitdet_b_init.pth"
