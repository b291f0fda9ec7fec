"""Data, optimizer and schedule of Vision Longformer detectors: 1x, 800 pixels, 16 images a step.

Source: microsoft/VisionLongformerForObjectDetection, configs/ and README. All durations are in
images. Norms, biases and positions decay like everything else. The 3x recipes change the length and
draw the shorter side from 640 to 800 pixels.
"""

from detectron2.config import LazyCall as L

from vitdet.data.augment import resize_shortest_edge
from vitdet.optim import MultiStep, adamw

from .data.coco import dataloader
from .train import train

BATCH = 16

dataloader.train.total_batch_size = BATCH
dataloader.train.mapper.update(
    augmentations=L(resize_shortest_edge)(size=[800], max_size=1333, flip=True),
    mask_format="polygon",
    recompute_boxes=False,
)
dataloader.test.mapper.augmentations = L(resize_shortest_edge)(size=800, max_size=1333)

optimizer = L(adamw)(
    lr=1e-4,
    betas=[0.9, 0.999],
    weight_decay=0.05,
    weight_decay_norm=None,
    no_decay=[],
    layer_decay_rate=None,
    lr_multipliers=None,
)

schedule = L(MultiStep)(
    num_images=90_000 * BATCH,
    milestones=[60_000 * BATCH, 80_000 * BATCH],
    warmup=1000 * BATCH,
    warmup_factor=0.01,
    gamma=0.1,
)

train.update(
    num_images=90_000 * BATCH,
    reference_batch=BATCH,
    checkpoint_every=5000 * BATCH,
    eval_every=7330 * BATCH,
    clip_grad_norm=0.5,  # of the whole model's gradient; RetinaNet: 1.0
    ddp=dict(fp16_compression=False),
)
