"""Mask R-CNN, a tiny plain ViT: the embedded data set of drawn shapes, on a CPU.

Source      this project; the parts are ViTDet's (arXiv 2203.16527), the sizes are small
Train       python train_net.py --config-file configs/mini/mask_rcnn_vitdet_shapes.py
"""

from detectron2.config import LazyCall as L

from vitdet.data.augment import random_flips
from vitdet.data.shapes import shapes_dataset

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_vitdet import model
from ..common.optim import optimizer
from ..common.schedule import schedule
from ..common.train import train
