"""ViT of EasyCV v0.6, global blocks: a tiny Mask R-CNN on drawn shapes.

Source      alibaba/EasyCV before v0.7: a last norm, deconvolutions that keep their channels, norms
            over a whole map
Schedule    as global_attention.py
Train       python train_net.py --config-file configs/mini/variants/easycv_attention.py --num-gpus 2
"""

from ...common.models.mask_rcnn_easycv import before_v07 as _before_v07
from .global_attention import dataloader, model, optimizer, schedule, train

_before_v07(model, aggregation="attn")
model.backbone.net.pretrain_img_size = 128

train.output_dir = "output/variants/easycv_attention"
