"""alibaba/EasyCV's ViTDet on COCO, both generations. One row is one recipe.

    python train_net.py --config-file configs/easycv/mask_rcnn_vitdet_b_100ep.py
        --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT

Source: its configs/detection/vitdet, which rows name. 100 epochs of the 117266 images of train2017
that have an object, fp16; lr / 10 after 88 and 96 epochs, warm-up 250 iterations of 64 from 0.001,
layer-wise lr decay 0.7. No weight decay on norms and positions of the backbone; all else decays,
norms of pyramid and heads too (core/optimizer/layer_decay_optimizer_constructor.py). MAE's weights
are those of 1600 epochs.
"""

from types import SimpleNamespace

from .common.changes import boxes_only, cascaded
from .common.data.coco import dataloader
from .common.mmdet import optimizer, schedule, train
from .common.models.mask_rcnn_easycv import before_v07, model
from .common.rows import Change, Recipes, Row

train.precision = "fp16"
optimizer.no_decay = [r"^backbone\.net\..*norm", "pos_embed"]
optimizer.layer_decay_rate = 0.7


def v06(aggregation: str) -> Change:
    """v0.6: one lr everywhere, no weight decay on biases, positions, and blocks' norms.

    The published rule is a search for "norm" or "bias" in names. The norms of pyramid, heads and
    propagation blocks are called gn, ln and bn there, so their weights decay.
    """

    def change(parts: SimpleNamespace) -> None:
        before_v07(parts.model, aggregation)
        parts.optimizer.layer_decay_rate = None
        parts.optimizer.no_decay = [
            r"^backbone\.net\.(blocks\.\d+\.)?norm\d?\.",
            r"bias",
            "pos_embed",
        ]
        parts.schedule.warmup_factor = 0.067

    return change


def stages(parts: SimpleNamespace) -> None:
    """MMDetection's losses of RPN and cascade, proposals, anchors and deltas."""
    rpn, heads = parts.model.proposal_generator, parts.model.roi_heads
    rpn.update(anchor_boundary_thresh=0, post_nms_topk=[2000, 1000], smooth_l1_beta=1 / 9)
    for stage, weight in zip(heads.box_predictors, (1.0, 0.5, 0.25), strict=True):
        stage.update(smooth_l1_beta=1.0, loss_weight=weight)
    last = heads.box_predictors[2].box2box_transform
    last.weights = [1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067]


RELU = (
    "no AP and no weights; the block ends with a ReLU, so what leaves it is never negative, and a "
    'new one is no identity; with propagation_norm="LN" it has no such ReLU and is one'
)
ROWS = {
    "mask_rcnn_vitdet_b_100ep": Row(
        "50.65/45.41", 110.90, "v0.7, vitdet_mask_rcnn.py",
        note="4 x 8 GPUs, 2 images each: 13.3 GB; inference 138 ms an image on a V100. Their pull "
        "request 177 explains the 1 AP below detectron2 by MMDetection's Mask R-CNN, which is "
        "weaker on ResNet-50 too",
    ),
    "faster_rcnn_vitdet_b_100ep": Row(
        "", 108.25, "v0.7, vitdet_faster_rcnn.py", (boxes_only,),
        note="masks are read to take boxes again after the crop, and used for nothing else",
    ),
    "cascade_mask_rcnn_vitdet_b_100ep": Row(
        "", 141.16, "v0.7, vitdet_cascade_mask_rcnn.py", (cascaded, stages),
        note="as published: smooth L1 (1/9 in the RPN, 1 in the box heads), 2000 proposals in "
        "training, no anchors that leave the image, losses of the stages weighted 1, 1/2, 1/4, "
        "deltas of the third stage scaled by 0.033 and 0.067. Unlike published: one mask head, "
        "detectron2's, where MMDetection has one for each stage",
    ),
    "mask_rcnn_vit_b_v06_attn_100ep": Row(
        "50.57/44.96", 118.56, 'before v0.7, vitdet_100e.py, "attn"; 50.6/45.0 in their article',
        (v06("attn"),),
        note="8 x 8 GPUs, 1 image each: 59 h; inference 163 ms an image on a V100",
    ),
    "mask_rcnn_vit_b_v06_conv_100ep": Row(
        "", 139.75, "before v0.7, vitdet_conv_100e.py", (v06("conv"),), note=RELU
    ),
    "mask_rcnn_vit_b_v06_basicblock_100ep": Row(
        "", 160.99, "before v0.7, vitdet_basicblock_100e.py", (v06("basicblock"),), note=RELU
    ),
    "mask_rcnn_vit_b_v06_bottleneck_100ep": Row(
        "", 121.03, "before v0.7, vitdet_bottleneck_100e.py", (v06("bottleneck"),), note=RELU
    ),
}  # fmt: skip
recipes = Recipes(ROWS, "easycv", globals())
