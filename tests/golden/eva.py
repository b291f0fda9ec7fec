"""Build EVA-02 and EVA-01 from baaivision/EVA, StreamPETR and timm."""

from __future__ import annotations

import math
from typing import Any

import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import PlainViT, ViT
from vitdet.layers.rope import make_ropes
from vitdet.pyramid import SimpleFeaturePyramid

from .build import (
    Built,
    Mode,
    Recorder,
    check_gelu,
    for_mode,
    load_by_conversion,
    norm_eps,
    pyramid_options,
    whole_patches,
)
from .cases import Case, Options, UnsupportedCase
from .detectors import MODELS, assemble, mask_rcnn

_BOTH = (True, False)


def _shared(options: Options) -> dict[str, Any]:
    """Translate the arguments that all of baaivision's ViTs and StreamPETR's have."""
    depth = options.take("depth", 12)
    windows = set(options.take("window_block_indexes", ()))
    return {
        "img_size": options.take("img_size", 1024),
        "patch_size": options.take("patch_size", 16),
        "in_chans": options.take("in_chans", 3),
        "embed_dim": options.take("embed_dim", 768),
        "depth": depth,
        "num_heads": options.take("num_heads", 12),
        "drop_path_rate": options.take("drop_path_rate", 0.0),
        "use_abs_pos": options.only("use_abs_pos", _BOTH, True),
        "window_size": options.take("window_size", 0),
        "global_block_indexes": [i for i in range(depth) if i not in windows],
        "residual_block_indexes": list(options.take("residual_block_indexes", ())),
        "pretrain_img_size": options.take("pretrain_img_size", 224),
        "pretrain_use_cls_token": options.only("pretrain_use_cls_token", _BOTH, True),
        "out_feature": options.take("out_feature", "last_feat"),
    }


def _rotary(options: Options) -> dict[str, Any]:
    """Translate what EVA-02 has beside them."""
    no_norm = options.take("norm_layer", None) is None  # both classes then take eps 1e-6
    arguments = {
        "mlp_ratio": options.take("mlp_ratio", 4 * 2 / 3),
        "qkv_bias": options.only("qkv_bias", _BOTH, True),
        "norm_eps": 1e-6 if no_norm else norm_eps(options),
        "rope_pretrain_grid": options.take("pt_hw_seq_len", 16),
        "rope_interpolate": options.only("intp_freq", _BOTH, True),
    }
    # The published classes take these and do nothing with them.
    options.inert("rope", "use_rel_pos", "rel_pos_zero_init", "act_layer")
    return arguments


def eva02_options(options: Options) -> dict[str, Any]:
    """Translate the arguments of EVA-02/det's ViT."""
    arguments = _shared(options) | _rotary(options)
    options.inert("xattn", "use_act_checkpoint")  # ways to compute the same
    options.done()
    return arguments


