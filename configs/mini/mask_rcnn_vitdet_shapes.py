"""Mask R-CNN, a tiny plain ViT: the embedded data set of drawn shapes, on a CPU.

Source      this project. The parts are those of ViTDet (arXiv 2203.16527); patches of 8 pixels, 96
            channels, 4 blocks and narrow heads make them fit 128 x 128 pixels and two cores. A
            bottleneck of convolutions after every block (its Sec. 3, "cross-window propagation"),
            small batches and a short warm-up suit a training from nothing that sees few images.
Schedule    15000 images = 3750 iterations x 4, cosine, warm-up 200 iterations
"""

from detectron2.config import LazyCall as L

from vitdet.data.augment import fixed_resize
from vitdet.data.shapes import shapes_dataset
from vitdet.optim import Cosine

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_vitdet import model
from ..common.training import optimizer, train

model.backbone.net.update(
    img_size=128,
    patch_size=8,
    embed_dim=96,
    depth=4,
    num_heads=3,
    drop_path_rate=0.0,
    window_size=8,
    global_block_indexes=[1, 3],
    residual_block_indexes=[0, 1, 2, 3],
    pretrain_img_size=128,
    pretrain_use_cls_token=False,
    attention_backend="eager",  # at 64 and 256 tokens faster than torch's fused kernel on a CPU
)
model.backbone.update(
    out_channels=64, scale_factors=[2.0, 1.0, 0.5], top_block=None, square_pad=128
)

_levels, _strides = ["p2", "p3", "p4"], [4, 8, 16]
_rpn = model.proposal_generator
_rpn.in_features = _levels
_rpn.head.update(in_channels=64, num_anchors=2, conv_dims=[-1])
_rpn.anchor_generator.update(
    sizes=[[12, 18], [28, 40], [60, 88]], aspect_ratios=[1.0], strides=_strides, offset=0.5
)
_rpn.update(batch_size_per_image=64, pre_nms_topk=[100, 300], post_nms_topk=[64, 100])

_heads = model.roi_heads
_heads.update(num_classes=6, batch_size_per_image=32, positive_fraction=0.375)
_heads.box_in_features = _heads.mask_in_features = _levels
for _pooler in (_heads.box_pooler, _heads.mask_pooler):
    _pooler.scales = [1 / stride for stride in _strides]
    _pooler.sampling_ratio = 1  # samples a cell; the adaptive number is slow on a CPU
_heads.box_head.update(conv_dims=[], fc_dims=[256, 256])
_heads.box_head.input_shape.channels = _heads.mask_head.input_shape.channels = 64
_heads.box_predictor.input_shape.channels = 256
_heads.mask_head.conv_dims = [32, 32, 32]

_root = "datasets/shapes"
dataloader.train.update(total_batch_size=4, num_workers=0)
dataloader.train.dataset = L(shapes_dataset)(root=_root, split="train", num_images=4000, size=128)
dataloader.train.mapper.augmentations = L(fixed_resize)(height=128, width=128, flip=True)
dataloader.test.update(batch_size=8, num_workers=1)
dataloader.test.dataset = L(shapes_dataset)(root=_root, split="val", num_images=200, size=128)
dataloader.test.mapper.augmentations = L(fixed_resize)(height=128, width=128)

optimizer.update(lr=7e-4, weight_decay=0.05)
schedule = L(Cosine)(num_images=15000, warmup=200 * 4, warmup_factor=0.001)
train.update(
    output_dir="output/shapes",
    precision="auto",
    num_images=15000,
    reference_batch=4,
    checkpoint_every=5000,
    eval_every=0,
    keep_checkpoints=2,
    clip_grad_norm=1.0,
    ddp=dict(gradient_as_bucket_view=True),
)
