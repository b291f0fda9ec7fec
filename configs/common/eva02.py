"""What the EVA-02 recipes share beside the model: rules of the optimizer, sizes, inference.

Source: baaivision/EVA, EVA-02/det, projects/ViTDet/configs and README. Every parameter decays, also
norms, biases and positions. The names of the inference recipe are those of the published commands,
so `model.roi_heads.use_soft_nms=true model.roi_heads.maskness_thresh=0.5` works here too.
"""

from copy import deepcopy

from omegaconf import DictConfig

from vitdet.heads import CascadeROIHeads

from .optim import optimizer
from .schedule import schedule
from .train import train

optimizer.weight_decay_norm = None
optimizer.no_decay = []


def plain_nms(roi_heads: DictConfig) -> DictConfig:
    """Return `roi_heads` (a cascade) as they are, with the switches of `vitdet.heads`."""
    heads = deepcopy(roi_heads)
    heads._target_ = CascadeROIHeads
    return heads


def soft_nms(
    roi_heads: DictConfig,
    override_score_thresh: float | None = None,
    maskness_thresh: float | None = None,
) -> DictConfig:
    """Return `roi_heads` (a cascade) with the inference recipe of the system-level rows."""
    heads = plain_nms(roi_heads)
    heads.update(
        use_soft_nms=True,
        class_wise=True,
        method="linear",
        iou_threshold=0.6,
        override_score_thresh=override_score_thresh,
        maskness_thresh=maskness_thresh,
    )
    for predictor in heads.box_predictors:
        # The published soft-NMS returns all, whatever is asked for; COCO counts 100 a class, LVIS
        # 300 or 1000 an image.
        predictor.test_topk_per_image = 1000
    return heads


def set_image_size(dataloader: DictConfig, model: DictConfig, size: int) -> None:
    """Make data and model work at `size` x `size` pixels."""
    dataloader.train.mapper.augmentations.size = size
    dataloader.test.mapper.augmentations.update(size=size, max_size=size)
    model.backbone.net.img_size = model.backbone.square_pad = size