def _tables(vit: PlainViT, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the rotary tables that the published class makes, by its names."""
    head_dim = arguments["embed_dim"] // arguments["num_heads"]
    square = (arguments["img_size"] // arguments["patch_size"],) * 2
    grid = arguments["rope_pretrain_grid"] if arguments["rope_interpolate"] else None
    window, whole = make_ropes("eva02", head_dim, grid, square)
    assert {block.rope for block in vit.units()} <= {window, whole}
    cpu, inside = torch.device("cpu"), (arguments["window_size"],) * 2
    named = {"win": window(inside, square, cpu), "glb": whole(square, square, cpu)}
    return {
        f"rope_{name}.freqs_{kind}": getattr(tables, kind)
        for name, tables in named.items()
        for kind in ("cos", "sin")
    }


def eva02_vit(case: Case, mode: Mode) -> Built:
    """Build EVA-02/det's ViT."""
    arguments = eva02_options(case.config())
    vit = EVA02ViT(**for_mode(arguments, mode))
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        outputs = vit(whole_patches(images[0], vit.patch_size))
        extra = {f"blocks.{i}": tokens for i, tokens in enumerate(recorder.tokens[1:])}
        return outputs, extra | {"tokens_with_pos": recorder.tokens[0]} | _tables(vit, arguments)

    return Built(vit, call, load_by_conversion(case, vit, "eva02"))


def eva02_pyramid(case: Case, mode: Mode) -> Built:
    """Build EVA-02/det's SimpleFeaturePyramid over its ViT."""
    config = case.config()
    arguments = eva02_options(config.section("net"))
    vit = EVA02ViT(**for_mode(arguments, mode))
    model = SimpleFeaturePyramid(vit, **pyramid_options(config.section("pyramid")))
    config.done()
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        levels = model(whole_patches(images[0], vit.patch_size))
        return levels, {"last_feat": recorder.tokens[-1].permute(0, 3, 1, 2)} | _tables(
            vit, arguments
        )

    return Built(model, call, load_by_conversion(case, model, "eva02"))


def eva02_model(is_cascade: bool) -> DictConfig:
    """Return the project's model config of EVA-02-B, as it trains on COCO."""
    model: Any = LazyConfig.load(str(MODELS / "cascade_mask_rcnn_eva02.py"), "model")
    if not is_cascade:
        plain = mask_rcnn(is_cascade=False)
        plain.backbone = model.backbone
        return plain
    return model


def eva02_detector(case: Case, mode: Mode) -> Built:
    """Build an EVA-02 detector whose parts are called one by one."""
    return assemble(
        case,
        mode,
        base=eva02_model,
        net_options=eva02_options,
        load=lambda case, model: load_by_conversion(case, model, "eva02"),
    )


def eva01_vit(case: Case, mode: Mode) -> Built:
    """Build EVA-01/det's ViT."""
    options = case.config()
    eps = 1e-5  # its default is LayerNormWithForceFP32, which differs in other types than float32
    if options.take("norm_layer", None) is not None:
        layer = options.section("norm_layer")
        layer.only("name", ("LayerNorm", "LayerNormWithForceFP32"))
        eps = layer.take("eps", 1e-5)
        layer.done()
    own = options.only("beit_like_qkv_bias", _BOTH, True)
    joint = options.only("qkv_bias", _BOTH, True)
    resize = options.only("interp_type", ("vitdet", "beit"), "vitdet")
    arguments = {
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "qkv_bias": "qv" if own else joint,
        "norm_eps": eps,
        "use_rel_pos": options.only("use_rel_pos", _BOTH, False),
        "rel_pos_resize": "interpolate" if resize == "vitdet" else "beit",
        "layer_scale": options.only("beit_like_gamma", _BOTH, False),
        "freeze_patch_embed": options.only("freeze_patch_embed", _BOTH, False),
    }
    arguments |= _shared(options)
    check_gelu(options)
    options.inert("rel_pos_zero_init", "use_act_checkpoint")  # weights are given; a way to compute
    options.done()
    vit = ViT(**for_mode(arguments, mode))
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        outputs = vit(whole_patches(images[0], vit.patch_size))
        extra = {f"blocks.{i}": tokens for i, tokens in enumerate(recorder.tokens[1:])}
        return outputs, extra | {"tokens_with_pos": recorder.tokens[0]}

    return Built(vit, call, load_by_conversion(case, vit, "eva01"))


def streampetr_vit(case: Case, mode: Mode) -> Built:
    """Build StreamPETR's EVAViT, alone or with its pyramid, which it has inside."""
    options = case.config()
    arguments = _shared(options) | _rotary(options)
    arguments["global_window_size"] = options.take("global_window_size", 0)
    arguments["inner_attn_norm"] = options.only("subln", _BOTH, False)
    arguments["frozen"] = options.only("frozen", _BOTH, False)
    options.inert("with_cp", "flash_attn")  # ways to compute the same
    pyramid = None if options.take("sim_fpn", None) is None else options.section("sim_fpn")
    options.done()
    vit = EVA02ViT(**for_mode(arguments, mode))
    recorder = Recorder(vit)
    # It numbers the levels as if every patch had 16 pixels; ours are named by their strides.
    shift = 4 - int(math.log2(vit.patch_size))
    model = vit if pyramid is None else _streampetr_pyramid(pyramid, vit)
    parameters = _load_streampetr(case, model, shift)

    def call(images: list[torch.Tensor]) -> Any:
        found = model(whole_patches(images[0], vit.patch_size))
        levels = {f"p{int(name[1:]) + shift}": x for name, x in found.items() if pyramid}
        extra = {f"blocks.{i}": tokens for i, tokens in enumerate(recorder.tokens[1:])}
        return levels or {"out": found[vit.out_feature]}, extra

    return Built(model, call, parameters)


def _streampetr_pyramid(options: Options, vit: PlainViT) -> SimpleFeaturePyramid:
    shape = vit.output_shape()[vit.out_feature]
    options.only("in_channels", (shape.channels,), 1024)
    indices = options.take("out_indices", (2, 3, 4, 5))
    scales = options.take("scale_factors", (4, 2, 1, 0.5))
    options.only("top_block", (None,), None)
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


def _load_streampetr(case: Case, model: torch.nn.Module, shift: int) -> dict[str, str]:
    root = "net." if isinstance(model, SimpleFeaturePyramid) else ""

    def ours(name: str) -> str:
        if not name.startswith("adapter.simfp_"):
            return root + name
        level, _, rest = name.removeprefix("adapter.simfp_").partition(".")
        return f"simfp_{int(level) - shift}.{rest}"

    for name in case.info["buffers_not_filled"]:
        if ".freqs_" not in name:
            raise UnsupportedCase(f"{case.name}: vitdet has no buffer {name}")
    model.load_state_dict({ours(name): value for name, value in case.weights().items()})
    return {name: ours(name) for name in case.info["tensors"]}


def timm_eva_map(case: Case, mode: Mode) -> Built:
    """Build timm's Eva as a map: no class token, before its last norm."""
    config = case.config()
    config.only("output", ("map",))
    config.only("class", ("Eva",), "Eva")
    options = config.section("args")
    config.done()
    size = options.take("img_size", 224)
    arguments = {
        "img_size": size,
        "patch_size": options.take("patch_size", 16),
        "in_chans": options.take("in_chans", 3),
        "embed_dim": options.take("embed_dim", 768),
        "depth": options.take("depth", 12),
        "num_heads": options.take("num_heads", 12),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "qkv_bias": options.only("qkv_bias", _BOTH, True),
        "drop_path_rate": options.take("drop_path_rate", 0.0),
        "norm_eps": 1e-6 if options.take("norm_layer", None) is None else norm_eps(options),
        "use_abs_pos": options.only("use_abs_pos_emb", _BOTH, True),
        "pos_embed_resize": "bicubic_antialias",
        "rope_pretrain_grid": options.take("ref_feat_shape", None),
        "rope_resize": "stretch",
        "pretrain_img_size": size,
        "pretrain_use_cls_token": False,
        "inner_attn_norm": options.only("scale_attn_inner", _BOTH, False),
    }
    arguments["inner_attn_norm_eps"] = arguments["norm_eps"]
    _only_eva02(options)
    vit = EVA02ViT(**for_mode(arguments, mode))
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        outputs = {"map": vit(images[0])["last_feat"]}
        tokens = enumerate(recorder.tokens[1:])
        return outputs, {f"blocks.{i}": each.flatten(1, 2) for i, each in tokens}

    return Built(vit, call, load_by_conversion(case, vit, "timm_eva"))


def _only_eva02(options: Options) -> None:
    """Refuse what timm's Eva can be besides EVA-02 without a class token."""
    for key in ("swiglu_mlp", "scale_mlp", "use_rot_pos_emb"):
        options.only(key, (True,), False)
    options.only("qkv_fused", (False,), True)
    options.only("class_token", (False,), True)
    for key in ("qk_norm", "rope_rotate_half", "use_post_norm", "use_pre_transformer_norm"):
        options.only(key, (False,), False)
    for key in ("num_reg_tokens", "swiglu_align_to", "rope_grid_offset"):
        options.only(key, (0,), 0)
    for key in ("init_values", "num_kv_heads", "rope_mrope_section"):
        options.only(key, (None,), None)
    options.only("attn_type", ("eva",), "eva")
    options.only("rope_type", ("cat",), "cat")
    options.only("rope_grid_indexing", ("ij",), "ij")
    options.only("rope_temperature", (10000.0,), 10000.0)
    options.only("dynamic_img_pad", (False,), False)
    # After the map, of tokens that do not exist here, or only in training:
    options.inert("num_classes", "global_pool", "use_fc_norm", "use_post_transformer_norm")
    options.inert("head_init_scale", "no_embed_class", "drop_rate", "pos_drop_rate")
    options.inert("patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "attn_pool_num_heads")
    options.inert("attn_pool_mlp_ratio", "rope_shift_coords", "rope_jitter_coords")
    options.inert("rope_rescale_coords", "attn_only_layer_scale")
    options.inert("dynamic_img_size")  # without it the input has the size of the model
    options.done()
