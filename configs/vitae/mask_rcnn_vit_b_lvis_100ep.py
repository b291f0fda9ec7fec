"""Mask R-CNN, ViT-B: LVIS v1, 100 epochs.

Source      the to-do list of ViTAE-Transformer/ViTDet ("train ViT models for the LVIS dataset")
Published   nothing; detectron2's recipe has 40.2/38.2
Parameters  124.61 M
Schedule    156250 iterations x 64 images = 10.00 M images = 100 x 100000; lr 2e-4, / 10 at 138889
            (88.9%) and 150463 (96.3%), as detectron2's recipe for LVIS; warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vitae/mask_rcnn_vit_b_lvis_100ep.py
              --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT
"""

from ..common.data.lvis import dataloader
from ..common.models.lvis import lvis_heads
from .mask_rcnn_vit_b_100ep import model, optimizer, schedule, train

model.roi_heads = lvis_heads(model.roi_heads)

optimizer.lr = 2e-4
train.init_checkpoint = "weights/vitae_mask_rcnn_vit_b_lvis_init.pth"
train.checkpoint_every = 5000 * 64
train.eval_every = 30000 * 64
train.num_images = 156250 * 64
schedule.num_images = 156250 * 64
schedule.milestones = [138889 * 64, 150463 * 64]
