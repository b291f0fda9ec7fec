"""Faster R-CNN, plain ViT-S at 512 pixels, on your own images: boxes without masks.

Source      mask_rcnn_vitdet_s.py without the mask head; data, schedule and start are its own
Train       vitdet train --data FOLDER --size small, or
            python train_net.py --config-file configs/own/faster_rcnn_vitdet_s.py DATA...
"""

from ..common.own import boxes_only
from .mask_rcnn_vitdet_s import dataloader, model, optimizer, schedule, train

boxes_only(model, dataloader)
