"""Build plain ViTs and pyramids: detectron2, SAM, transformers, timm, EVA, StreamPETR."""

from __future__ import annotations

import inspect
import math
from functools import partial

import torch

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT
from vitdet.layers.rope import make_ropes
from vitdet.pyramid import SimpleFeaturePyramid

from . import build


def built(case, vit, source_format, model=None, more=dict):
    """Load the weights; outputs are the map by the names of all families, or the levels."""
    recorder = build.Recorder(vit)

    def call(images):
        outputs = (model or vit)(build.whole_patches(images[0], vit.patch_size))
        maps = [x.permute(0, 3, 1, 2) for x in recorder.tokens if x.ndim == 4]
        outputs |= {name: outputs[vit.out_feature] for name in ("out", "map") if model is None}
        outputs |= {f"stage{i}" if i else "stem": each for i, each in enumerate(maps)}
        extra = recorder.extra(case) | {f"hidden_states.{i}": each for i, each in enumerate(maps)}
        return outputs, extra | {"last_feat": maps[-1]} | more()

    neck = frozenset({"neck"} if source_format == "sam" else ())  # has no counterpart here
    return build.Built(model or vit, call, build.load(case, model or vit, source_format), neck)


def alone_or_under_pyramid(case, mode, translate, source_format, tables=lambda *_: dict, make=ViT):
    """Build a ViT, under a SimpleFeaturePyramid where the case has one."""
    config, model = case.config(), None
    with_pyramid = "net" in config
    arguments = translate(config["net"] if with_pyramid else config)
    vit = make(**mode.of(arguments))
    if with_pyramid:
        model = SimpleFeaturePyramid(vit, **build.pyramid_options(config["pyramid"]))
    return built(case, vit, source_format, model, tables(vit, arguments))


def detectron2_vit(case, mode):
    """Build detectron2's ViT, alone or under its SimpleFeaturePyramid."""
    return alone_or_under_pyramid(case, mode, build.vit_options, "detectron2")


def sam_encoder(case, mode):
    """Build the ViT of SAM's image encoder; its neck has no counterpart here."""
    options = case.config()
    names = ("img_size", *build.SIZES, "qkv_bias", "use_abs_pos", "use_rel_pos", "window_size")
    arguments = build.given(options, *names, global_block_indexes="global_attn_indexes")
    arguments |= {"norm_eps": build.norm_eps(options, 1e-5), "pretrain_img_size": None}
    arguments["pretrain_use_cls_token"] = False
    return built(case, ViT(**mode.of(arguments)), "sam")


