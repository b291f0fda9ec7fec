"""Layer-wise lr decay and weight decay equal the published tables, parameter by parameter."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from torch import nn

from tests.recipes import rows
from vitdet.backbones.eva02 import EVA02ViT
from vitdet.config import build_model, load_config
from vitdet.convert.formats import FORMATS
from vitdet.convert.names import find_names
from vitdet.optim import parameter_table
from vitdet.pyramid import SimpleFeaturePyramid

from .build import given, global_blocks
from .cases import PROJECT, discover, folders, read_info
from .vil import stage_arguments

ROOTS = folders()
NAMES = [
    pytest.param(root, name, id=name)
    for root in ROOTS
    for name in discover(root)
    if name.startswith("lr_decay/")
]


@dataclass
class Table:
    """A model, the arguments of `parameter_table`, and {published name: ours} where they differ.

    `recipe` is the project's recipe with the published optimizer, where there is one; `published`
    are arguments of the optimizer that the table itself does not depend on.
    """

    model: nn.Module
    arguments: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)
    recipe: DictConfig | None = None
    published: dict[str, Any] = field(default_factory=dict)


# --- detectron2 and EVA-02 ---------------------------------------------------------------------


def _recipe(name):
    return load_config(PROJECT / f"configs/{name}.py")


def _vitdet(config, _):
    published = Path(config["config_file"])
    named = [  # the sources of rows tell which published config they are
        f"{family}/{name}"
        for family in ("COCO", "LVIS", "O365")
        for name, row in rows(family).items()
        if re.search(rf"\b{published.stem}\.py", row.source)
    ]
    cfg = _recipe(*(named or [f"{published.parent.name}/{published.stem}"]))
    _put_sizes(cfg, config["depth"], config["embed_dim"])
    cfg.model.backbone.net.global_block_indexes = global_blocks(config, "window_block_indexes")
    arguments = {
        "layer_decay_rate": config["lr_decay_rate"],
        "weight_decay": config["weight_decay"],
        "weight_decay_norm": config["weight_decay_norm"],
        "no_decay": list(config["overrides"]),
    }
    more = {"lr": config["base_lr"], "betas": config["betas"]}
    return Table(build_model(cfg.model, "meta"), arguments, {}, cfg, more)


def _pe_det(config, keys):
    table = _vitdet(config, keys)
    table.names.update(_our_names(table.model, "pe", keys))
    return table


def _our_names(model, source_format, keys):
    target = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = find_names(FORMATS[source_format], dict.fromkeys(keys, ()), target, "the table")
    return {key: names.in_model(names.of_file(key)[0]) or key for key in keys}


def _put_sizes(cfg, depth, width):
    net = cfg.model.backbone.net
    net.depth, net.embed_dim = depth, width
    net.num_heads = 1  # names do not depend on it, and it divides every width
    if "checkpoint_blocks" in net:
        net.checkpoint_blocks = []


# --- MMDetection's families --------------------------------------------------------------------


def _mmdet(cfg, rules, source_format, config, keys):
    model = build_model(cfg.model, "meta")
    ours = _our_names(model, source_format, keys)
    rules |= {"weight_decay": config["weight_decay"], "weight_decay_norm": None}
    return Table(model, rules, ours, cfg, {"lr": config["base_lr"]})


def _vit(cfg, options):
    """Put the sizes of a case into the recipe's ViT or ViTAE-B; return its depth."""
    net, depth = cfg.model.backbone.net, options["depth"]
    _put_sizes(cfg, depth, options["embed_dim"])
    interval = options.get("interval", 3)
    blocks = [i for i in range(depth) if (i + 1) % interval == 0]
    if "window_block_indexes" in options:
        blocks = global_blocks(options, "window_block_indexes")
    conv = bool(net.get("residual_block_indexes"))
    net.global_block_indexes = [] if conv else blocks
    if conv:
        net.residual_block_indexes = blocks
    return depth


