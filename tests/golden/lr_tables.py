"""Which function builds the model and the optimizer's arguments of which lr_decay table.

A family adds its own function to TABLES, from its own module. Published names that differ from
ours are given in `Table.names`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.config import build_model, load_config
from vitdet.pyramid import SimpleFeaturePyramid

from . import lr_mmdet, lr_vil
from .cases import PROJECT, Options, UnsupportedCase
from .lr_table import Table

# --- detectron2 and EVA-02 ---------------------------------------------------------------------

_EVA02 = "cascade_mask_rcnn_eva02"
# file name of a published config: recipe of this project, where the two differ
RECIPES = {
    "eva2_coco_cascade_mask_rcnn_vitdet_b_4attn_1024_lrd0p7": f"COCO/{_EVA02}_b_bsl",
    "eva2_coco_cascade_mask_rcnn_vitdet_l_4attn_1024_lrd0p8": f"COCO/{_EVA02}_l_bsl",
    "eva2_coco_cascade_mask_rcnn_vitdet_b_6attn_win32_1536_lrd0p7": f"COCO/{_EVA02}_b_sys",
    "eva2_coco_cascade_mask_rcnn_vitdet_l_8attn_win32_1536_lrd0p8": f"COCO/{_EVA02}_l_sys",
    "eva2_o365_to_coco_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8": f"COCO/{_EVA02}_l_sys_o365",
    "eva2_lvis_cascade_mask_rcnn_vitdet_b_4attn_1024_lrd0p7": f"LVIS/{_EVA02}_b_bsl",
    "eva2_lvis_cascade_mask_rcnn_vitdet_l_4attn_1024_lrd0p8": f"LVIS/{_EVA02}_l_bsl",
    "eva2_lvis_cascade_mask_rcnn_vitdet_l_8attn_win32_1536_lrd0p8": f"LVIS/{_EVA02}_l_sys",
    "eva2_o365_to_lvis_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8": f"LVIS/{_EVA02}_l_sys_o365",
    "eva2_o365_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8": "O365/cascade_rcnn_eva02_l",
}


def recipe(config_file: str) -> DictConfig:
    """Return the project's recipe for a published config file."""
    published = Path(config_file)
    same = f"{published.parent.name}/{published.stem}"
    path = PROJECT / "configs" / f"{RECIPES.get(published.stem, same)}.py"
    if not path.is_file():
        raise UnsupportedCase(f"no recipe for the published config {config_file}")
    return load_config(path)


def vitdet_table(config: Options) -> Table:
    """Build a detector of detectron2 or EVA from its recipe, at the depth and width of the case."""
    cfg = recipe(config.take("config_file"))
    depth = config.take("depth")
    config.only("num_layers", (depth,))  # vitdet asks the backbone for its number of layers
    windows = config.take("window_block_indexes")
    net = cfg.model.backbone.net
    net.depth, net.embed_dim = depth, config.take("embed_dim")
    net.num_heads = 1  # names do not depend on it, and it divides every width
    net.global_block_indexes = [i for i in range(depth) if i not in windows]
    net.checkpoint_blocks = []
    overrides = config.section("overrides")
    for name in list(overrides.values):
        override = overrides.section(name)
        override.only("weight_decay", (0.0,))
        override.done()
    overrides.done()
    arguments = {
        "layer_decay_rate": config.take("lr_decay_rate"),
        "weight_decay": config.take("weight_decay"),
        "weight_decay_norm": config.take("weight_decay_norm"),
        "no_decay": list(overrides.values),
    }
    published = {"lr": config.take("base_lr"), "betas": config.take("betas")}
    return Table(build_model(cfg.model, "meta"), arguments, {}, cfg, published)


# --- StreamPETR --------------------------------------------------------------------------------


