"""Mask R-CNN, ViT-B of EasyCV v0.6, four global attention blocks: COCO, 100 epochs.

Source      alibaba/EasyCV before v0.7, configs/detection/vitdet/vitdet_100e.py, "attn"
Published   box AP 50.57, mask AP 44.96 on val2017 (50.6/45.0 in their article)
Parameters  118.56 M
Cost        8 x 8 GPUs, 1 image each: 59 h; inference 163 ms an image on a V100
Schedule    100 x 117266 = 11.73 M images; lr / 10 after 88 and 96 epochs; warm-up 250 iterations
            of 64 from 0.067; one learning rate for all layers
Start       mae_pretrain_vit_base.pth (1600 epochs), through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/easycv/mask_rcnn_vit_b_v06_attn_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
"""

from ..common.data.coco import dataloader
from ..common.easycv import before_v07 as _train_as_v06
from ..common.easycv import optimizer, schedule, train
from ..common.models.mask_rcnn_easycv import before_v07 as _build_as_v06
from ..common.models.mask_rcnn_easycv import model

_build_as_v06(model, aggregation="attn")
_train_as_v06(optimizer, schedule)

train.init_checkpoint = "weights/easycv_mask_rcnn_vit_b_v06_attn_init.pth"