def _vitae(config, keys):
    options, rule = config["backbone"], config["paramwise_cfg"]
    num_layers = rule["num_layers"]
    if "token_dims" in options:
        cfg = _recipe("vitae/mask_rcnn_vitae_s_100ep")
        net = cfg.model.backbone.net
        net.embed_dims, net.token_dims = options["embed_dims"], options["token_dims"]
        net.depths = options.get("NC_depth", list(net.depths))
        net.num_heads, net.groups = options["NC_heads"], options["NC_group"]
        net.global_block_indexes = options.get("globalBlock", list(net.global_block_indexes))
        natural = sum(net.depths) + len(net.depths)
    else:
        kind = "vitae" if any(".PCM." in key for key in keys) else "vit"
        cfg = _recipe(f"vitae/mask_rcnn_{kind}_b_100ep")
        natural = _vit(cfg, options)
    rules = {
        "layer_decay_rate": rule["layer_decay_rate"],
        "num_layers": None if num_layers == natural else num_layers,
        "weight_decay_vectors": 0.0,
        "no_decay": ["pos_embed", "cls_token", "rel_pos_"],
    }
    return _mmdet(cfg, rules, "vitae", config, keys)


def _easycv(config, keys):
    """Build a detector of EasyCV, or of before v0.7, whose rule knows no layers."""
    options, rule = config["backbone"], config["paramwise_options"]
    old = "num_layers" not in rule
    kind = f"vit_b_v06_{options.get('aggregation', 'attn')}" if old else "vitdet_b"
    cfg = _recipe(f"easycv/mask_rcnn_{kind}_100ep")
    _vit(cfg, options)
    rules = {"layer_decay_rate": None if old else rule["layer_decay_rate"]}
    rules |= {"no_decay": list(cfg.optimizer.no_decay)}
    return _mmdet(cfg, rules, "easycv_old" if old else "easycv", config, keys)


def _mmdet3(config, keys):
    cfg = _recipe("mmdetection/mask_rcnn_vitdet_b_100ep")
    _vit(cfg, config["backbone"])
    rules = {"layer_decay_rate": config["paramwise_cfg"]["decay_rate"]}
    rules |= {"no_decay": list(cfg.optimizer.no_decay)}
    return _mmdet(cfg, rules, "mmdet3", config, keys)


# --- StreamPETR and the Vision Longformer ------------------------------------------------------


class _Head(nn.Module):
    """The head of the case: one parameter of each kind."""

    def __init__(self):
        super().__init__()
        self.query_embed = nn.Embedding(2, 2)
        self.fc = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


def _streampetr(config, keys):
    """Build a backbone and a head as StreamPETR names them.

    The published constructor names a group after the layer alone. Where the backbone holds the
    pyramid, the pyramid's parameters and the head's share a group, and the rate is that of the one
    that was registered first. Here both have a multiplier of their own.
    """
    rule, options = config["paramwise_cfg"], config["backbone"]
    names = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
    names += ("qkv_bias", "window_size", "global_window_size", "pretrain_img_size")
    arguments = given(options, *names, rope_pretrain_grid="pt_hw_seq_len")
    arguments["global_block_indexes"] = global_blocks(options, "window_block_indexes")
    net = EVA02ViT(**arguments)
    if options["sim_fpn"] is not None:
        levels = options["sim_fpn"]
        scales, channels = levels["scale_factors"], levels["out_channels"]
        net = SimpleFeaturePyramid(
            net, out_channels=channels, scale_factors=scales, downsample="conv"
        )
    order, detector = config["registration_order"], nn.Module()
    for name in order:
        detector.add_module(name, {"img_backbone": net, "pts_bbox_head": _Head()}[name])
    head, after = rule["head_decay_rate"], 1.0
    if isinstance(net, SimpleFeaturePyramid):
        head = after = 1.0 if order[0] == "img_backbone" else head
    rules = {
        "backbone": "img_backbone",
        "layer_decay_rate": rule["decay_rate"],
        "num_layers": rule["num_layers"],
        "head_lr_multiplier": head,
        "pyramid_lr_multiplier": after,
        "weight_decay": config["weight_decay"],
        "weight_decay_norm": None,
        "weight_decay_vectors": 0.0,
        "no_decay": [],
    }
    # The published names count the levels from 2; ours are named after their stride.
    text = " ".join(name for name, _ in detector.named_parameters())
    finest = min((int(level) for level in re.findall(r"simfp_(\d)", text)), default=2)
    root = "img_backbone.net." if isinstance(net, SimpleFeaturePyramid) else "img_backbone."

    def ours(key):
        level = re.match(r"img_backbone\.adapter\.simfp_(\d)(.*)", key)
        if level:
            return f"img_backbone.simfp_{int(level[1]) + finest - 2}{level[2]}"
        return re.sub(r"^img_backbone\.", root, key)

    return Table(detector, rules, {key: ours(key) for key in keys})


