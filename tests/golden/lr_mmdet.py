"""Models of the lr_decay tables of ViTAE, EasyCV and mmdetection 3.x, at the size of the case."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig

from vitdet.config import build_model, load_config

from .cases import PROJECT, Options
from .lr_table import Table

# Names of ours: those of MMDetection; NORM stands for what it calls the norm of a ConvModule.
_HEADS = (
    (r"proposal_generator\.rpn_head\.conv\.conv(\d)\.norm\.", r"rpn_head.rpn_conv.\1.NORM."),
    (r"proposal_generator\.rpn_head\.conv\.conv(\d)\.", r"rpn_head.rpn_conv.\1.conv."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn_head.rpn_cls."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn_head.rpn_reg."),
    (r"roi_heads\.box_head\.conv(\d)\.norm\.", r"roi_head.bbox_head.shared_convs.<\1>.NORM."),
    (r"roi_heads\.box_head\.conv(\d)\.", r"roi_head.bbox_head.shared_convs.<\1>.conv."),
    (r"roi_heads\.box_head\.fc(\d)\.", r"roi_head.bbox_head.shared_fcs.<\1>."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.norm\.", r"roi_head.mask_head.convs.<\1>.NORM."),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.", r"roi_head.mask_head.convs.<\1>.conv."),
    (r"roi_heads\.mask_head\.deconv\.", "roi_head.mask_head.upsample."),
    (r"roi_heads\.mask_head\.predictor\.", "roi_head.mask_head.conv_logits."),
    (r"backbone\.net\.", "backbone."),
)
_SEPARATE = (  # 1x1 and 3x3 convolutions in two lists, from the finest level
    (r"backbone\.simfp_2\.4\.norm\.", "neck.lateral_convs.0.NORM."),
    (r"backbone\.simfp_2\.4\.", "neck.lateral_convs.0.conv."),
    (r"backbone\.simfp_2\.5\.norm\.", "neck.fpn_convs.0.NORM."),
    (r"backbone\.simfp_2\.5\.", "neck.fpn_convs.0.conv."),
    (r"backbone\.simfp_3\.1\.norm\.", "neck.lateral_convs.1.NORM."),
    (r"backbone\.simfp_3\.1\.", "neck.lateral_convs.1.conv."),
    (r"backbone\.simfp_3\.2\.norm\.", "neck.fpn_convs.1.NORM."),
    (r"backbone\.simfp_3\.2\.", "neck.fpn_convs.1.conv."),
    (r"backbone\.simfp_4\.0\.norm\.", "neck.lateral_convs.2.NORM."),
    (r"backbone\.simfp_4\.0\.", "neck.lateral_convs.2.conv."),
    (r"backbone\.simfp_4\.1\.norm\.", "neck.fpn_convs.2.NORM."),
    (r"backbone\.simfp_4\.1\.", "neck.fpn_convs.2.conv."),
    (r"backbone\.simfp_5\.1\.norm\.", "neck.lateral_convs.3.NORM."),
    (r"backbone\.simfp_5\.1\.", "neck.lateral_convs.3.conv."),
    (r"backbone\.simfp_5\.2\.norm\.", "neck.fpn_convs.3.NORM."),
    (r"backbone\.simfp_5\.2\.", "neck.fpn_convs.3.conv."),
)
_VITAE = (
    (r"backbone\.simfp_2\.1\.", "backbone.fpn1.1.ln."),
    (r"backbone\.simfp_2\.([03])\.", r"backbone.fpn1.\1."),
    (r"backbone\.simfp_3\.0\.", "backbone.fpn2.0."),
    *_SEPARATE,
    *_HEADS,
)
_EASYCV = (
    *(
        rule
        for k in range(4)
        for rule in (
            (rf"backbone\.simfp_{k + 2}\.(\d)\.norm\.", rf"neck.sfp_{k}.\1.NORM."),
            (rf"backbone\.simfp_{k + 2}\.(0|1|3)\.(weight|bias)$", rf"neck.sfp_{k}.\1.LAYER.\2"),
            (rf"backbone\.simfp_{k + 2}\.(\d)\.", rf"neck.sfp_{k}.\1.conv."),
        )
    ),
    *_HEADS,
)
_EASYCV_OLD = (
    (r"backbone\.simfp_2\.1\.", "neck.top_downs.0.1.ln."),
    (r"backbone\.simfp_2\.([03])\.", r"neck.top_downs.0.\1."),
    (r"backbone\.simfp_3\.0\.", "neck.top_downs.1."),
    (r"backbone\.net\.(blocks\.\d+)\.residual\.norm(\d)\.", r"backbone.\1.conv_aggregation.bn\2."),
    (r"backbone\.net\.(blocks\.\d+)\.residual\.", r"backbone.\1.conv_aggregation."),
    *_SEPARATE,
    *_HEADS,
)
_MMDET3 = (
    (r"backbone\.simfp_2\.([013])\.", r"neck.fpn1.\1."),
    (r"backbone\.simfp_3\.0\.", "neck.fpn2.0."),
    *_SEPARATE,
    *_HEADS,
)


def _published(name: str, rules: tuple[tuple[str, str], ...], norm: str) -> str:
    """Return the published spelling of one of our names."""
    for pattern, to in rules:
        if re.match(pattern, name):
            name = re.sub(pattern, to, name, count=1)
            break
    # detectron2 counts from 1
    name = re.sub(r"<(\d)>", lambda found: str(int(found[1]) - 1), name)
    return name.replace(".NORM.", f".{norm}.")


def _table(
    cfg: DictConfig,
    arguments: dict[str, Any],
    rules: tuple[tuple[str, str], ...],
    norm: str,
    config: Options,
) -> Table:
    model = build_model(cfg.model, "meta")
    names = {name: _published(name, rules, norm) for name, _ in model.named_parameters()}
    arguments |= {"weight_decay": config.take("weight_decay")}
    return Table(model, arguments, names, cfg, {"lr": config.take("base_lr")})


def _vit(cfg: DictConfig, options: Options) -> int:
    """Put the sizes of a case into the recipe's ViT or ViTAE-B; return its depth."""
    net, depth = cfg.model.backbone.net, options.take("depth")
    net.depth, net.embed_dim = depth, options.take("embed_dim")
    net.num_heads = 1  # names do not depend on it, and it divides every width
    interval = options.take("interval", 3)
    blocks = [i for i in range(depth) if (i + 1) % interval == 0]
    if "window_block_indexes" in options.values:
        windows = options.take("window_block_indexes")
        blocks = [i for i in range(depth) if i not in windows]
    conv = bool(net.get("residual_block_indexes"))
    net.global_block_indexes = [] if conv else blocks
    if conv:
        net.residual_block_indexes = blocks
    if "checkpoint_blocks" in net:
        net.checkpoint_blocks = []
    # No name or rule depends on them.
    options.inert("img_size", "patch_size", "num_heads", "mlp_ratio", "qkv_bias", "qk_scale")
    options.inert("drop_rate", "attn_drop_rate", "drop_path_rate", "window_size")
    options.inert("pretrain_img_size", "pretrain_use_cls_token")
    return depth


