"""Vision Longformer (arXiv 2103.15358) on COCO with a feature pyramid network. One row, one recipe.

    python train_net.py --config-file configs/vil/mask_rcnn_vil_small_1x.py --num-gpus 8

Source: microsoft/VisionLongformerForObjectDetection, README, with the YAML file that a row names in
its configs/; Tables 6 and 7 of the paper, and Sec. 4.4 for other kinds of attention. Images are 800
pixels at most 1333 long; 3x recipes draw the shorter side from 640 to 800 in training. 1x: 90000
iterations x 16 images = 12 x 118000, lr / 10 at 60000 and 80000; 3x: 270000, 180000 and 240000;
warm-up 1000 iterations from 0.01. Training starts from the ImageNet classifier of
vision-longformer, through converter.py. Norms, biases and positions decay like everything else:
weight decay 0.05 and drop path are those of the README, its YAML files have 0.0001 and 0.0; Mask
R-CNN's lr 2.5e-4 in 1x is that of the YAML files, 3x files have 1e-4.

A row counts parameters without the classifier that published backbones keep and nothing uses: 0.38
M in ViL-Tiny, 0.77 M in the others. The README counts absolute positions where the models have
relative ones; its GFLOPs, in the notes, are multiply-adds at 800 x 1344 without the products of the
sliding chunks and the mask head.
"""

from types import SimpleNamespace

from detectron2.config import LazyCall as L

from vitdet.data.augment import resize_shortest_edge
from vitdet.optim import MultiStep, adamw

from .common.data.coco import dataloader
from .common.models.mask_rcnn_vil import model
from .common.models.retinanet_vil import model as _retinanet
from .common.rows import Change, Recipes, Row, net, steps
from .common.rows import optimizer as rates
from .common.train import train

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

TINY = dict(embed_dim=[48, 96, 192, 384], depth=[1, 1, 9, 1], num_heads=[1, 3, 3, 6])
SMALL = dict(embed_dim=[96, 192, 384, 768], depth=[1, 2, 8, 1], num_heads=[3, 3, 6, 12])
MEDIUM = SMALL | dict(depth=[1, 4, 16, 1])
BASE = SMALL | dict(depth=[1, 8, 24, 1])
START = "the ImageNet classifier of vision-longformer"


def retinanet(parts: SimpleNamespace) -> None:
    """RetinaNet for Mask R-CNN."""
    parts.model = _retinanet
    parts.dataloader.train.mapper.use_masks = False
    parts.train.clip_grad_norm = 1.0


def times_3(parts: SimpleNamespace) -> None:
    """3x: three times as long, at several sizes."""
    steps(270_000, 180_000, 240_000, batch=BATCH, warmup=1000)(parts)
    parts.dataloader.train.mapper.augmentations.size = [640, 672, 704, 736, 768, 800]


def size(values: dict, drop_path: float, *changes: Change) -> tuple[Change, ...]:
    """Return the changes of a size of ViL."""
    return (*changes, net(**values, drop_path_rate=drop_path))


def mask_1x(values: dict, drop_path: float) -> tuple[Change, ...]:
    """Return the changes of a Mask R-CNN in 1x."""
    return size(values, drop_path, rates(lr=2.5e-4))


def other(attention: list[str], drop_path: float = 0.1, **values: object) -> tuple[Change, ...]:
    """Return the changes of ViL-Small with absolute positions and another attention, in 1x."""
    positions = dict(use_abs_pos=[True] * 4, attention=attention)
    return mask_1x(SMALL | positions | values, drop_path)


