"""Your own images: any json in COCO's format. One row is one recipe; `vitdet train` chooses one.

    python train_net.py --config-file configs/own/mask_rcnn_vitdet_b.py
        dataloader.train.dataset.json=TRAIN.json dataloader.train.dataset.images=FOLDER
        dataloader.test.dataset.json=VAL.json dataloader.test.dataset.images=FOLDER

Class names and their number come from the json. train.epochs=N makes a training N rounds of the
data, and its schedule keeps its shape. Training starts from a backbone or a detector that
converter.py wrote; train.init_checkpoint= with nothing behind it starts from random weights.
"""

from types import SimpleNamespace

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.data.augment import large_scale_jitter, resize_shortest_edge
from vitdet.data.datasets import coco_dataset
from vitdet.heads import StandardROIHeads
from vitdet.optim import Cosine

from .common.changes import boxes_only, image_size, vit_l
from .common.data.coco import dataloader
from .common.models.mask_rcnn_vitdet import model
from .common.rows import Change, Recipes, Row
from .common.training import optimizer, schedule, train
from .mini.mask_rcnn_vitdet_coco_mini import SIZE as TINY
from .mini.mask_rcnn_vitdet_coco_mini import dataloader as _tiny_data
from .mini.mask_rcnn_vitdet_coco_mini import model as _tiny
from .mini.mask_rcnn_vitdet_coco_mini import optimizer as _tiny_optimizer
from .mini.mask_rcnn_vitdet_coco_mini import schedule as _tiny_schedule
from .mini.mask_rcnn_vitdet_coco_mini import train as _tiny_train

SMALL, LIGHT = 512, 320  # pixels


def own_data(data: DictConfig, size: int, min_scale: float = 0.1, max_scale: float = 2.0) -> None:
    """Read any annotation files, at `size` x `size` pixels with large-scale jitter.

    `vitdet train` fills in what is open: the files, the batch, the length.
    """
    for part in (data.train, data.test):
        part.dataset = L(coco_dataset)(json="???", images="???", check="error")
    data.train.mapper.augmentations = L(large_scale_jitter)(
        size=size, min_scale=min_scale, max_scale=max_scale, flip=True
    )
    data.test.mapper.augmentations = L(resize_shortest_edge)(size=size, max_size=size)


def training(images: int, lr: float, **values: object) -> Change:
    """16 images a step, `images` in all."""

    def change(parts: SimpleNamespace) -> None:
        parts.dataloader.train.total_batch_size = parts.train.reference_batch = 16
        parts.optimizer.update(lr=lr, layer_decay_rate=0.7)
        parts.train.update(
            output_dir="output/own",
            precision="auto",
            num_images=images,
            checkpoint_every=10000,
            eval_every=10000,
            **values,
        )

    return change


def vit_b(parts: SimpleNamespace) -> None:
    """The recipe of COCO at a length for small data sets: 3125 iterations x 16.

    lr / 10 at 80 % and 95 %; lr 2.5e-5 = 1e-4 x 16 / 64, the linear rule.
    """
    own_data(parts.dataloader, 1024)
    training(50000, 1e-4 * 16 / 64)(parts)
    parts.schedule.update(num_images=50000, milestones=[40000, 47500], warmup=250 * 16)


def vit_s(parts: SimpleNamespace) -> None:
    """The ViT-S of DINOv2 and others at 512 pixels: 2500 iterations x 16."""
    parts.model.backbone.square_pad = SMALL
    # 32 x 32 tokens are four windows of 16, and nothing is padded
    parts.model.backbone.net.update(img_size=SMALL, embed_dim=384, num_heads=6, window_size=16)
    own_data(parts.dataloader, SMALL)
    training(40000, 1e-4, clip_grad_norm=1.0)(parts)
    parts.schedule = L(Cosine)(num_images=40000, warmup=250 * 16, warmup_factor=0.001)