def vitae(config: Options) -> Table:
    """Build a detector of ViTAE-Transformer/ViTDet."""
    options = config.section("backbone")
    rule = config.section("paramwise_cfg")
    num_layers = rule.take("num_layers")
    if "token_dims" in options.values:
        cfg = load_config(PROJECT / "configs/vitae/mask_rcnn_vitae_s_100ep.py")
        rule.only("layer_sep", ([0, 1, 2],))
        natural = _vitae_s(cfg, options)
    else:
        # The tables of ViT-B and ViTAE-B differ in nothing but their names.
        name = "mask_rcnn_vitae_b_100ep" if _is_vitae_b(config) else "mask_rcnn_vit_b_100ep"
        cfg = load_config(PROJECT / f"configs/vitae/{name}.py")
        natural = _vit(cfg, options)
    options.done()
    rule.inert("custom_keys")  # never read
    arguments = {
        "layer_decay_rate": rule.take("layer_decay_rate"),
        "num_layers": None if num_layers == natural else num_layers,
        "weight_decay_norm": None,
        "weight_decay_vectors": 0.0,
        "no_decay": ["pos_embed", "cls_token", "rel_pos_"],
    }
    rule.done()
    return _table(cfg, arguments, _VITAE, "ln", config)


def _is_vitae_b(config: Options) -> bool:
    return "vitae_vitdet_vitae_b" in config.place


