"""ViT, windows only: a tiny Mask R-CNN on drawn shapes.

Source      ViTDet (arXiv 2203.16527), Table 2a, row "none"
Schedule    as global_attention.py
Train       python train_net.py --config-file configs/mini/variants/no_propagation.py --num-gpus 2
"""

from ...common.ablations import no_propagation as _no_propagation
from .global_attention import dataloader, model, optimizer, schedule, train

_no_propagation(model)

train.output_dir = "output/variants/no_propagation"
