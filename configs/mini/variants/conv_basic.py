"""ViT, basic convolution blocks: a tiny Mask R-CNN on drawn shapes.

Source      ViTDet (arXiv 2203.16527), Table 2b, row "basic"
Schedule    as global_attention.py
Train       python train_net.py --config-file configs/mini/variants/conv_basic.py --num-gpus 2
"""

from ...common.ablations import convolutions as _convolutions
from .global_attention import dataloader, model, optimizer, schedule, train

_convolutions(model, "basic")

train.output_dir = "output/variants/conv_basic"
