"""Mask R-CNN, ViTAE-S: COCO, 100 epochs.

Source      ViTAE-Transformer/ViTDet, configs/ViTDet/ViTDet-ViTAE-Small-100e.py
Published   box AP 45.6, mask AP 40.1 on val2017
Parameters  47.72 M, 0.02 M of them random features that are never trained
Cost        32 A100, 2 images each: 0.645 s an iteration (183228 x 0.645 s = 33 h), 23.7 GB
Schedule    as mask_rcnn_vit_b_100ep.py
Start       ViTAE-S.pth.tar (ImageNet-1K, the averaged weights in it), through converter.py
Train       python train_net.py --config-file configs/vitae/mask_rcnn_vitae_s_100ep.py
              --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/vitae/mask_rcnn_vitae_s_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        The published config counts 12 layers for the lr decay, which gives the last three
            cells 1.43, 2.04 and 2.92 times the full rate. The log of the run behind the row
            (logs/ViTAE-S-GPU.log.json) counts 17 = 3 + 14 cells, and so does this recipe; for the
            config's rates add optimizer.num_layers=12.
"""

from ..common.models.mask_rcnn_vitae import vitae_s as _net
from .mask_rcnn_vit_b_100ep import dataloader, model, optimizer, schedule, train

model.backbone.net = _net

train.init_checkpoint = "weights/vitae_mask_rcnn_vitae_s_init.pth"
