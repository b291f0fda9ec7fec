"""What the ablations of ViTDet change (arXiv 2203.16527, Sec. 4.1): pyramid, propagation, start.

Nobody published configs for these tables. Each function changes a recipe's nodes in place. "blocks"
are numbers from 0.
"""

from omegaconf import DictConfig

from vitdet.heads import CascadeROIHeads


def placed(depth: int, where: str, count: int) -> list[int]:
    """Return `count` of `depth` blocks: "even" (the last of each equal part), "first" or "last"."""
    if where == "even":
        return [(i + 1) * depth // count - 1 for i in range(count)]
    first = {"first": 0, "last": depth - count}[where]
    return list(range(first, first + count))


def as_ablated(model: DictConfig) -> None:
    """Take the relative positions away, as in Tables 1 to 4 and 8."""
    model.backbone.net.use_rel_pos = False


# --- pyramid (Table 1, Fig. 2) ---------------------------------------------------------------


def no_pyramid(model: DictConfig) -> None:
    """Leave one level, of the backbone's stride; the anchors of all levels stand on it."""
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


def fpn_last_map(model: DictConfig) -> None:
    """Make a feature pyramid network over maps that all come from the last one (Fig. 2b)."""
    model.backbone.top_down = True


def fpn_stages(model: DictConfig) -> None:
    """Make a feature pyramid network over the maps after equal parts of the blocks (Fig. 2a).

    As many parts as levels: four in the paper.
    """
    net = model.backbone.net
    blocks = placed(net.depth, "even", len(model.backbone.scale_factors))[:-1]
    net.out_block_indexes = blocks
    model.backbone.in_feature = [f"block{i}" for i in blocks] + ["last_feat"]
    model.backbone.top_down = True


# --- propagation (Tables 2 and 8) ------------------------------------------------------------


def no_propagation(model: DictConfig) -> None:
    """Leave windows only."""
    model.backbone.net.global_block_indexes = []


def convolutions(model: DictConfig, kind: str, blocks: list[int] | None = None) -> None:
    """Put blocks of convolutions where the global blocks were, or after `blocks`."""
    net = model.backbone.net
    net.residual_block_indexes = blocks or net.global_block_indexes
    net.global_block_indexes = []
    net.propagation, net.propagation_norm = kind, "LN"


def shifted_windows(model: DictConfig) -> None:
    """Shift the windows of every second block by half a window, as Swin does."""
    net = model.backbone.net
    net.global_block_indexes = []
    net.shifted_block_indexes = list(range(1, net.depth, 2))


def global_blocks(model: DictConfig, where: str, count: int) -> None:
    """Place `count` global blocks."""
    net = model.backbone.net
    net.global_block_indexes = placed(net.depth, where, count)


# --- start (Tables 4, 10 and 11) -------------------------------------------------------------


def epochs(train: DictConfig, schedule: DictConfig, count: int) -> None:
    """Train for `count` epochs where a recipe has 100, with the cuts at the same shares."""

    def share(images: int) -> int:
        return images // 64 * count // 100 * 64  # whole iterations of 64 images

    train.num_images = schedule.num_images = share(train.num_images)
    schedule.milestones = [share(milestone) for milestone in schedule.milestones]


def from_scratch(
    train: DictConfig, schedule: DictConfig, optimizer: DictConfig, count: int
) -> None:
    """Start from random weights: lr 1.6e-4, weight decay 0.2, no layer-wise decay (Table 11)."""
    train.init_checkpoint = ""
    optimizer.lr, optimizer.weight_decay, optimizer.layer_decay_rate = 1.6e-4, 0.2, None
    epochs(train, schedule, count)


def from_supervised(train: DictConfig, schedule: DictConfig, optimizer: DictConfig) -> None:
    """Start from supervised weights: 0.8 times the lr, half the epochs, no layer-wise decay.

    On COCO that is 8e-5 and 50 epochs (Table 11).
    """
    optimizer.lr, optimizer.layer_decay_rate = 0.8 * optimizer.lr, None
    epochs(train, schedule, 50)


# --- system level (Tables 6 and 7) -----------------------------------------------------------


def system_level(model: DictConfig, dataloader: DictConfig, size: int = 1280) -> None:
    """Train and evaluate a cascade at `size` pixels, and evaluate with linear soft-NMS from 0.5."""
    model.backbone.net.img_size = size
    model.backbone.square_pad = size
    dataloader.train.mapper.augmentations.size = size
    test = dataloader.test.mapper.augmentations
    test.size, test.max_size = size, size
    model.roi_heads._target_ = CascadeROIHeads
    model.roi_heads.update(use_soft_nms=True, method="linear", iou_threshold=0.5)
