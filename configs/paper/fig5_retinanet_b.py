"""ViT-B with RetinaNet: COCO boxes, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Fig. 5 (curves of AP over parameters, time and FLOPs; no
            table)
Published   no number
Parameters  96.98 M
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889 (88.9%)
            and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/fig5_retinanet_b.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        Masks are read to take boxes again after the crop, and used for nothing else.
"""

from ..COCO.mask_rcnn_vitdet_b_100ep import dataloader, optimizer, schedule, train
from ..COCO.mask_rcnn_vitdet_b_100ep import model as _mask_rcnn
from ..common.models.retinanet_vitdet import model

model.backbone.net = _mask_rcnn.backbone.net

train.init_checkpoint = "weights/paper_fig5_retinanet_b_init.pth"
