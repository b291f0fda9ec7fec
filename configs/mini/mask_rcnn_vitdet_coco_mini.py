"""Mask R-CNN, a small plain ViT: a few real COCO images, to see that everything learns on a CPU.

Source      this project; the parts are those of ViTDet (arXiv 2203.16527), the sizes are small
Data        coco-mini, 100 + 34 images with all 80 classes, in the folder that VITDET_COCO_MINI
            names. Too few images for an AP that means something: for overfitting and for trials.
Schedule    16000 images = 2000 iterations x 8, cosine, warm-up 100 iterations
Train       python train_net.py --config-file configs/mini/mask_rcnn_vitdet_coco_mini.py
Overfit     add dataloader.train.dataset.num_images=8 dataloader.test.dataset.split=train
              dataloader.test.dataset.num_images=8
"""

from detectron2.config import LazyCall as L

from vitdet.data.augment import resize_shortest_edge
from vitdet.data.datasets import coco_mini

from .mask_rcnn_vitdet_shapes import dataloader, model, optimizer, schedule, train

SIZE = 256  # pixels, the longer side

model.backbone.net.update(img_size=SIZE, pretrain_img_size=SIZE, embed_dim=192, num_heads=3)
model.backbone.square_pad = SIZE
rpn = model.proposal_generator
rpn.head.num_anchors = 9
rpn.anchor_generator.update(
    sizes=[[8, 16, 24], [32, 48, 64], [96, 144, 216]], aspect_ratios=[0.5, 1.0, 2.0]
)
rpn.update(batch_size_per_image=128, pre_nms_topk=[500, 500], post_nms_topk=[200, 200])
model.roi_heads.update(num_classes=80, batch_size_per_image=128)

resize = L(resize_shortest_edge)(size=SIZE, max_size=SIZE)
dataloader.train.dataset = L(coco_mini)(split="train", num_images=None)
dataloader.train.mapper.update(augmentations=resize, cache=True)
dataloader.test.dataset = L(coco_mini)(split="val", num_images=None)
dataloader.test.mapper.augmentations = resize
train.update(output_dir="output/coco_mini", num_images=16000)
