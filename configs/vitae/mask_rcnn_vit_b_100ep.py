"""Mask R-CNN, ViT-B with a last norm, pyramid without halved channels: COCO, 100 epochs.

Source      ViTAE-Transformer/ViTDet, configs/ViTDet/ViTDet-ViT-Base-100e.py
Published   box AP 51.1, mask AP 45.5 on val2017 ("TPU" weights of MAE's authors; 51.1/45.4 from
            their own "GPU" weights)
Parameters  118.56 M
Cost        32 A100, 2 images each: 0.720 s an iteration (183228 x 0.720 s = 37 h), 34.6 GB
Schedule    25 x 4 x 117266 = 11.73 M images; lr / 10 after 22 x 4 = 88 and 24 x 4 = 96 epochs of
            117266; warm-up 250 iterations of 64 from 0.067
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vitae/mask_rcnn_vit_b_100ep.py
              --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/vitae/mask_rcnn_vit_b_100ep.py
              --eval-only train.init_checkpoint=WEIGHTS
"""

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_vitae import model
from ..common.vitae import optimizer, schedule, train

train.init_checkpoint = "weights/vitae_mask_rcnn_vit_b_init.pth"
