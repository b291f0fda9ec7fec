"""Faster R-CNN, plain ViT-L, on your own images: boxes without masks.

Source      mask_rcnn_vitdet_l.py without the mask head; data, schedule and start are its own
Train       vitdet train --data FOLDER --size large, or
            python train_net.py --config-file configs/own/faster_rcnn_vitdet_l.py DATA...
"""

from ..common.own import boxes_only
from .mask_rcnn_vitdet_l import dataloader, model, optimizer, schedule, train

boxes_only(model, dataloader)
