"""COCO 2017 with large-scale jitter 0.1-2.0 at 1024 pixels, 64 images a step.

Order in training: flip, resize to 1024 x (0.1 to 2.0), crop to at most 1024 x 1024 (the model pads
with zeros after normalisation), boxes taken again from the cut masks. Evaluation: longer side to
1024, one image at a time. mapper.fast gives detectron2's boxes and masks and, but for rounding and
much reduced JPEG images, its pixels; train.mapper.fast=False gives them to the bit. Files under
DETECTRON2_DATASETS, as detectron2 lays them out.
"""

from detectron2.config import LazyCall as L

from vitdet.data.augment import large_scale_jitter, resize_shortest_edge
from vitdet.data.datasets import named_dataset
from vitdet.data.loaders import build_test_loader, build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.evaluation import CocoEvaluator

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(named_dataset)(name="coco_2017_train"),
        mapper=L(Mapper)(
            augmentations=L(large_scale_jitter)(size=1024, min_scale=0.1, max_scale=2.0, flip=True),
            is_train=True,
            image_format="RGB",
            use_masks=True,
            mask_format="bitmask",
            recompute_boxes=True,
            fast=True,
        ),
        total_batch_size=64,
        num_workers=4,
        seed="${train.seed}",
        repeat_threshold=None,
        filter_empty=True,
    ),
    test=L(build_test_loader)(
        dataset=L(named_dataset)(name="coco_2017_val"),
        mapper=L(Mapper)(
            augmentations=L(resize_shortest_edge)(size=1024, max_size=1024),
            is_train=False,
            image_format="RGB",
        ),
        batch_size=1,
        num_workers=4,
    ),
    evaluator=L(CocoEvaluator)(dataset="${..test.dataset}", max_dets=100),
)
