"""Mask R-CNN, ViTAE-B in the ViTDet framework: detectron2's pyramid, heads and schedule.

Source      the to-do list of ViTAE-Transformer/ViTDet ("train ViTAE with the ViTDet framework");
            model of vitae/mask_rcnn_vitae_b_100ep.py, all else of COCO/mask_rcnn_vitdet_b_100ep.py
Published   nothing; ViTAE-B with that repository's pyramid and heads has 51.6/45.8
Parameters  116.66 M
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889
            (88.9%) and 177546 (96.3%); warm-up 250 iterations
Start       mae_vitae_b.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vitae/mask_rcnn_vitae_b_vitdet_100ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
"""

from ..COCO.mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train
from ..common.models.mask_rcnn_vitae import vitae_b as _net

model.backbone.net = _net

train.init_checkpoint = "weights/vitae_mask_rcnn_vitae_b_vitdet_init.pth"