def hf_backbone(case, mode):
    """Build the VitDetBackbone of transformers; outputs are "stem" and "stage1", "stage2", ..."""
    options = case.config()
    arguments = {"img_size": 224} | build.given(
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
    blocks = build.global_blocks(options, "window_block_indices", "num_hidden_layers")
    arguments["global_block_indexes"] = blocks
    return built(case, ViT(**mode.of(arguments)), "hf_vitdet")


# --- EVA ---------------------------------------------------------------------------------------


def eva02_options(options):
    """Translate the arguments of EVA-02/det's ViT, and what StreamPETR's shares with it."""
    arguments = build.given(options, *build.SHARED, rope_interpolate="intp_freq")
    arguments["global_block_indexes"] = build.global_blocks(options, "window_block_indexes")
    arguments["norm_eps"] = build.norm_eps(options, 1e-6)
    arguments["rope_pretrain_grid"] = options.get("pt_hw_seq_len", 16)
    return arguments


def _tables(vit, arguments):
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


def eva02_vit(case, mode):
    """Build EVA-02/det's ViT, alone or under its SimpleFeaturePyramid."""
    tables = partial(partial, _tables)
    return alone_or_under_pyramid(case, mode, eva02_options, "eva02", tables, EVA02ViT)


def eva01_vit(case, mode):
    """Build EVA-01/det's ViT."""
    options = case.config()
    resize = options.get("interp_type", "vitdet")
    arguments = build.vit_options(options, "freeze_patch_embed", layer_scale="beit_like_gamma")
    arguments |= {"qkv_bias": "qv"} if options.get("beit_like_qkv_bias", True) else {}
    arguments |= {"rel_pos_resize": "interpolate" if resize == "vitdet" else "beit"}
    return built(case, ViT(**mode.of(arguments)), "eva01")


def streampetr_vit(case, mode):
    """Build StreamPETR's EVAViT, alone or with its pyramid, which it has inside."""
    options = case.config()
    arguments = eva02_options(options)
    arguments |= build.given(options, "global_window_size", "frozen", inner_attn_norm="subln")
    pyramid = options.get("sim_fpn")
    vit = EVA02ViT(**mode.of(arguments))
    recorder = build.Recorder(vit)
    model = vit if pyramid is None else _streampetr_pyramid(pyramid, vit)
    root = "" if pyramid is None else "net."
    # It numbers the levels as if every patch had 16 pixels; ours are named by their strides.
    shift = 4 - int(math.log2(vit.patch_size))

    def ours(name):
        if not name.startswith("adapter.simfp_"):
            return root + name
        level, _, rest = name.removeprefix("adapter.simfp_").partition(".")
        return f"simfp_{int(level) - shift}.{rest}"

    leaves = build.leaves_of(case)
    weights = build.put(model, leaves, {ours(name): value for name, value in leaves.items()})

    def call(images):
        found = model(build.whole_patches(images[0], vit.patch_size))
        levels = {f"p{int(name[1:]) + shift}": x for name, x in found.items() if pyramid}
        return levels or {"out": found[vit.out_feature]}, recorder.extra(case)

    return build.Built(model, call, weights)


def _streampetr_pyramid(options, vit):
    indices = options.get("out_indices", (2, 3, 4, 5))
    scales = options.get("scale_factors", (4, 2, 1, 0.5))
    arguments = {
        "in_feature": vit.out_feature,
        "scale_factors": [scale for scale in scales if int(math.log2(16 / scale)) in indices],
        "downsample": "conv",
        "norm": options.get("norm", "LN"),
        "out_channels": options.get("out_channels", 256),
    }
    return SimpleFeaturePyramid(vit, **arguments)


# --- timm --------------------------------------------------------------------------------------


def _timm(case):
    """Return the rest of the config, what both classes share, and whether a map is compared.

    A map has no class token and comes before the last norm.
    """
    config = case.config()
    is_map, options = config["output"] == "map", config["args"]
    no_rows = options.get("no_embed_class", False)
    has_class = options.get("class_token", not is_map)
    registers = options.get("num_reg_tokens" if config["class"] == "Eva" else "reg_tokens", 0)
    arguments = {
        "img_size": options.get("img_size", 224),
        **build.given(options, *build.SIZES, "qkv_bias", "drop_path_rate"),
        "norm_eps": build.norm_eps(options, 1e-6),
        "pos_embed_resize": "bicubic_antialias",
        "pretrain_img_size": None,
        "pretrain_use_cls_token": has_class and not no_rows,
        "use_cls_token": has_class,
        "num_register_tokens": registers,
        "layer_scale": options.get("init_values") is not None,
    }
    return options, arguments, is_map


def timm_vit(case, mode):
    """Build timm's VisionTransformer, as a map or with all its tokens and its last norm."""
    options, arguments, is_map = _timm(case)
    arguments |= {
        "use_abs_pos": options.get("pos_embed", "learn") == "learn",
        "pre_norm": options.get("pre_norm", False),
        "final_norm": options.get("final_norm", True) and not is_map,
        "act_layer": options.get("act_layer") or "gelu",
    }
    vit = ViT(**mode.of(arguments))
    return built(case, vit, "timm") if is_map else _tokens(case, vit, "timm")


def timm_eva(case, mode):
    """Build timm's Eva, as a map or with all its tokens: EVA-02 and DINOv3."""
    options, arguments, is_map = _timm(case)
    gated = options.get("swiglu_mlp", False)
    inner_norm = options.get("scale_mlp", False)
    dinov3 = options.get("rope_type", "cat") == "dinov3"
    split = not options.get("qkv_fused", True)
    arguments |= {
        "use_abs_pos": options.get("use_abs_pos_emb", True),
        "pre_norm": options.get("use_pre_transformer_norm", False),
        # without pooling the norm stands after the blocks unless a case says otherwise
        "final_norm": options.get("use_post_transformer_norm") is not False and not is_map,
        "ffn_layer": ("swiglu_norm" if inner_norm else "swiglu") if gated else "mlp",
        "rope": "dinov3" if dinov3 else "eva02",
        "rope_pretrain_grid": options.get("ref_feat_shape"),
        "rope_resize": "stretch",
        "split_qkv": split and is_map,
        "inner_attn_norm": options.get("scale_attn_inner", False),
        "inner_attn_norm_eps": arguments["norm_eps"],
    }
    vit = ViT(**mode.of(arguments))
    if is_map:
        return built(case, vit, "timm_eva")
    return _tokens(case, vit, "timm_eva" if split else "dinov3")


def _tokens(case, vit, source_format):
    recorder = build.Recorder(vit)

    def call(images):
        tokens, _ = vit.forward_tokens(images[0])
        tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        return {"tokens": tokens}, recorder.extra(case)

    return build.Built(vit, call, build.load(case, vit, source_format))
