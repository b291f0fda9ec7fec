"""Mask R-CNN, a small plain ViT: a few real COCO images, to see that everything learns on a CPU.

Source      this project; the parts are those of ViTDet (arXiv 2203.16527), the sizes are small
Data        coco-mini, 100 + 34 images with all 80 classes, in the folder that VITDET_COCO_MINI
            names. Too few images for an AP that means something: for overfitting and for trials.
Schedule    8000 images = 1000 iterations x 8, cosine, warm-up 100 iterations
Overfit     add dataloader.train.dataset.num_images=8 dataloader.test.dataset.split=train
              dataloader.test.dataset.num_images=8
"""

from detectron2.config import LazyCall as L

from vitdet.data.augment import resize_shortest_edge
from vitdet.data.datasets import coco_mini

from .mask_rcnn_vitdet_shapes import dataloader, model, optimizer, schedule, train

SIZE = 256  # pixels, the longer side

model.backbone.net.update(
    img_size=SIZE,
    patch_size=16,
    embed_dim=192,
    depth=6,
    window_size=8,
    global_block_indexes=[2, 5],
    residual_block_indexes=[],
    pretrain_img_size=SIZE,
)
model.backbone.update(scale_factors=[4.0, 2.0, 1.0, 0.5], square_pad=SIZE)
_levels, _strides = ["p2", "p3", "p4", "p5"], [4, 8, 16, 32]
_rpn = model.proposal_generator
_rpn.in_features = _levels
_rpn.head.num_anchors = 6
_rpn.anchor_generator.update(
    sizes=[[8, 12], [20, 32], [48, 80], [128, 192]],
    aspect_ratios=[0.5, 1.0, 2.0],
    strides=_strides,
)
_rpn.update(batch_size_per_image=128, pre_nms_topk=[300, 300], post_nms_topk=[150, 150])
_heads = model.roi_heads
_heads.update(num_classes=80, batch_size_per_image=64)
_heads.box_in_features = _heads.mask_in_features = _levels
for _pooler in (_heads.box_pooler, _heads.mask_pooler):
    _pooler.scales = [1 / stride for stride in _strides]
    _pooler.sampling_ratio = 0

_resize = L(resize_shortest_edge)(size=SIZE, max_size=SIZE)
dataloader.train.total_batch_size = train.reference_batch = 8
dataloader.train.dataset = L(coco_mini)(split="train", num_images=None)
dataloader.train.mapper.augmentations = _resize
dataloader.test.dataset = L(coco_mini)(split="val", num_images=None)
dataloader.test.mapper.augmentations = _resize
optimizer.lr = 5e-4
schedule.num_images = 8000
schedule.warmup = 100 * 8
train.update(output_dir="output/coco_mini", num_images=8000, checkpoint_every=2000)
