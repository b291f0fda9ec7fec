"""ViT, feature pyramid over the maps of three stages: a tiny Mask R-CNN on drawn shapes.

Source      ViTDet (arXiv 2203.16527), Table 1, row (a); three levels here, hence three stages
Schedule    as global_attention.py
Train       python train_net.py --config-file configs/mini/variants/fpn_stages.py --num-gpus 2
"""

from ...common.ablations import fpn_stages as _fpn_stages
from .global_attention import dataloader, model, optimizer, schedule, train

_fpn_stages(model)

train.output_dir = "output/variants/fpn_stages"
