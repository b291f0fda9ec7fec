"""Mask R-CNN, ViT-B of EasyCV v0.6, four blocks of 1x1, 3x3 and 1x1 convolutions: COCO, 100 epochs.

Source      alibaba/EasyCV before v0.7, configs/detection/vitdet/vitdet_bottleneck_100e.py
Published   no AP, and no weights
Parameters  121.03 M
Schedule    100 x 117266 = 11.73 M images; lr / 10 after 88 and 96 epochs; warm-up 250 iterations
            of 64 from 0.067; one learning rate for all layers
Start       mae_pretrain_vit_base.pth (1600 epochs), through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/easycv/mask_rcnn_vit_b_v06_bottleneck_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        The block ends with a ReLU, so what leaves it is never negative, and a new one is no
            identity; with propagation_norm="LN" it has no such ReLU and is one.
"""

from ..common.data.coco import dataloader
from ..common.easycv import before_v07 as _train_as_v06
from ..common.easycv import optimizer, schedule, train
from ..common.models.mask_rcnn_easycv import before_v07 as _build_as_v06
from ..common.models.mask_rcnn_easycv import model

_build_as_v06(model, aggregation="bottleneck")
_train_as_v06(optimizer, schedule)

train.init_checkpoint = "weights/easycv_mask_rcnn_vit_b_v06_bottleneck_init.pth"
