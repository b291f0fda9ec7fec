"""ViT-B from random weights: Mask R-CNN, COCO, 300 epochs.

Source      ViTDet (arXiv 2203.16527), Table 4, row "none"; hyper-parameters of Table 11
Published   box AP 48.1, mask AP 42.6 on val2017; without relative positions, as all ablations
Parameters  110.80 M
Schedule    553125 iterations x 64 images = 35.40 M images = 300 x 118000; lr 1.6e-4, / 10 at 491667
            (88.9%) and 532638 (96.3%), the shares of 100 epochs; warm-up 250 iterations; weight
            decay 0.2, drop path 0.1, no layer-wise lr decay
Start       random weights
Train       python train_net.py --config-file configs/paper/t4_scratch_b.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
"""

from ..COCO.mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train
from ..common.ablations import as_ablated as _as_ablated
from ..common.ablations import from_scratch as _from_scratch

_as_ablated(model)
_from_scratch(train, schedule, optimizer, count=300)
