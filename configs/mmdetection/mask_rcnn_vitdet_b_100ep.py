"""Mask R-CNN, ViT-B of mmdetection 3.x: COCO, 100 epochs.

Source      open-mmlab/mmdetection, projects/ViTDet/configs/vitdet_mask-rcnn_vit-b-mae_lsj-100e.py
Published   box AP 51.6, mask AP 45.7 on val2017
Parameters  110.90 M
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889
            (88.9%) and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Note        detectron2's recipe with an epsilon of 1e-5 in every LayerNorm. There, images are
            padded with grey (114) before normalisation; here with zeros after it.
"""

from detectron2.config import LazyCall as L

from vitdet.layers.norms import channel_layer_norm

from ..COCO.mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train

model.backbone.net.norm_eps = 1e-5
model.backbone.norm_eps = 1e-5
model.roi_heads.box_head.conv_norm = L(channel_layer_norm)(eps=1e-5)
model.roi_heads.mask_head.conv_norm = L(channel_layer_norm)(eps=1e-5)

optimizer.weight_decay_norm = None
optimizer.no_decay = [r"^backbone\.net\.blocks\..*norm", "pos_embed"]
train.init_checkpoint = "weights/mmdetection_mask_rcnn_vitdet_b_init.pth"
