"""What recipes of COCO and LVIS change: backbone and its size, cascade, classes, length.

Lengths are detectron2's (projects/ViTDet): 118000 images of COCO or 100000 of LVIS, 64 a step. The
cuts lie at 88.9 % and 96.3 % of the training; the warm-up is the share 250 / 184375 of 100 epochs
of COCO where detectron2 keeps that share, else 250 iterations.
"""

from types import SimpleNamespace

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from vitdet.data.datasets import federated_loss_weights
from vitdet.heads import CascadeROIHeads
from vitdet.optim import Constant

from .models.cascade import cascade
from .models.cascade_mask_rcnn_eva02 import model as _eva02
from .models.mask_rcnn_fpn import mvit as _mvit
from .models.mask_rcnn_fpn import swin as _swin
from .rows import Change, steps

COCO_100 = steps(184375, 163889, 177546)
COCO_75 = steps(138281, 122916, 133159, warmup=187.5)
COCO_50 = steps(92187, 81944, 88773, warmup=125)
LVIS_100 = steps(156250, 138889, 150463)
THIRDS = [2, 5, 8, 11, 14, 17, 20, 23]  # every third of 24 blocks
LVIS_50 = steps(78125, 69444, 75231)
SWIN_L_SIZE = dict(embed_dim=192, num_heads=[6, 12, 24, 48])
MVIT_L_SIZE = dict(
    embed_dim=144, depth=48, num_heads=2, drop_path_rate=0.5, last_block_indexes=[1, 7, 43, 47]
)
MVIT_H_SIZE = dict(
    embed_dim=192, depth=80, num_heads=3, drop_path_rate=0.6, last_block_indexes=[3, 11, 71, 79]
)


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


def pe_g(parts: SimpleNamespace) -> None:
    """Perception Encoder G; Spatial has LayerScale too. Every parameter decays.

    facebookresearch/perception_models, apps/detection/projects/ViTDet: positions and rotary
    positions are those of the encoder's 32 x 32 places, on the map tiled and stretched.
    """
    net = parts.model.backbone.net
    net.update(embed_dim=1536, depth=50, num_heads=16, mlp_ratio=8960 / 1536, drop_path_rate=0.5)
    net.update(patch_bias=False, pre_norm=True, norm_eps=1e-5, rope="pe", rope_pretrain_grid=32)
    net.update(pretrain_img_size=512, pretrain_use_cls_token=False, pos_embed_resize="tile")
    net.update(window_size=32, global_block_indexes=[12, 24, 36, 49], use_rel_pos=False)
    net.checkpoint_blocks = list(range(50))
    parts.model.update(pixel_mean=[127.0] * 3, pixel_std=[127.0] * 3)
    parts.optimizer.update(lr=5e-5, weight_decay=0.1, layer_decay_rate=0.9)
    parts.optimizer.update(weight_decay_norm=None, no_decay=[])


def swin(lr: float, **size: object) -> Change:
    """Swin-B, or another size, with a feature pyramid network (Mask R-CNN)."""
    decay = dict(weight_decay=0.05, no_decay=["relative_position_bias_table"])
    return _fpn(_swin, size, lr=lr, **decay)


def mvit(lr: float, **size: object) -> Change:
    """MViTv2-B, or another size, with a feature pyramid network (Mask R-CNN)."""
    return _fpn(_mvit, size, lr=lr)


def _fpn(model: DictConfig, size: dict, **rules: object) -> Change:
    def change(parts: SimpleNamespace) -> None:
        parts.model = model
        model.backbone.bottom_up.update(size)
        parts.optimizer.update(layer_decay_rate=None, **rules)

    return change


def cascaded(parts: SimpleNamespace) -> None:
    """Three box heads in a row."""
    parts.model.roi_heads = cascade(parts.model.roi_heads)


def boxes_only(parts: SimpleNamespace) -> None:
    """Faster R-CNN for Mask R-CNN: no mask head."""
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        parts.model.roi_heads.pop(key)


