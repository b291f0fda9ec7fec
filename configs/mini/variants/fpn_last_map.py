"""ViT, feature pyramid over the last map: a tiny Mask R-CNN on drawn shapes.

Source      ViTDet (arXiv 2203.16527), Table 1, row (b)
Schedule    as global_attention.py
Train       python train_net.py --config-file configs/mini/variants/fpn_last_map.py --num-gpus 2
"""

from ...common.ablations import fpn_last_map as _fpn_last_map
from .global_attention import dataloader, model, optimizer, schedule, train

_fpn_last_map(model)

train.output_dir = "output/variants/fpn_last_map"
