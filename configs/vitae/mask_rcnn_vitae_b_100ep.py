"""Mask R-CNN, ViTAE-B: COCO, 100 epochs.

Source      ViTAE-Transformer/ViTDet, configs/ViTDet/ViTDet-ViTAE-Base-100e.py
Published   box AP 51.6, mask AP 45.8 on val2017
Parameters  121.33 M
Cost        32 A100, 2 images each, activations recomputed: 0.963 s an iteration (183228 x 0.963 s
            = 49 h), 19.3 GB
Schedule    as mask_rcnn_vit_b_100ep.py
Start       mae_vitae_b.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vitae/mask_rcnn_vitae_b_100ep.py
              --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/vitae/mask_rcnn_vitae_b_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
"""

from ..common.models.mask_rcnn_vitae import vitae_b as _net
from .mask_rcnn_vit_b_100ep import dataloader, model, optimizer, schedule, train

model.backbone.net = _net

train.init_checkpoint = "weights/vitae_mask_rcnn_vitae_b_init.pth"
