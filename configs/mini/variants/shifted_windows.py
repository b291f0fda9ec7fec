"""ViT, shifted windows: a tiny Mask R-CNN on drawn shapes.

Source      ViTDet (arXiv 2203.16527), Table 2a, row "shifted win."
Schedule    as global_attention.py
Train       python train_net.py --config-file configs/mini/variants/shifted_windows.py --num-gpus 2
"""

from ...common.ablations import shifted_windows as _shifted_windows
from .global_attention import dataloader, model, optimizer, schedule, train

_shifted_windows(model)

train.output_dir = "output/variants/shifted_windows"