def light(parts: SimpleNamespace) -> None:
    """The same ViT-S for a machine without a GPU: 320 pixels, narrow heads, 1000 iterations x 4.

    20 x 20 tokens are few enough for global attention in every block, as in the pretraining. What
    costs most in `vit_s` is a quarter here: pyramid and RPN (128 channels), the box head (128
    regions, two fully connected layers). Anchors are half as large, as the objects are.
    """
    vit_s(parts)
    image_size(parts, LIGHT)
    backbone, heads = parts.model.backbone, parts.model.roi_heads
    rpn = parts.model.proposal_generator
    backbone.out_channels = rpn.head.in_channels = 128
    backbone.net.update(window_size=0, global_block_indexes=[], use_rel_pos=False)
    rpn.head.conv_dims = [-1]
    rpn.anchor_generator.sizes = [[16], [32], [64], [128], [256]]
    rpn.update(batch_size_per_image=128, pre_nms_topk=[500, 500], post_nms_topk=[300, 300])
    heads.batch_size_per_image = 128
    heads.box_head.update(conv_dims=[], fc_dims=[512, 512])
    heads.box_head.input_shape.channels = 128
    heads.box_predictor.input_shape.channels = 512
    if "mask_head" in heads:
        heads.mask_head.update(conv_dims=[128] * 4)
        heads.mask_head.input_shape.channels = 128
    parts.dataloader.train.mapper.augmentations.update(min_scale=0.5, max_scale=1.5)
    parts.dataloader.train.update(total_batch_size=4, num_workers=1)
    # few steps: what is new learns fast, the backbone slowly (lr 5e-4 for all spoiled a DINOv2)
    parts.optimizer.update(lr=4e-4, layer_decay_rate=0.8, backbone_lr_multiplier=0.1)
    parts.train.update(num_images=4000, reference_batch=4, checkpoint_every=1000, eval_every=1000)
    parts.train.update(log_every=10)
    parts.schedule.update(num_images=4000, warmup=100 * 4)


def tiny(parts: SimpleNamespace) -> None:
    """Blocks of mini/mask_rcnn_eva02_shapes.py, wider and six, in mini's model of real photographs.

    1000 iterations x 8, cosine, warm-up 100 iterations; every parameter decays, as in EVA-02.
    """
    parts.model, parts.dataloader, parts.optimizer = _tiny, _tiny_data, _tiny_optimizer
    parts.schedule, parts.train = _tiny_schedule, _tiny_train
    _tiny.backbone.net = L(EVA02ViT)(
        img_size=TINY,
        patch_size=16,
        embed_dim=192,
        depth=6,
        num_heads=6,
        mlp_ratio=4 * 2 / 3,
        drop_path_rate=0.0,
        rope_pretrain_grid=16,
        window_size=8,
        global_block_indexes=[2, 5],
        residual_block_indexes=[0, 1, 2, 3, 4, 5],
        pretrain_img_size=TINY,
        pretrain_use_cls_token=False,
        out_feature="last_feat",
    )
    _tiny.roi_heads._target_ = StandardROIHeads  # with the switches for soft-NMS and maskness
    own_data(_tiny_data, TINY, min_scale=0.5, max_scale=1.5)
    _tiny_data.train.num_workers = 2
    _tiny_optimizer.update(weight_decay_norm=None, no_decay=[])
    _tiny_train.update(output_dir="output/own", eval_every=2000)


def no_masks(parts: SimpleNamespace) -> None:
    """Read no masks."""
    parts.dataloader.train.mapper.use_masks = False


SIZES = {  # parameters of 80 classes with and without masks, in millions
    "eva02_tiny": (tiny,),
    "vitdet_s": (vit_s,),
    "vitdet_s_light": (light,),
    "vitdet_b": (vit_b,),
    "vitdet_l": (vit_b, vit_l),
}
ROWS = {
    f"{kind}_rcnn_{size}": Row("", 0, "this project", (*changes, *boxes), start="")
    for kind, boxes in (("mask", ()), ("faster", (boxes_only, no_masks)))
    for size, changes in SIZES.items()
}
recipes = Recipes(ROWS, "own", globals())
