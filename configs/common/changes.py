"""What recipes of COCO and LVIS change: backbone and its size, cascade, classes, length.

Lengths are detectron2's (projects/ViTDet): 118000 images of COCO or 100000 of LVIS, 64 a step. The
cuts lie at 88.9 % and 96.3 % of the training; the warm-up is the share 250 / 184375 of 100 epochs
of COCO where detectron2 keeps that share, else 250 iterations.
"""

from types import SimpleNamespace

from .eva02 import plain_nms, set_image_size, soft_nms
from .models.cascade import cascade
from .models.cascade_mask_rcnn_eva02 import _large as _eva02_large
from .models.cascade_mask_rcnn_eva02 import model as _eva02
from .models.lvis import lvis_heads
from .models.mask_rcnn_mvit import model as _mvit
from .models.mask_rcnn_swin import model as _swin
from .rows import Change, steps

COCO_100 = steps(184375, 163889, 177546)
COCO_75 = steps(138281, 122916, 133159, warmup=187.5)
COCO_50 = steps(92187, 81944, 88773, warmup=125)
LVIS_100 = steps(156250, 138889, 150463)
LVIS_50 = steps(78125, 69444, 75231)
COCO_EPOCHS = {100: COCO_100, 75: COCO_75, 50: COCO_50}


def vit_l(parts: SimpleNamespace) -> None:
    """ViT-L for ViT-B."""
    net = parts.model.backbone.net
    net.update(embed_dim=1024, depth=24, num_heads=16, drop_path_rate=0.4)
    net.global_block_indexes = [5, 11, 17, 23]
    parts.optimizer.layer_decay_rate = 0.8


def vit_h(parts: SimpleNamespace) -> None:
    """ViT-H for ViT-B; unlike those, the published runs decay norms and positions too."""
    net = parts.model.backbone.net
    net.update(embed_dim=1280, depth=32, num_heads=16, drop_path_rate=0.5)
    net.global_block_indexes = [7, 15, 23, 31]
    parts.optimizer.update(layer_decay_rate=0.9, weight_decay_norm=None, no_decay=[])


def swin(lr: float, **size: object) -> Change:
    """Swin-B, or another size, with a feature pyramid network (Mask R-CNN)."""

    def change(parts: SimpleNamespace) -> None:
        parts.model = _swin
        _swin.backbone.bottom_up.update(size)
        parts.optimizer.update(lr=lr, weight_decay=0.05, layer_decay_rate=None)
        parts.optimizer.no_decay = ["relative_position_bias_table"]

    return change


def mvit(lr: float, **size: object) -> Change:
    """MViTv2-B, or another size, with a feature pyramid network (Mask R-CNN)."""

    def change(parts: SimpleNamespace) -> None:
        parts.model = _mvit
        _mvit.backbone.bottom_up.update(size)
        parts.optimizer.update(lr=lr, layer_decay_rate=None)

    return change


def cascaded(parts: SimpleNamespace) -> None:
    """Three box heads in a row."""
    parts.model.roi_heads = cascade(parts.model.roi_heads)


def lvis(parts: SimpleNamespace) -> None:
    """1203 classes with federated loss, rare ones repeated, 300 detections an image."""
    train, test = parts.dataloader.train, parts.dataloader.test
    train.dataset.name, train.repeat_threshold = "lvis_v1_train", 0.001
    test.dataset.name, parts.dataloader.evaluator.max_dets = "lvis_v1_val", 300
    parts.model.roi_heads = lvis_heads(parts.model.roi_heads)
    parts.train.eval_every = 30000 * 64


def eva02_b(parts: SimpleNamespace) -> None:
    """EVA-02-B with a cascade; every parameter decays, also norms, biases and positions."""
    parts.model = _eva02
    parts.optimizer.update(layer_decay_rate=0.7, weight_decay_norm=None, no_decay=[])


def eva02_l(parts: SimpleNamespace) -> None:
    """EVA-02-L for EVA-02-B."""
    eva02_b(parts)
    _eva02.backbone.net.update(_eva02_large)
    parts.optimizer.layer_decay_rate = 0.8


def head_to_head(parts: SimpleNamespace) -> None:
    """Plain NMS, at 1024 pixels."""
    parts.model.roi_heads = plain_nms(parts.model.roi_heads)


def system(blocks: list[int], window: int, recomputed: bool = False, **nms: float) -> Change:
    """1536 pixels, more global blocks, and the inference recipe of EVA-02's system-level rows."""

    def change(parts: SimpleNamespace) -> None:
        set_image_size(parts.dataloader, parts.model, 1536)
        net = parts.model.backbone.net
        net.update(window_size=window, global_block_indexes=blocks)
        net.checkpoint_blocks = list(range(net.depth)) if recomputed else []
        parts.model.roi_heads = soft_nms(parts.model.roi_heads, **nms)

    return change