def _vitae_s(cfg: DictConfig, options: Options) -> int:
    """Put the sizes of a case into the recipe's ViTAE-S; return its number of cells."""
    net = cfg.model.backbone.net
    net.embed_dims, net.token_dims = options.take("embed_dims"), options.take("token_dims")
    net.depths = options.take("NC_depth", list(net.depths))
    net.num_heads, net.groups = options.take("NC_heads"), options.take("NC_group")
    net.global_block_indexes = options.take("globalBlock", list(net.global_block_indexes))
    options.inert("img_size")
    return sum(net.depths) + len(net.depths)


def easycv(config: Options) -> Table:
    """Build a detector of EasyCV v0.7."""
    cfg = load_config(PROJECT / "configs/easycv/mask_rcnn_vitdet_b_100ep.py")
    options, rule = config.section("backbone"), config.section("paramwise_options")
    rule.only("num_layers", (_vit(cfg, options),))
    options.only("use_rel_pos", (True,))
    options.only("use_abs_pos", (True,))
    options.only("residual_block_indexes", ([],))
    options.done()
    neck = config.section("neck")
    neck.inert("in_channels", "out_channels", "scale_factors", "norm_cfg", "num_outs")
    neck.done()
    arguments = {
        "layer_decay_rate": rule.take("layer_decay_rate"),
        "weight_decay_norm": None,
        "no_decay": list(cfg.optimizer.no_decay),
    }
    rule.done()
    table = _table(cfg, arguments, _EASYCV, "gn", config)
    table.names = {ours: _easycv_level(name) for ours, name in table.names.items()}
    return table


def _easycv_level(name: str) -> str:
    """Tell deconvolutions and their norm from the convolutions after them."""
    found = re.match(r"neck\.sfp_(\d)\.(\d)\.LAYER\.(.*)", name)
    if found is None:
        return name
    level, place, last = int(found[1]), int(found[2]), found[3]
    plain = {0: (0, 1, 3), 1: (0,), 2: (), 3: ()}[level]
    return f"neck.sfp_{level}.{place}.{'' if place in plain else 'conv.'}{last}"


def easycv_old(config: Options) -> Table:
    """Build a detector of EasyCV before v0.7 with convolution propagation."""
    options = config.section("backbone")
    kind = options.only("aggregation", ("attn", "basicblock", "bottleneck", "conv"), "attn")
    cfg = load_config(PROJECT / f"configs/easycv/mask_rcnn_vit_b_v06_{kind}_100ep.py")
    _vit(cfg, options)
    options.only("use_abs_pos_emb", (True,))
    options.done()
    neck = config.section("neck")
    neck.inert("in_channels", "out_channels", "norm_cfg", "num_outs")
    neck.done()
    rule = config.section("paramwise_options")
    for name in ("norm", "bias", "pos_embed", "cls_token"):
        rule.only(name, ({"weight_decay": 0.0},))
    rule.done()
    arguments = {
        "layer_decay_rate": None,
        "weight_decay_norm": None,
        "no_decay": list(cfg.optimizer.no_decay),
    }
    return _table(cfg, arguments, _EASYCV_OLD, "gn", config)


def mmdet3(config: Options) -> Table:
    """Build a detector of mmdetection 3.x."""
    cfg = load_config(PROJECT / "configs/mmdetection/mask_rcnn_vitdet_b_100ep.py")
    options, rule = config.section("backbone"), config.section("paramwise_cfg")
    rule.only("num_layers", (_vit(cfg, options),))
    rule.only("decay_type", ("layer_wise",))
    options.done()
    arguments = {
        "layer_decay_rate": rule.take("decay_rate"),
        "weight_decay_norm": None,
        "no_decay": list(cfg.optimizer.no_decay),
    }
    rule.done()
    return _table(cfg, arguments, _MMDET3, "norm_layer", config)
