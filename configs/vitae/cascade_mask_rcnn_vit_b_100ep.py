"""Cascade Mask R-CNN, ViT-B: COCO, 100 epochs.

Source      the to-do list of ViTAE-Transformer/ViTDet ("tune the models for Cascade RCNN")
Published   nothing; detectron2's recipe of the same heads has 54.0/46.7
Parameters  148.83 M
Schedule    as mask_rcnn_vit_b_100ep.py
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vitae/cascade_mask_rcnn_vit_b_100ep.py
              --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT
"""

from ..common.models.cascade import cascade
from .mask_rcnn_vit_b_100ep import dataloader, model, optimizer, schedule, train

model.roi_heads = cascade(model.roi_heads)

train.init_checkpoint = "weights/vitae_cascade_mask_rcnn_vit_b_init.pth"
