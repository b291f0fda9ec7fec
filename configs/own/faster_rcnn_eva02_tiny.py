"""Faster R-CNN, a tiny EVA-02 at 256 pixels, on your own images: boxes without masks.

Source      mask_rcnn_eva02_tiny.py without the mask head; data, schedule and start are its own
Train       vitdet train --data FOLDER --size tiny, or
            python train_net.py --config-file configs/own/faster_rcnn_eva02_tiny.py DATA...
"""

from ..common.own import boxes_only
from .mask_rcnn_eva02_tiny import dataloader, model, optimizer, schedule, train

boxes_only(model, dataloader)
