"""Tiny versions of every backbone, propagation and pyramid of the recipes learn a few pictures."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.utils.events import EventStorage
from tiny_recipe import SIZE, detector_node, draw
from torch import nn

from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import ViTAES
from vitdet.config import build_model, load_config
from vitdet.engine.losses import DetectorLoss
from vitdet.optim import adamw
from vitdet.utils.env import seed_all

STEPS = 14
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def vitae_b(node):
    node.backbone.net = L(ViTAE)(
        img_size=SIZE, embed_dim=32, depth=2, num_heads=2, window_size=2, global_block_indexes=[1]
    )


def vitae_s(node):
    node.backbone.net = L(ViTAES)(
        **dict(img_size=SIZE, embed_dims=[8, 8, 16], token_dims=[16, 16, 32], depths=[0, 0, 2]),
        **dict(num_heads=[1, 1, 2], groups=[1, 1, 8], window_size=2, global_block_indexes=[1]),
    )


def changed(net, **pyramid):
    def change(node):
        node.backbone.net.update(net)
        node.backbone.update(pyramid)

    return change


def convolutions(kind, norm):
    blocks = {"global_block_indexes": [], "residual_block_indexes": [0, 1]}
    return changed({**blocks, "propagation": kind, "propagation_norm": norm})


def no_pyramid(node):
    node.backbone.update(scale_factors=[1.0], top_block=None)
    rpn, heads = node.proposal_generator, node.roi_heads
    rpn.in_features = heads.box_in_features = heads.mask_in_features = ["p4"]
    rpn.anchor_generator.update(sizes=[[8, 16, 32, 48, 64]], strides=[16])
    rpn.head.num_anchors = 15
    heads.box_pooler.scales = heads.mask_pooler.scales = [1 / 16]


STAGES = {"depth": 4, "global_block_indexes": [3], "out_block_indexes": [0, 1, 2]}
FIRST_EASYCV = {"halve_channels": False, "norm": "GN1", "norm_eps": 1e-5}
FIRST_EASYCV |= {"upsample_norm": "LN", "upsample_norm_eps": 1e-6}
VARIANTS = {
    "vitae_b": vitae_b,
    "vitae_s": vitae_s,
    "naive": convolutions("naive", "LN"),
    "basic": convolutions("basic", "LN"),
    "bottleneck": convolutions("bottleneck", "LN"),
    "basic with BatchNorm": convolutions("basic", "BN"),
    "shifted": changed({"global_block_indexes": [], "shifted_block_indexes": [1]}),
    "no pyramid": no_pyramid,
    "fpn, last map": changed({}, top_down=True),
    "fpn, four stages": changed(
        STAGES, in_feature=["block0", "block1", "block2", "last_feat"], top_down=True
    ),
    "first EasyCV": changed({"final_norm": True}, **FIRST_EASYCV),
}


def learn(model):
    """Train on two pictures; return the losses. Every weight of the backbone must move."""
    named = {n: p for n, p in model.named_parameters() if ".net." in n and p.requires_grad}
    before = {name: value.detach().clone() for name, value in named.items()}
    optimizer = adamw(model, lr=3e-3, weight_decay=0.01, layer_decay_rate=0.9)
    loss, batch = DetectorLoss(model.train(), seed=3), [draw(2), draw(5)]
    found = []
    with EventStorage(0):
        for _ in range(STEPS):
            total = torch.stack(list(loss(batch).values())).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            # RetinaNet's losses are over a running mean of the objects in a batch.
            found.append(total.item() * getattr(model, "loss_normalizer", 1.0))
    still = [name for name, value in named.items() if torch.equal(value, before[name])]
    assert still == []
    return found


def finds_something(model):
    with torch.no_grad():
        (out,) = model.eval()([draw(2)])
    assert out["instances"].scores.isfinite().all()
    return len(out["instances"]) > 0


QUICK = ("vitae_b", "basic", "shifted", "no pyramid")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in VARIANTS],
)
def test_variant_learns(name):
    seed_all(0)
    node = detector_node()
    VARIANTS[name](node)
    model = build_model(node)
    statistics = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    losses = learn(model)
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0]
    assert all(m.num_batches_tracked == STEPS for m in statistics)
    assert bool(statistics) is (name.startswith("vitae") or "BatchNorm" in name)
    assert finds_something(model)


def test_retinanet_learns():
    seed_all(0)
    node = load_config(CONFIGS / "paper/fig5_retinanet_b.py").model
    node.backbone = detector_node().backbone
    backbone = node.backbone
    backbone.scale_factors = [2.0, 1.0, 0.5]
    backbone.top_block = L(LastLevelP6P7)(in_channels=32, out_channels=32, in_feature="p5")
    node.update(num_classes=2, test_score_thresh=0.0)
    node.head.update(input_shape=[L(ShapeSpec)(channels=32)] * 5, conv_dims=[32], num_anchors=3)
    node.anchor_generator.sizes = [[8], [16], [32], [48], [64]]
    model = build_model(node)
    losses = learn(model)
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0]
    assert finds_something(model)