# box AP and drop path of 1x, of 3x, million parameters; the YAML file of 1x evaluates Python code
RETINANETS = {
    "tiny": (TINY, "40.8", 0.05, "43.6", 0.1, 16.22),  # 182.7 G
    "small": (SMALL, "44.2", 0.1, "45.9", 0.2, 34.83),  # 254.8 G
    "medium_d": (MEDIUM, "46.8", 0.2, "47.9", 0.3, 49.96),  # 330.4 G
    "base_d": (BASE, "47.8", 0.3, "48.6", 0.3, 65.98),  # 420.9 G
}
MASK, RETINA = "msvit_maskrcnn_fpn_", "msvit_retina_fpn_"
ROWS = {
    "mask_rcnn_vil_tiny_1x": Row(
        "41.4/38.1", 26.43, f"{MASK}1x_tiny_sparse.yaml", mask_1x(TINY, 0.05), START, "145.6 G"
    ),
    "mask_rcnn_vil_small_1x": Row(
        "44.9/41.1", 44.17, f"{MASK}1x_small_sparse.yaml", mask_1x(SMALL, 0.2), START, "218.3 G"
    ),
    "mask_rcnn_vil_medium_d_1x": Row(
        "47.6/43.0", 59.29, f"{MASK}1x_medium_sparse.yaml", mask_1x(MEDIUM, 0.2), START, "293.8 G"
    ),
    "mask_rcnn_vil_base_d_1x": Row(
        "48.6/43.6", 75.31, f"{MASK}1x_large_sparse.yaml", mask_1x(BASE, 0.3), START, "384.4 G"
    ),
    "mask_rcnn_vil_tiny_3x": Row(
        "44.2/40.6", 26.43, f"{MASK}3xms_tiny_sparse.yaml", size(TINY, 0.1, times_3), START
    ),
    "mask_rcnn_vil_small_3x": Row(
        "47.1/42.7", 44.17, f"{MASK}3xms_small_sparse.yaml", size(SMALL, 0.2, times_3), START,
        "its example command has weight decay 0.1 and drop path 0.2",
    ),
    "mask_rcnn_vil_medium_d_3x": Row(
        "48.9/44.2", 59.29, f"{MASK}3xms_medium_sparse.yaml", size(MEDIUM, 0.3, times_3), START,
        "the YAML file has full attention with relative positions in stage 4 (s0, a0), which stops "
        "at every input but 1344 x 1344; the row has sliding chunks",
    ),
    "mask_rcnn_vil_base_d_3x": Row(
        "49.6/44.5", 75.31, f"{MASK}3xms_large_sparse.yaml", size(BASE, 0.3, times_3), START
    ),
    # ViL-Small with absolute positions and another attention; memory and GFLOPs of the README
    "mask_rcnn_srformer64_small_1x": Row(
        "36.4/34.6", 72.56, f"{MASK}1x_srformer64_small_sparse.yaml",
        other(["srformer"] * 4, attention_size=[16, 8, 4, 2]), START,
        "spatial reduction 64; 7.1 GB, 224.1 G. The README links the YAML file of reduction 32 to "
        "this row, and the other way round",
    ),
    "mask_rcnn_srformer32_small_1x": Row(
        "39.9/37.3", 50.73, f"{MASK}1x_srformer32_small_sparse.yaml",
        other(["srformer", "srformer", "srformer", "full"], attention_size=[8, 4, 2, 1]), START,
        "spatial reduction 32; 13.6 GB, 268.3 G. Stage 4, where the reduction would be 1, has full "
        "attention",
    ),
    "mask_rcnn_srformer32_partial_small_1x": Row(
        "42.4/39.0", 46.02, f"{MASK}1x_srformer32_small.yaml",
        other(["srformer", "srformer", "full", "full"], attention_size=[8, 4, 2, 1]), START,
        "spatial reduction 32, full attention in stages 3 and 4; 22.6 GB, 352.1 G",
    ),
    "mask_rcnn_global_small_1x": Row(
        "34.8/33.4", 44.47, f"{MASK}1x_gformer_small_sparse.yaml",
        other(["only_global"] * 4, num_global_tokens=[256, 256, 64, 16]), START,
        "global tokens only; 7.6 GB, 226.4 G",
    ),
    "mask_rcnn_global_partial_small_1x": Row(
        "42.5/39.2", 44.39, f"{MASK}1x_gformer_small.yaml",
        other(["only_global", "only_global", "full", "full"], num_global_tokens=[256, 256, 1, 0]),
        START,
        "global tokens only, full attention in stages 3 and 4; 20.1 GB, 326.5 G. The YAML file has "
        "384 channels in stage 4, hence 38.8 M parameters; the README has 45.1 M, hence 768 "
        "channels. 256 global tokens in stages 1 and 2 give 45.16 M and 333.8 G; 64 would give "
        "45.05 M and 328.6 G, closer to its row",
    ),
    "mask_rcnn_performer_small_1x": Row(
        "36.1/34.3", 44.25, f"{MASK}1x_performer_small_sparse.yaml",
        other(["performer"] * 4, attention_size=[256] * 4), START,
        "performer; 8.4 GB, 251.5 G. The published code never draws the random features again",
    ),
    "mask_rcnn_performer_partial_small_1x": Row(
        "42.3/39.1", 44.25, f"{MASK}1x_performer_small.yaml",
        other(["performer", "performer", "full", "full"], 0.05, attention_size=[256] * 4), START,
        "performer, full attention in stages 3 and 4; 20.0 GB, 343.7 G. Random features as above",
    ),
    "mask_rcnn_vil_ape_small_1x": Row(
        "42.9/39.6", 44.25, f"{MASK}1x_small_sparse.yaml", other(["vil"] * 4), START,
        "7.4 GB, 218.3 G. No YAML file has absolute positions and sliding chunks in all stages; "
        "the README links the one of the row below",
    ),
    "mask_rcnn_vil_ape_partial_small_1x": Row(
        "43.3/39.8", 44.25, f"{MASK}1x_small.yaml", other(["vil", "vil", "full", "full"]), START,
        "full attention in stages 3 and 4; 19.5 GB, 326.8 G. The README links small_sparse.yaml to "
        "this row, and this file to the one above",
    ),
}  # fmt: skip
for name, (values, ap, drop_path, ap_3x, drop_path_3x, millions) in RETINANETS.items():
    once, thrice = (
        size(values, drop_path, retinanet),
        size(values, drop_path_3x, retinanet, times_3),
    )
    ROWS[f"retinanet_vil_{name}_1x"] = Row(ap, millions, f"{RETINA}1x.yaml", once, START)
    ROWS[f"retinanet_vil_{name}_3x"] = Row(ap_3x, millions, f"{RETINA}3x_ms.yaml", thrice, START)
recipes = Recipes(ROWS, "coco", globals())
