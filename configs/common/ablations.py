"""What the tables of ViTDet change (arXiv 2203.16527, Sec. 4.1): pyramid, propagation, start.

Each function is a change of a row (`rows.py`). "blocks" are numbers from 0.
"""

from types import SimpleNamespace

from vitdet.heads import CascadeROIHeads

from .changes import image_size
from .rows import Change, net


def placed(depth: int, where: str, count: int) -> list[int]:
    """Return `count` of `depth` blocks: "even" (the last of each equal part), "first" or "last"."""
    if where == "even":
        return [(i + 1) * depth // count - 1 for i in range(count)]
    first = {"first": 0, "last": depth - count}[where]
    return list(range(first, first + count))


as_ablated = net(use_rel_pos=False)  # Tables 1 to 4 and 8


# --- pyramid (Table 1, Fig. 2) ---------------------------------------------------------------


def no_pyramid(parts: SimpleNamespace) -> None:
    """Leave one level, of the backbone's stride; the anchors of all levels stand on it."""
    model = parts.model
    stride = model.backbone.net.patch_size
    level = f"p{stride.bit_length() - 1}"
    model.backbone.scale_factors = [1.0]
    model.backbone.top_block = None
    rpn, heads = model.proposal_generator, model.roi_heads
    anchors = rpn.anchor_generator
    anchors.sizes = [[size for sizes in anchors.sizes for size in sizes]]
    anchors.strides = [stride]
    rpn.in_features = [level]
    rpn.head.num_anchors = len(anchors.sizes[0]) * len(anchors.aspect_ratios)
    heads.box_in_features = heads.mask_in_features = [level]
    heads.box_pooler.scales = heads.mask_pooler.scales = [1 / stride]


def fpn_last_map(parts: SimpleNamespace) -> None:
    """Make an FPN over maps that all come from the last one (Fig. 2b)."""
    parts.model.backbone.top_down = True


def fpn_stages(parts: SimpleNamespace) -> None:
    """Make an FPN over the maps after equal parts of the blocks, as many as levels (Fig. 2a)."""
    backbone = parts.model.backbone
    blocks = placed(backbone.net.depth, "even", len(backbone.scale_factors))[:-1]
    backbone.net.out_block_indexes = blocks
    backbone.in_feature = [f"block{i}" for i in blocks] + ["last_feat"]
    backbone.top_down = True


# --- propagation (Tables 2 and 8) ------------------------------------------------------------


no_propagation = net(global_block_indexes=[])  # windows only


def convolutions(kind: str) -> Change:
    """Put blocks of convolutions where the global blocks were."""

    def change(parts: SimpleNamespace) -> None:
        node = parts.model.backbone.net
        node.residual_block_indexes, node.global_block_indexes = node.global_block_indexes, []
        node.propagation, node.propagation_norm = kind, "LN"

    return change


def shifted_windows(parts: SimpleNamespace) -> None:
    """Shift the windows of every second block by half a window, as Swin does."""
    node = parts.model.backbone.net
    node.global_block_indexes, node.shifted_block_indexes = [], list(range(1, node.depth, 2))


def global_blocks(where: str, count: int) -> Change:
    """Place `count` global blocks."""

    def change(parts: SimpleNamespace) -> None:
        node = parts.model.backbone.net
        node.global_block_indexes = placed(node.depth, where, count)

    return change


# --- start (Tables 4, 10 and 11) -------------------------------------------------------------


def epochs(count: int) -> Change:
    """Train for `count` epochs where a recipe has 100, with the cuts at the same shares."""

    def share(images: int) -> int:
        return images // 64 * count // 100 * 64  # whole iterations of 64 images

    def change(parts: SimpleNamespace) -> None:
        schedule = parts.schedule
        parts.train.num_images = schedule.num_images = share(schedule.num_images)
        schedule.milestones = [share(milestone) for milestone in schedule.milestones]

    return change


def from_scratch(count: int) -> Change:
    """Start from random weights: lr 1.6e-4, weight decay 0.2, no layer-wise decay (Table 11)."""

    def change(parts: SimpleNamespace) -> None:
        parts.train.init_checkpoint = ""
        parts.optimizer.update(lr=1.6e-4, weight_decay=0.2, layer_decay_rate=None)
        epochs(count)(parts)

    return change


def from_supervised(parts: SimpleNamespace) -> None:
    """Start from supervised weights: 0.8 times the lr, half the epochs, no layer-wise decay.

    On COCO that is 8e-5 and 50 epochs (Table 11).
    """
    parts.optimizer.update(lr=0.8 * parts.optimizer.lr, layer_decay_rate=None)
    epochs(50)(parts)


# --- system level (Tables 6 and 7) -----------------------------------------------------------


def system_level(parts: SimpleNamespace, size: int = 1280) -> None:
    """Train and evaluate a cascade at `size` pixels, and evaluate with linear soft-NMS from 0.5.

    Of soft-NMS the paper says no kind and no threshold.
    """
    image_size(parts, size)
    parts.model.roi_heads._target_ = CascadeROIHeads
    parts.model.roi_heads.update(use_soft_nms=True, method="linear", iou_threshold=0.5)
