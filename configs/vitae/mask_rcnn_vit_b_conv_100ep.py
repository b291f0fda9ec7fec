"""Mask R-CNN, ViT-B with convolution propagation instead of global attention: COCO, 100 epochs.

Source      the to-do list of ViTAE-Transformer/ViTDet ("conv blocks for global information")
Published   nothing. ViTDet (arXiv 2203.16527), Table 8a, without relative positions: four global
            blocks 51.2/45.5, four bottleneck blocks 51.0/45.3
Parameters  126.19 M
Schedule    as mask_rcnn_vit_b_100ep.py
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vitae/mask_rcnn_vit_b_conv_100ep.py
              --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT
"""

from .mask_rcnn_vit_b_100ep import dataloader, model, optimizer, schedule, train

_net = model.backbone.net
_net.residual_block_indexes, _net.global_block_indexes = _net.global_block_indexes, []
_net.propagation = "bottleneck"
_net.propagation_norm = "LN"

train.init_checkpoint = "weights/vitae_mask_rcnn_vit_b_conv_init.pth"
