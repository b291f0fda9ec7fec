"""Build plain ViTs and pyramids: detectron2, SAM, transformers, timm, EVA, StreamPETR."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import PlainViT, ViT
from vitdet.layers.rope import make_ropes
from vitdet.pyramid import SimpleFeaturePyramid

from .build import (
    BOTH,
    SHARED,
    SIZES,
    Built,
    Mode,
    Recorder,
    check_gelu,
    given,
    global_blocks,
    leaves_of,
    load,
    norm_eps,
    put,
    pyramid_options,
    vit_options,
    whole_patches,
)
from .cases import Case, Options, UnsupportedCase


def built(
    case: Case,
    vit: PlainViT,
    source_format: str,
    model: SimpleFeaturePyramid | None = None,
    more: Callable[[], dict[str, torch.Tensor]] = dict,
) -> Built:
    """Load the weights; outputs are the map by the names of all families, or the levels."""
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        outputs = (model or vit)(whole_patches(images[0], vit.patch_size))
        maps = [x.permute(0, 3, 1, 2) for x in recorder.tokens if x.ndim == 4]
        outputs |= {name: outputs[vit.out_feature] for name in ("out", "map") if model is None}
        outputs |= {f"stage{i}" if i else "stem": each for i, each in enumerate(maps)}
        extra = recorder.extra(case) | {f"hidden_states.{i}": each for i, each in enumerate(maps)}
        return outputs, extra | {"last_feat": maps[-1]} | more()

    neck = frozenset({"neck"} if source_format == "sam" else ())  # has no counterpart here
    return Built(model or vit, call, load(case, model or vit, source_format), neck)


def alone_or_under_pyramid(
    case: Case,
    mode: Mode,
    translate: Callable[[Options], dict[str, Any]],
    source_format: str,
    tables: Callable[[PlainViT, dict[str, Any]], Callable[[], Any]] = lambda *_: dict,
    make: Callable[..., PlainViT] = ViT,
) -> Built:
    """Build a ViT, under a SimpleFeaturePyramid where the case has one."""
    config, model = case.config(), None
    with_pyramid = "net" in config.values
    arguments = translate(config.section("net") if with_pyramid else config)
    vit = make(**mode.of(arguments))
    if with_pyramid:
        model = SimpleFeaturePyramid(vit, **pyramid_options(config.section("pyramid")))
        config.done()
    return built(case, vit, source_format, model, tables(vit, arguments))


def detectron2_vit(case: Case, mode: Mode) -> Built:
    """Build detectron2's ViT, alone or under its SimpleFeaturePyramid."""
    return alone_or_under_pyramid(case, mode, vit_options, "detectron2")


def sam_encoder(case: Case, mode: Mode) -> Built:
    """Build the ViT of SAM's image encoder; its neck has no counterpart here."""
    options = case.config()
    names = ("img_size", *SIZES, "qkv_bias", "use_abs_pos", "use_rel_pos", "window_size")
    arguments = given(options, *names, global_block_indexes="global_attn_indexes")
    arguments |= {"norm_eps": norm_eps(options, 1e-5), "pretrain_img_size": None}
    arguments["pretrain_use_cls_token"] = False
    check_gelu(options)
    options.inert("rel_pos_zero_init", "out_chans")  # weights are given; the neck's channels
    options.done()
    return built(case, ViT(**mode.of(arguments)), "sam")


def hf_backbone(case: Case, mode: Mode) -> Built:
    """Build the VitDetBackbone of transformers; outputs are "stem" and "stage1", "stage2", ..."""
    options = case.config()
    arguments = {"img_size": 224} | given(
        options,
        *("patch_size", "mlp_ratio", "qkv_bias", "drop_path_rate", "window_size"),
        img_size="image_size",
        in_chans="num_channels",
        embed_dim="hidden_size",
        depth="num_hidden_layers",
        num_heads="num_attention_heads",
        norm_eps="layer_norm_eps",
        use_abs_pos="use_absolute_position_embeddings",
        use_rel_pos="use_relative_position_embeddings",
        residual_block_indexes="residual_block_indices",
        pretrain_img_size="pretrain_image_size",
    )
    blocks = global_blocks(options, "window_block_indices", "num_hidden_layers")
    arguments["global_block_indexes"] = blocks
    options.only("hidden_act", ("gelu",), "gelu")  # the exact one, the only one of vitdet's ViT
    options.inert("dropout_prob", "initializer_range", "out_features", "out_indices")
    options.done()
    return built(case, ViT(**mode.of(arguments)), "hf_vitdet")


