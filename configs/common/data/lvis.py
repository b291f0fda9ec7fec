"""LVIS v1: as COCO, with rare classes repeated (repeat factor threshold 0.001) and 300 detections.

Repeat factor sampling: "LVIS: A Dataset for Large Vocabulary Instance Segmentation"
(arXiv 1908.03195). LVIS uses the images of COCO, so only its two json files come in addition.
"""

from .coco import dataloader

dataloader.train.dataset.name = "lvis_v1_train"
dataloader.train.repeat_threshold = 0.001
dataloader.test.dataset.name = "lvis_v1_val"
dataloader.evaluator.max_dets = 300