class _Head(nn.Module):
    """The head of the case: one parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.query_embed = nn.Embedding(2, 2)
        self.fc = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


def streampetr_table(config: Options) -> Table:
    """Build a backbone and a head as StreamPETR names them.

    The published constructor names a group after the layer alone. Where the backbone holds the
    pyramid, the pyramid's parameters and the head's share a group, and the rate is that of the one
    that was registered first. Here both have a multiplier of their own.
    """
    rule = config.section("paramwise_cfg")
    rule.only("decay_type", ("vit_wise",))
    options = config.section("backbone")
    vit, pyramid = _streampetr_backbone(options)
    order = config.take("registration_order")
    detector = nn.Module()
    for name in order:
        parts = {"img_backbone": pyramid or vit, "pts_bbox_head": _Head()}
        detector.add_module(name, parts[name])
    parameters = [name for name, _ in detector.named_parameters()]
    head, after = rule.take("head_decay_rate"), 1.0
    if pyramid is not None:
        head = after = 1.0 if order[0] == "img_backbone" else head
    arguments = {
        "backbone": "img_backbone",
        "layer_decay_rate": rule.take("decay_rate"),
        "num_layers": rule.take("num_layers"),
        "head_lr_multiplier": head,
        "pyramid_lr_multiplier": after,
        "weight_decay": config.take("weight_decay"),
        "weight_decay_norm": None,
        "weight_decay_vectors": 0.0,
        "no_decay": [],
    }
    rule.done()
    config.inert("base_lr")
    levels = {int(level) for name in parameters for level in re.findall(r"simfp_(\d)", name)}
    names = {name: _streampetr_name(name, min(levels, default=2)) for name in parameters}
    return Table(detector, arguments, names)


def _streampetr_backbone(options: Options) -> tuple[EVA02ViT, SimpleFeaturePyramid | None]:
    depth = options.take("depth")
    windows = options.take("window_block_indexes")
    vit = EVA02ViT(
        img_size=options.take("img_size"),
        patch_size=options.take("patch_size"),
        in_chans=options.take("in_chans"),
        embed_dim=options.take("embed_dim"),
        depth=depth,
        num_heads=options.take("num_heads"),
        mlp_ratio=options.take("mlp_ratio"),
        qkv_bias=options.take("qkv_bias"),
        window_size=options.take("window_size"),
        global_window_size=options.take("global_window_size"),
        global_block_indexes=[i for i in range(depth) if i not in windows],
        pretrain_img_size=options.take("pretrain_img_size"),
        rope_pretrain_grid=options.take("pt_hw_seq_len"),
    )
    options.inert("drop_path_rate", "with_cp", "flash_attn")  # no parameter depends on them
    pyramid = None
    if options.take("sim_fpn") is not None:
        levels = options.section("sim_fpn")
        levels.only("in_channels", (options.take("embed_dim"),))
        scales = levels.take("scale_factors")
        levels.only("out_indices", ([index + 2 for index in range(len(scales))],))
        out_channels = levels.take("out_channels")
        levels.done()
        pyramid = SimpleFeaturePyramid(
            vit, out_channels=out_channels, scale_factors=scales, downsample="conv"
        )
    options.done()
    return vit, pyramid


def _streampetr_name(name: str, finest: int) -> str:
    """Return the published name. It counts levels from 2; ours are named after their stride."""
    name = name.replace("img_backbone.net.", "img_backbone.")
    return re.sub(
        r"img_backbone\.simfp_(\d)",
        lambda found: f"img_backbone.adapter.simfp_{int(found[1]) - finest + 2}",
        name,
    )


# tables of optimizers that no recipe of this project has: backbones for another project, ...
WITHOUT_RECIPE = (
    "lr_decay/streampetr_*",
    # The recipe has the depth of the training log.
    "lr_decay/vitae_vitdet_vitae_s",
    "lr_decay/vitae_vitdet_vitae_s_published_depth",
    # The recipes have the weight decay of the README, the table that of the YAML file.
    "lr_decay/vil_*",
)

# name of a table after "lr_decay/", as in fnmatch: how it is built
TABLES: dict[str, Callable[[Options], Table]] = {
    "detectron2_*": vitdet_table,
    "eva02_*": vitdet_table,
    "streampetr_*": streampetr_table,
    "vitae_vitdet_*": lr_mmdet.vitae,
    "easycv_layer_decay*": lr_mmdet.easycv,
    "easycv_old_*": lr_mmdet.easycv_old,
    "mmdet3_*": lr_mmdet.mmdet3,
    "vil_*": lr_vil.vil,
}


def build(name: str, config: Options) -> Table:
    """Build the model of a table.

    Raises:
        UnsupportedCase: no function builds it.
    """
    for pattern, builder in TABLES.items():
        if fnmatch.fnmatchcase(name, f"lr_decay/{pattern}"):
            return builder(config)
    raise UnsupportedCase(f"{name}: known are {list(TABLES)}")


def has_recipe(name: str) -> bool:
    """Whether a recipe of this project has the optimizer of the table."""
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in WITHOUT_RECIPE)