# --- EVA ---------------------------------------------------------------------------------------


def _rotary(options: Options) -> dict[str, Any]:
    """Translate what EVA-02/det's ViT and StreamPETR's share."""
    arguments = given(options, *SHARED, rope_interpolate="intp_freq")
    arguments["global_block_indexes"] = global_blocks(options, "window_block_indexes")
    arguments["norm_eps"] = norm_eps(options, 1e-6)
    arguments["rope_pretrain_grid"] = options.take("pt_hw_seq_len", 16)
    # The published classes take these and do nothing with them.
    options.inert("rope", "use_rel_pos", "rel_pos_zero_init", "act_layer")
    return arguments


def eva02_options(options: Options) -> dict[str, Any]:
    """Translate the arguments of EVA-02/det's ViT."""
    arguments = _rotary(options)
    options.inert("xattn", "use_act_checkpoint")  # ways to compute the same
    options.done()
    return arguments


def _tables(vit: PlainViT, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the rotary tables that the published class makes, by its names."""
    defaults = inspect.signature(ViT).parameters
    size, patch, dim, heads, window_size = (
        arguments.get(name, defaults[name].default)
        for name in ("img_size", "patch_size", "embed_dim", "num_heads", "window_size")
    )
    grid = arguments["rope_pretrain_grid"] if arguments.get("rope_interpolate", True) else None
    square = (size // patch,) * 2
    window, whole = make_ropes("eva02", dim / heads, grid, square)
    assert {block.rope for block in vit.units()} <= {window, whole}
    cpu, inside = torch.device("cpu"), (window_size,) * 2
    named = {"win": window(inside, square, cpu), "glb": whole(square, square, cpu)}
    return {
        f"rope_{name}.freqs_{kind}": getattr(tables, kind)
        for name, tables in named.items()
        for kind in ("cos", "sin")
    }


def eva02_vit(case: Case, mode: Mode) -> Built:
    """Build EVA-02/det's ViT, alone or under its SimpleFeaturePyramid."""
    tables = partial(partial, _tables)
    return alone_or_under_pyramid(case, mode, eva02_options, "eva02", tables, EVA02ViT)


def eva01_vit(case: Case, mode: Mode) -> Built:
    """Build EVA-01/det's ViT."""
    options = case.config()
    names = ("LayerNorm", "LayerNormWithForceFP32")  # they differ in other types than float32
    eps = norm_eps(options, 1e-5, names)
    own = options.only("beit_like_qkv_bias", BOTH, True)
    resize = options.only("interp_type", ("vitdet", "beit"), "vitdet")
    layer_scale = options.only("beit_like_gamma", BOTH, False)
    plain = {key: value for key, value in options.values.items() if key != "norm_layer"}
    rest = Options(plain, options.place)
    rest.inert("beit_like_qkv_bias", "interp_type", "beit_like_gamma")
    arguments = vit_options(rest, "freeze_patch_embed") | {"norm_eps": eps}
    arguments |= {"qkv_bias": "qv"} if own else {}
    arguments |= {"rel_pos_resize": "interpolate" if resize == "vitdet" else "beit"}
    return built(case, ViT(**mode.of(arguments), layer_scale=layer_scale), "eva01")


def streampetr_vit(case: Case, mode: Mode) -> Built:
    """Build StreamPETR's EVAViT, alone or with its pyramid, which it has inside."""
    options = case.config()
    arguments = _rotary(options)
    arguments |= given(options, "global_window_size", "frozen", inner_attn_norm="subln")
    options.inert("with_cp", "flash_attn")  # ways to compute the same
    pyramid = None if options.take("sim_fpn", None) is None else options.section("sim_fpn")
    options.done()
    vit = EVA02ViT(**mode.of(arguments))
    recorder = Recorder(vit)
    model = vit if pyramid is None else _streampetr_pyramid(pyramid, vit)
    root = "" if pyramid is None else "net."
    # It numbers the levels as if every patch had 16 pixels; ours are named by their strides.
    shift = 4 - int(math.log2(vit.patch_size))

    def ours(name: str) -> str:
        if not name.startswith("adapter.simfp_"):
            return root + name
        level, _, rest = name.removeprefix("adapter.simfp_").partition(".")
        return f"simfp_{int(level) - shift}.{rest}"

    if strange := [name for name in case.info["buffers_not_filled"] if ".freqs_" not in name]:
        raise UnsupportedCase(f"{case.name}: vitdet has no buffers {strange}")
    leaves = leaves_of(case)
    weights = put(model, leaves, {ours(name): value for name, value in leaves.items()})

    def call(images: list[torch.Tensor]) -> Any:
        found = model(whole_patches(images[0], vit.patch_size))
        levels = {f"p{int(name[1:]) + shift}": x for name, x in found.items() if pyramid}
        return levels or {"out": found[vit.out_feature]}, recorder.extra(case)

    return Built(model, call, weights)


def _streampetr_pyramid(options: Options, vit: PlainViT) -> SimpleFeaturePyramid:
    options.only("in_channels", (vit.output_shape()[vit.out_feature].channels,), 1024)
    indices = options.take("out_indices", (2, 3, 4, 5))
    scales = options.take("scale_factors", (4, 2, 1, 0.5))
    options.fixed(top_block=None)
    arguments = {
        "in_feature": vit.out_feature,
        "scale_factors": [scale for scale in scales if int(math.log2(16 / scale)) in indices],
        "downsample": "conv",
        "norm": options.only("norm", ("LN", ""), "LN"),
        "out_channels": options.take("out_channels", 256),
    }
    options.inert("square_pad")  # it is given the backbone's map, and pads nothing
    options.done()
    return SimpleFeaturePyramid(vit, **arguments)


# --- timm --------------------------------------------------------------------------------------


def _timm(case: Case, name: str) -> tuple[Options, dict[str, Any], bool]:
    """Return the rest of the config, what both classes share, and whether a map is compared.

    A map has no class token and comes before the last norm.
    """
    config = case.config()
    is_map = config.only("output", ("map", "tokens")) == "map"
    config.only("class", (name,), name)
    options = config.section("args")
    config.done()
    registers_key = "num_reg_tokens" if name == "Eva" else "reg_tokens"
    registers = options.take(registers_key, 0)
    no_rows = options.only("no_embed_class", BOTH, False)
    has_class = options.only("class_token", (False,) if is_map else BOTH, True)
    if is_map:
        options.only(registers_key, (0,), 0)
    elif registers and not no_rows and options.take("use_abs_pos_emb", True):
        raise UnsupportedCase(f"{case.name}: pos_embed has rows for register tokens")
    norm = options.take("norm_layer", None)
    # What makes no difference: the head, what happens in training only, and that without
    # dynamic_img_size the input has the size of the model.
    options.inert("num_classes", "global_pool", "drop_rate", "pos_drop_rate", "patch_drop_rate")
    options.inert("proj_drop_rate", "attn_drop_rate", "dynamic_img_size")
    options.only("dynamic_img_pad", (False,), False)
    arguments = {
        "img_size": options.take("img_size", 224),
        **given(options, *SIZES, "qkv_bias", "drop_path_rate"),
        # "layernorm" is timm's own, with its eps
        "norm_eps": 1e-6 if norm in (None, "layernorm") else norm_eps(options, 1e-6),
        "pos_embed_resize": "bicubic_antialias",
        "pretrain_img_size": None,
        "pretrain_use_cls_token": has_class and not no_rows,
        "use_cls_token": has_class,
        "num_register_tokens": registers,
        "layer_scale": options.take("init_values", None) is not None,
    }
    return options, arguments, is_map


def timm_vit(case: Case, mode: Mode) -> Built:
    """Build timm's VisionTransformer, as a map or with all its tokens and its last norm."""
    options, arguments, is_map = _timm(case, "VisionTransformer")
    learned = options.only("pos_embed", ("learn", "none", ""), "learn") == "learn"
    final = options.only("final_norm", BOTH, True)
    arguments |= {
        "use_abs_pos": learned,
        "pre_norm": options.only("pre_norm", BOTH, False),
        "final_norm": final and not is_map,
        "act_layer": options.only("act_layer", ("gelu", "quick_gelu", None), None) or "gelu",
    }
    if not is_map:
        options.only("fc_norm", (None, False), None)
    options.fixed(qk_norm=False, scale_attn_norm=False, scale_mlp_norm=False)
    options.fixed(proj_bias=True, embed_norm_layer=None)
    options.inert("pool_include_prefix", "weight_init", "fix_init", "fc_norm")
    options.done()
    vit = ViT(**mode.of(arguments))
    return built(case, vit, "timm") if is_map else _tokens(case, vit, "timm")


def timm_eva(case: Case, mode: Mode) -> Built:
    """Build timm's Eva, as a map or with all its tokens: EVA-02 and DINOv3."""
    options, arguments, is_map = _timm(case, "Eva")
    gated = options.only("swiglu_mlp", BOTH, False)
    inner_norm = options.only("scale_mlp", (gated, False), False)
    dinov3 = options.only("rope_type", ("cat", "dinov3"), "cat") == "dinov3"
    options.only("rope_rotate_half", (dinov3,), False)
    options.only("rope_temperature", (100.0 if dinov3 else 10000.0,), 10000.0)
    options.only("use_rot_pos_emb", (True,), False)
    split = not options.only("qkv_fused", BOTH, True)
    # without pooling the norm stands after the blocks unless a case says otherwise
    final = options.only("use_post_transformer_norm", (True, False, None), None)
    pre_norm = options.only("use_pre_transformer_norm", BOTH, False)
    arguments |= {
        "use_abs_pos": options.only("use_abs_pos_emb", BOTH, True),
        "pre_norm": pre_norm,
        "final_norm": final is not False and not is_map,
        "ffn_layer": ("swiglu_norm" if inner_norm else "swiglu") if gated else "mlp",
        "rope": "dinov3" if dinov3 else "eva02",
        "rope_pretrain_grid": options.take("ref_feat_shape", None),
        "rope_resize": "stretch",
        "split_qkv": split and is_map,
        "inner_attn_norm": options.only("scale_attn_inner", BOTH if is_map else (False,), False),
        "inner_attn_norm_eps": arguments["norm_eps"],
    }
    if not is_map:
        options.only("use_fc_norm", (False, None), None)
    elif not (split and gated and inner_norm) or dinov3 or pre_norm or arguments["layer_scale"]:
        raise UnsupportedCase(f"{case.name}: a map of another network than EVA-02")
    options.fixed(qk_norm=False, use_post_norm=False, swiglu_align_to=0, rope_grid_offset=0)
    options.fixed(num_kv_heads=None, rope_mrope_section=None, attn_type="eva")
    options.fixed(rope_grid_indexing="ij")
    options.only("attn_only_layer_scale", BOTH if is_map else (False,), False)
    options.inert("head_init_scale", "attn_pool_num_heads", "attn_pool_mlp_ratio", "use_fc_norm")
    options.inert("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords")
    options.done()
    vit = ViT(**mode.of(arguments))
    if is_map:
        return built(case, vit, "timm_eva")
    return _tokens(case, vit, "timm_eva" if split else "dinov3")


def _tokens(case: Case, vit: PlainViT, source_format: str) -> Built:
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        tokens, _ = vit.forward_tokens(images[0])
        tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        return {"tokens": tokens}, recorder.extra(case)

    return Built(vit, call, load(case, vit, source_format))
