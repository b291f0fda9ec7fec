"""ViT, one level: a tiny Mask R-CNN on drawn shapes.

Source      ViTDet (arXiv 2203.16527), Table 1, row "no feature pyramid"
Schedule    as global_attention.py
Train       python train_net.py --config-file configs/mini/variants/no_pyramid.py --num-gpus 2
"""

from ...common.ablations import no_pyramid as _no_pyramid
from .global_attention import dataloader, model, optimizer, schedule, train

_no_pyramid(model)

train.output_dir = "output/variants/no_pyramid"
