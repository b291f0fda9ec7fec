"""Build timm's VisionTransformer and Eva with class and register tokens, and their last norm."""

from __future__ import annotations

from typing import Any

import torch

from vitdet.backbones.vit import PlainViT, ViT

from .build import Built, Mode, Recorder, converted, for_mode, norm_eps
from .cases import Case, Options, UnsupportedCase
from .eva import timm_eva_map
from .mapped import timm_map

_BOTH = (True, False)


def vision_transformer(case: Case, mode: Mode) -> Built:
    """Build timm's VisionTransformer, as a map or with all its tokens."""
    if case.info["config"].get("output") == "map":
        return timm_map(case, mode)
    options = _arguments(case, "VisionTransformer")
    registers = options.take("reg_tokens", 0)
    no_rows = options.only("no_embed_class", _BOTH, False)
    has_class = options.only("class_token", _BOTH, True)
    if registers and not no_rows:
        raise UnsupportedCase(f"{case.name}: pos_embed has rows for register tokens")
    pre_norm = options.only("pre_norm", _BOTH, False)
    final = options.only("final_norm", _BOTH, True)
    options.only("fc_norm", (None, False), None)
    arguments = {
        **_common(options),
        "use_abs_pos": options.only("pos_embed", ("learn", "none", ""), "learn") == "learn",
        "pretrain_use_cls_token": has_class and not no_rows,
        "use_cls_token": has_class,
        "num_register_tokens": registers,
        "pre_norm": pre_norm,
        "final_norm": final,
        "act_layer": options.only("act_layer", ("gelu", "quick_gelu", None), None) or "gelu",
    }
    for key in ("qk_norm", "scale_attn_norm", "scale_mlp_norm", "dynamic_img_pad"):
        options.only(key, (False,), False)
    options.only("proj_bias", (True,), True)
    options.only("embed_norm_layer", (None,), None)
    options.inert("pool_include_prefix", "weight_init", "fix_init")
    options.done()
    return _built(case, ViT(**for_mode(arguments, mode)), "timm")


def eva(case: Case, mode: Mode) -> Built:
    """Build timm's Eva, as a map or with all its tokens: EVA-02 and DINOv3."""
    if case.info["config"].get("output") == "map":
        return timm_eva_map(case, mode)
    options = _arguments(case, "Eva")
    registers = options.take("num_reg_tokens", 0)
    positions = options.only("use_abs_pos_emb", _BOTH, True)
    no_rows = options.only("no_embed_class", _BOTH, False)
    has_class = options.only("class_token", _BOTH, True)
    if registers and positions and not no_rows:
        raise UnsupportedCase(f"{case.name}: pos_embed has rows for register tokens")
    gated = options.only("swiglu_mlp", _BOTH, False)
    inner_norm = options.only("scale_mlp", (gated, False), False)
    dinov3 = options.only("rope_type", ("cat", "dinov3"), "cat") == "dinov3"
    options.only("rope_rotate_half", (dinov3,), False)
    options.only("rope_temperature", (100.0 if dinov3 else 10000.0,), 10000.0)
    options.only("use_rot_pos_emb", (True,), False)
    split = not options.only("qkv_fused", _BOTH, True)
    # without pooling the norm stands after the blocks unless a case says otherwise
    final = options.only("use_post_transformer_norm", (True, False, None), None)
    options.only("use_fc_norm", (False, None), None)
    arguments = {
        **_common(options),
        "use_abs_pos": positions,
        "pretrain_use_cls_token": has_class and not no_rows,
        "use_cls_token": has_class,
        "num_register_tokens": registers,
        "pre_norm": options.only("use_pre_transformer_norm", _BOTH, False),
        "final_norm": final is not False,
        "ffn_layer": ("swiglu_norm" if inner_norm else "swiglu") if gated else "mlp",
        "rope": "dinov3" if dinov3 else "eva02",
        "rope_pretrain_grid": options.take("ref_feat_shape", None),
        "rope_resize": "stretch",
    }
    for key in ("qk_norm", "use_post_norm", "scale_attn_inner", "attn_only_layer_scale"):
        options.only(key, (False,), False)
    for key in ("swiglu_align_to", "rope_grid_offset"):
        options.only(key, (0,), 0)
    for key in ("num_kv_heads", "rope_mrope_section"):
        options.only(key, (None,), None)
    options.only("attn_type", ("eva",), "eva")
    options.only("rope_grid_indexing", ("ij",), "ij")
    options.only("dynamic_img_pad", (False,), False)
    options.inert("head_init_scale", "attn_pool_num_heads", "attn_pool_mlp_ratio")
    options.inert("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords")
    options.done()
    return _built(case, ViT(**for_mode(arguments, mode)), "timm_eva" if split else "dinov3")


def _arguments(case: Case, name: str) -> Options:
    config = case.config()
    config.only("output", ("tokens",))
    config.only("class", (name,), name)
    options = config.section("args")
    config.done()
    return options


def _common(options: Options) -> dict[str, Any]:
    size = options.take("img_size", 224)
    norm = options.take("norm_layer", None)
    # What makes no difference: the head, and what happens in training only.
    options.inert("num_classes", "global_pool", "drop_rate", "pos_drop_rate", "patch_drop_rate")
    options.inert("proj_drop_rate", "attn_drop_rate")
    options.inert("dynamic_img_size")  # without it the input has the size of the model
    return {
        "img_size": size,
        "patch_size": options.take("patch_size", 16),
        "in_chans": options.take("in_chans", 3),
        "embed_dim": options.take("embed_dim", 768),
        "depth": options.take("depth", 12),
        "num_heads": options.take("num_heads", 12),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "qkv_bias": options.only("qkv_bias", _BOTH, True),
        "drop_path_rate": options.take("drop_path_rate", 0.0),
        # "layernorm" is timm's own, with its eps
        "norm_eps": 1e-6 if norm in (None, "layernorm") else norm_eps(options),
        "pos_embed_resize": "bicubic_antialias",
        "pretrain_img_size": size,
        "layer_scale": options.take("init_values", None) is not None,
    }


def _built(case: Case, vit: PlainViT, source_format: str) -> Built:
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        tokens, _ = vit.forward_tokens(images[0])
        blocks = enumerate(recorder.tokens[1:])
        flat = {f"blocks.{i}": _sequence(each) for i, each in blocks}
        return {"tokens": _sequence(tokens)}, flat

    parameters, leaves = converted(case, vit, source_format)
    return Built(vit, call, parameters, leaves=leaves)


def _sequence(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
