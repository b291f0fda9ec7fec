"""Optimizer groups and schedules. The published lr tables are checked in tests/golden."""

import inspect

import pytest
from torch import nn

from vitdet.backbones.vit import ViT
from vitdet.optim import Constant, Cosine, MultiStep, adamw, parameter_table
from vitdet.utils.checks import InputError


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = ViT(
            img_size=32, embed_dim=8, depth=2, num_heads=1, residual_block_indexes=[0]
        )
        self.head = nn.Linear(8, 3)


def test_frozen_parameters_are_left_out_and_every_other_is_in_one_group():
    model = Detector()
    model.backbone.patch_embed.requires_grad_(False)
    optimizer = adamw(model, lr=0.01, weight_decay=0.2, layer_decay_rate=0.5)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        assert group["initial_lr"] == group["lr"] == 0.01 * group["lr_multiplier"]


QKV, FC1, AFTER = "blocks.1.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.0.residual"
AFTER += ".conv1.weight"  # a propagation block, after the layers


@pytest.mark.parametrize(
    ("rules", "expected"),  # of pos_embed, the first and last block, what is after them, the head
    [
        (
            {"layer_decay_rate": 0.5, "backbone_lr_multiplier": 0.1, "pyramid_lr_multiplier": 3.0}
            | {"head_lr_multiplier": 4.0},
            (0.1 * 0.5**3, 0.1 * 0.25, 0.1 * 0.5, 3.0, 4.0),
        ),
        # StreamPETR's released configs: backbone x 0.1, head x 1, no layers
        ({"backbone_lr_multiplier": 0.1}, (0.1, 0.1, 0.1, 1.0, 1.0)),
        # the rate may count other layers: above the full rate, as published once, or below it
        ({"layer_decay_rate": 0.5, "num_layers": 0}, (0.5, 1.0, 2.0, 1.0, 1.0)),
        ({"layer_decay_rate": 0.5, "num_layers": 4}, (0.5**5, 0.5**4, 0.5**3, 1.0, 1.0)),
        # the last expression that is found counts; 0 leaves a parameter as it is
        (
            {"lr_multipliers": {"backbone": 0.1, r"blocks\.1\.": 0.5, "pos": 0.0}}
            | {"layer_decay_rate": 0.5},
            (0.0, 0.1 * 0.25, 0.5 * 0.5, 0.1, 1.0),
        ),
    ],
)
def test_lr_multipliers(rules, expected):
    table = parameter_table(Detector(), **rules)
    names = [*(f"backbone.{name}" for name in ("pos_embed", FC1, QKV, AFTER)), "head.weight"]
    assert [table[name].lr_multiplier for name in names] == pytest.approx(expected)


def test_a_backbone_of_another_name_without_layers():
    model = nn.Sequential()
    model.add_module("img_backbone", nn.Linear(2, 2))
    model.add_module("img_backbone_neck", nn.Linear(2, 2))
    found = parameter_table(model, backbone="img_backbone", backbone_lr_multiplier=0.1)
    assert [setting.lr_multiplier for setting in found.values()] == [0.1, 0.1, 1.0, 1.0]


def test_rules_of_weight_decay_in_their_order():
    decay = {
        name: setting.weight_decay
        for name, setting in parameter_table(
            Detector(),
            weight_decay=0.3,
            weight_decay_norm=0.2,
            weight_decay_vectors=0.1,
            no_decay=[r"blocks\.1\..*fc1", "embed$"],
        ).items()
    }
    assert decay["backbone.blocks.0.attn.qkv.weight"] == 0.3
    assert decay["backbone.blocks.0.norm1.weight"] == 0.1  # a vector too
    assert decay["backbone.blocks.0.attn.qkv.bias"] == decay["head.bias"] == 0.1
    assert decay["backbone.blocks.1.mlp.fc1.weight"] == decay["backbone.pos_embed"] == 0.0
    assert decay["backbone.patch_embed.proj.weight"] == 0.3
    norms = parameter_table(Detector(), weight_decay=0.3, weight_decay_norm=0.2)
    assert norms["backbone.blocks.0.norm1.weight"].weight_decay == 0.2


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"no_decay": ["norm("]}, r"optimizer\.no_decay: expected regular .*, got 'norm\('"),
        ({"lr_multipliers": {"*": 1.0}}, r"optimizer\.lr_multipliers: expected regular"),
        (
            {"backbone": "trunk", "head_lr_multiplier": 4.0},
            r"optimizer\.backbone: expected one of backbone, head, got 'trunk'",
        ),
        (
            {"backbone": "head", "layer_decay_rate": 0.7},
            r"optimizer\.layer_decay_rate: Linear has no layer_id\(\) and num_layers",
        ),
    ],
)
def test_wrong_rules(rules, text):
    with pytest.raises(InputError, match=text):
        parameter_table(Detector(), **rules)


def test_adamw_takes_every_rule_of_the_table():
    model, rules = Detector(), {"head_lr_multiplier": 4.0, "weight_decay_vectors": 0.0}
    rules |= {"layer_decay_rate": 0.9, "num_layers": 3, "lr_multipliers": {"patch": 0.5}}
    optimizer = adamw(model, lr=0.01, **rules)
    table = parameter_table(model, **rules)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        assert group["lr"] == pytest.approx(0.01 * table[name].lr_multiplier)
        assert group["weight_decay"] == table[name].weight_decay
    assert "layer_decay_rate" in inspect.signature(adamw).parameters  # for overrides and --help
    with pytest.raises(InputError, match=r"optimizer\.model: expected the detector"):
        adamw()


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (
            MultiStep(100, [60, 80], warmup=10),
            {0: 0.001, 5: 0.5005, 10: 1, 59: 1, 60: 0.1, 79: 0.1, 80: 0.01, 100: 0.01},
        ),
        (MultiStep(100, []), {0: 1, 100: 1}),
        (Cosine(110, warmup=10, warmup_factor=0.1), {0: 0.1, 5: 0.55, 10: 1, 60: 0.5, 110: 0}),
        (Constant(100, warmup=10, warmup_factor=0.1), {0: 0.1, 5: 0.55, 10: 1, 60: 1, 100: 1}),
        # ViT-H of COCO: its warm-up is a fraction inherited from a longer training
        (
            MultiStep(138281, [122916, 133159], warmup=250 / 184375 * 138281),
            {100: 0.5338, 188: 1, 122915: 1, 122916: 0.1, 133158: 0.1, 133159: 0.01},
        ),
    ],
)
def test_schedules_by_hand(schedule, points):
    length = max(points) if max(points) < 1000 else 138281
    for images, rate in points.items():
        assert schedule(images / length) == pytest.approx(rate, abs=1e-4 * rate + 1e-12), images


@pytest.mark.parametrize(
    ("schedule", "arguments", "text"),
    [
        (MultiStep, {"milestones": [80, 60]}, r"growing numbers up to 100, .* got \[80, 60\]"),
        (MultiStep, {"milestones": [60, 120]}, r"up to 100, the images of its training, got"),
        (MultiStep, {"milestones": [60], "warmup": 101}, "at most the 100 images .* got 101"),
        (Cosine, {"warmup": -1}, r"warmup: expected at most the 100 images .* got -1\."),
    ],
)
def test_wrong_schedules(schedule, arguments, text):
    with pytest.raises(InputError, match=text):
        schedule(num_images=100, **arguments)
