"""What recipes for your own data share: two annotation files in COCO's format, given by name."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from vitdet.data.augment import large_scale_jitter, resize_shortest_edge
from vitdet.data.datasets import coco_dataset


def own_data(
    dataloader: DictConfig, size: int, min_scale: float = 0.1, max_scale: float = 2.0
) -> None:
    """Read any annotation files, at `size` x `size` pixels with large-scale jitter.

    vitdet train fills in what is open: the files, the batch, the length.
    """
    for part in (dataloader.train, dataloader.test):
        part.dataset = L(coco_dataset)(json="???", images="???", check="error")
    dataloader.train.mapper.augmentations = L(large_scale_jitter)(
        size=size, min_scale=min_scale, max_scale=max_scale, flip=True
    )
    dataloader.test.mapper.augmentations = L(resize_shortest_edge)(size=size, max_size=size)


def set_batch(
    dataloader: DictConfig, optimizer: DictConfig, train: DictConfig, batch: int, lr: float
) -> None:
    """Set the images a step, and the learning rate that is for them."""
    dataloader.train.total_batch_size = train.reference_batch = batch
    optimizer.lr = lr


def boxes_only(model: DictConfig, dataloader: DictConfig) -> None:
    """Turn Mask R-CNN into Faster R-CNN: no mask head, and no masks are read."""
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        model.roi_heads.pop(key)
    dataloader.train.mapper.use_masks = False