def lvis(parts: SimpleNamespace) -> None:
    """1203 classes, rare ones repeated (arXiv 1908.03195), 300 detections above a score of 0.02.

    Federated loss: "Probabilistic two-stage detection" (arXiv 2103.07461), sigmoid cross entropy
    over the classes present and up to 50 drawn ones, with probability (images of the class) ** 0.5.
    """
    train, test = parts.dataloader.train, parts.dataloader.test
    train.dataset.name, train.repeat_threshold = "lvis_v1_train", 0.001
    test.dataset.name, parts.dataloader.evaluator.max_dets = "lvis_v1_val", 300
    parts.train.eval_every = 30000 * 64
    heads = parts.model.roi_heads
    heads.num_classes = 1203
    for predictor in heads.get("box_predictors") or [heads.box_predictor]:
        predictor.update(test_score_thresh=0.02, test_topk_per_image=300)
        predictor.update(use_sigmoid_ce=True, use_fed_loss=True)
        predictor.get_fed_loss_cls_weights = L(federated_loss_weights)(
            dataset="lvis_v1_train", freq_power=0.5
        )


def image_size(parts: SimpleNamespace, size: int) -> None:
    """Make data and model work at `size` x `size` pixels."""
    data, backbone = parts.dataloader, parts.model.backbone
    data.train.mapper.augmentations.size = size
    data.test.mapper.augmentations.update(size=size, max_size=size)
    backbone.net.img_size = backbone.square_pad = size


# --- EVA-02 (baaivision/EVA, EVA-02/det, projects/ViTDet/configs and README) ---------------------


def eva02_b(parts: SimpleNamespace) -> None:
    """EVA-02-B with a cascade; every parameter decays, also norms, biases and positions."""
    parts.model = _eva02
    parts.model.roi_heads._target_ = CascadeROIHeads  # has switches for soft-NMS and maskness
    parts.optimizer.update(layer_decay_rate=0.7, weight_decay_norm=None, no_decay=[])


def eva02_l(parts: SimpleNamespace) -> None:
    """EVA-02-L for EVA-02-B."""
    eva02_b(parts)
    _eva02.backbone.net.update(embed_dim=1024, depth=24, num_heads=16, drop_path_rate=0.4)
    _eva02.backbone.net.global_block_indexes = [5, 11, 17, 23]
    parts.optimizer.layer_decay_rate = 0.8


def eva02_steps(images: int, lr: float, iterations: int, every: int = 5000) -> Change:
    """`images` a step, cuts at 80 % and 90 %, saved and evaluated every `every` iterations."""
    cuts = (iterations * 8 // 10, iterations * 9 // 10)

    def change(parts: SimpleNamespace) -> None:
        parts.optimizer.lr = lr
        parts.dataloader.train.total_batch_size = parts.train.reference_batch = images
        parts.train.checkpoint_every = parts.train.eval_every = every * images
        steps(iterations, *cuts, batch=images, warmup=1000)(parts)

    return change


def averaged(iterations: int, max_dets: int = 100) -> Change:
    """Go on from Objects365 at a constant rate, with a moving average that is evaluated."""

    def change(parts: SimpleNamespace) -> None:
        length, train = iterations * 64, parts.train
        parts.model.backbone.net.drop_path_rate = 0.3
        parts.optimizer.lr = 4e-5
        parts.dataloader.evaluator.max_dets = max_dets
        train.update(num_images=length, ema_decay=0.9999, eval_weights="ema")
        train.checkpoint_every = train.eval_every = 5000 * 64
        parts.schedule = L(Constant)(num_images=length, warmup=length // 100, warmup_factor=0.001)

    return change


def system(blocks: list[int], window: int, **nms: float) -> Change:
    """1536 pixels, more global blocks, and the inference recipe of the system-level rows.

    Its names are those of the published commands. ViT-L recomputes every block in training.
    """

    def change(parts: SimpleNamespace) -> None:
        image_size(parts, 1536)
        net = parts.model.backbone.net
        net.update(window_size=window, global_block_indexes=blocks)
        net.checkpoint_blocks = list(range(24)) if net.depth == 24 else []
        heads = parts.model.roi_heads
        heads.update(use_soft_nms=True, class_wise=True, method="linear", iou_threshold=0.6)
        heads.update({"override_score_thresh": None, "maskness_thresh": None} | nms)
        for predictor in heads.box_predictors:
            # The published soft-NMS returns all, whatever is asked for; COCO counts 100 a class,
            # LVIS 300 or 1000 an image.
            predictor.test_topk_per_image = 1000

    return change
