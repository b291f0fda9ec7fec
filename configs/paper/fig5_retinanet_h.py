"""ViT-H with RetinaNet: COCO boxes, 75 epochs.

Source      ViTDet (arXiv 2203.16527), Fig. 5 (curves of AP over parameters, time and FLOPs; no
            table)
Published   no number
Parameters  644.63 M
Schedule    138281 iterations x 64 images = 8.85 M images = 75 x 118000; lr / 10 at 122916 (88.9%)
            and 133159 (96.3%); warm-up 187.5 iterations, as detectron2's recipe of 75 epochs
Start       mae_pretrain_vit_huge_p14to16.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/fig5_retinanet_h.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        Masks are read to take boxes again after the crop, and used for nothing else.
"""

from ..COCO.mask_rcnn_vitdet_h_75ep import dataloader, optimizer, schedule, train
from ..COCO.mask_rcnn_vitdet_h_75ep import model as _mask_rcnn
from ..common.models.retinanet_vitdet import model

model.backbone.net = _mask_rcnn.backbone.net

train.init_checkpoint = "weights/paper_fig5_retinanet_h_init.pth"