def _vil(config, _):
    """Build a detector with the stages of the case, and the classifier that ours leave out."""
    file = config["config_file"]
    cfg = _recipe(f"vil/{'retinanet' if 'retina' in file else 'mask_rcnn'}_vil_small_3x")
    fpn, vit = cfg.model.backbone, cfg.model.backbone.bottom_up
    kinds = ("srformer", "performer", "linformer")
    attn_type = next((kind for kind in kinds if kind in file), "longformerhand")
    vit.update(stage_arguments(config["ARCH"], attn_type, "gformer" in file))
    fpn.in_features = list(vit.out_features)
    vit.update(num_classes=1000, out_features=[*vit.out_features, "head"])
    multipliers = config["LR_MULTIPLIERS"]
    rules = {
        "weight_decay": config["WEIGHT_DECAY"],
        "weight_decay_norm": None,
        "no_decay": [],
        "lr_multipliers": {re.escape(part): value for part, value in multipliers.items()},
    }
    return Table(build_model(cfg.model, "meta"), rules)


# tables of optimizers that no recipe of this project has: backbones for another project, ...
WITHOUT_RECIPE = (
    "streampetr_*",
    # The recipe has the depth of the training log.
    "vitae_vitdet_vitae_s",
    "vitae_vitdet_vitae_s_published_depth",
    # The recipes have the weight decay of the README, the table that of the YAML file.
    "vil_*",
)

# name of a table after "lr_decay/", as in fnmatch: how it is built
TABLES = {
    "detectron2_*": _vitdet,
    "eva02_*": _vitdet,
    "pe_det_*": _pe_det,
    "streampetr_*": _streampetr,
    "vitae_vitdet_*": _vitae,
    "easycv_*": _easycv,
    "mmdet3_*": _mmdet3,
    "vil_*": _vil,
}


@pytest.mark.parametrize(("root", "name"), NAMES)
def test_table_and_the_optimizer_of_the_recipe(root, name):
    info = read_info(root, name)
    assert info["columns"] == ["lr multiplier", "weight decay"]
    builder = next(TABLES[key] for key in TABLES if fnmatch.fnmatchcase(name[9:], key))
    left_out = info.get("not_in_optimizer", [])
    table = builder(info["config"], [*info["table"], *left_out])
    found = parameter_table(table.model, **table.arguments)
    stored = {table.names.get(key, key): value for key, value in info["table"].items()}
    assert len(stored) == len(info["table"])
    assert sorted(found) == sorted(stored)
    frozen = {key for key, _ in table.model.named_parameters()} - found.keys()
    assert frozen == {table.names.get(key, key) for key in left_out}
    wrong = {
        key: f"got {list(found[key])}, stored {value}"
        for key, value in stored.items()
        if list(found[key]) != pytest.approx(value, rel=1e-9)
    }
    assert not wrong
    if not any(fnmatch.fnmatchcase(name[9:], pattern) for pattern in WITHOUT_RECIPE):
        assert table.recipe is not None
        for key, value in (table.arguments | table.published).items():
            assert table.recipe.optimizer[key] == value, key
