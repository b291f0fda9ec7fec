"""Build the ViTs of SAM, transformers and timm, whose weights go through `vitdet.convert`."""

from __future__ import annotations

from typing import Any

import torch

from vitdet.backbones.vit import ViT

from .build import (
    Built,
    Mode,
    Recorder,
    block_outputs,
    check_gelu,
    for_mode,
    load_by_conversion,
    norm_eps,
    whole_patches,
)
from .cases import Case


def sam_encoder(case: Case, mode: Mode) -> Built:
    """Build the ViT of SAM's image encoder; its neck has no counterpart here."""
    options = case.config()
    depth = options.take("depth", 12)
    arguments = {
        "img_size": options.take("img_size", 1024),
        "patch_size": options.take("patch_size", 16),
        "in_chans": options.take("in_chans", 3),
        "embed_dim": options.take("embed_dim", 768),
        "depth": depth,
        "num_heads": options.take("num_heads", 12),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "qkv_bias": options.only("qkv_bias", (True, False), True),
        "norm_eps": norm_eps(options),
        "use_abs_pos": options.only("use_abs_pos", (True, False), True),
        "use_rel_pos": options.only("use_rel_pos", (True, False), False),
        "window_size": options.take("window_size", 0),
        "global_block_indexes": list(options.take("global_attn_indexes", ())),
        # Positions of the model's own grid, without a class row.
        "pretrain_img_size": options.take("img_size", 1024),
        "pretrain_use_cls_token": False,
    }
    check_gelu(options)
    options.inert("rel_pos_zero_init", "out_chans")  # weights are given; the neck's channels
    options.done()
    vit = ViT(**for_mode(arguments, mode))
    parameters = load_by_conversion(case, vit, "sam")
    return Built(vit, block_outputs(vit), parameters, frozenset({"neck"}))


def hf_backbone(case: Case, mode: Mode) -> Built:
    """Build the VitDetBackbone of transformers; outputs are "stem" and "stage1", "stage2", ..."""
    options = case.config()
    depth = options.take("num_hidden_layers", 12)
    windows = set(options.take("window_block_indices", ()))
    arguments = {
        "img_size": options.take("image_size", 224),
        "patch_size": options.take("patch_size", 16),
        "in_chans": options.take("num_channels", 3),
        "embed_dim": options.take("hidden_size", 768),
        "depth": depth,
        "num_heads": options.take("num_attention_heads", 12),
        "mlp_ratio": options.take("mlp_ratio", 4),
        "qkv_bias": options.only("qkv_bias", (True, False), True),
        "drop_path_rate": options.take("drop_path_rate", 0.0),
        "norm_eps": options.take("layer_norm_eps", 1e-6),
        "use_abs_pos": options.only("use_absolute_position_embeddings", (True, False), True),
        "use_rel_pos": options.only("use_relative_position_embeddings", (True, False), False),
        "window_size": options.take("window_size", 0),
        "global_block_indexes": [i for i in range(depth) if i not in windows],
        "residual_block_indexes": list(options.take("residual_block_indices", ())),
        "pretrain_img_size": options.take("pretrain_image_size", 224),
        "pretrain_use_cls_token": True,
    }
    options.only("hidden_act", ("gelu",), "gelu")  # the exact one, the only one of vitdet's ViT
    options.inert("dropout_prob", "initializer_range", "out_features", "out_indices")
    options.done()
    vit = ViT(**for_mode(arguments, mode))
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        vit(whole_patches(images[0], vit.patch_size))
        maps = [tokens.permute(0, 3, 1, 2) for tokens in recorder.tokens]
        outputs = {f"stage{i}": each for i, each in enumerate(maps) if i} | {"stem": maps[0]}
        return outputs, {f"hidden_states.{i}": each for i, each in enumerate(maps)}

    return Built(vit, call, load_by_conversion(case, vit, "hf_vitdet"))


def timm_map(case: Case, mode: Mode) -> Built:
    """Build timm's VisionTransformer as a map: no class token, before its last norm."""
    config = case.config()
    config.only("output", ("map",))
    config.only("class", ("VisionTransformer",), "VisionTransformer")
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
        "qkv_bias": options.only("qkv_bias", (True, False), True),
        "drop_path_rate": options.take("drop_path_rate", 0.0),
        "norm_eps": 1e-6 if options.take("norm_layer", None) is None else norm_eps(options),
        "use_abs_pos": options.only("pos_embed", ("learn", "none", ""), "learn") == "learn",
        "pos_embed_resize": "bicubic_antialias",
        "pretrain_img_size": size,
        "pretrain_use_cls_token": False,
        "layer_scale": options.take("init_values", None) is not None,
    }
    check_gelu(options)
    options.only("class_token", (False,), True)
    options.only("reg_tokens", (0,), 0)
    for key in ("qk_norm", "scale_attn_norm", "scale_mlp_norm", "pre_norm", "dynamic_img_pad"):
        options.only(key, (False,), False)
    options.only("proj_bias", (True,), True)
    options.only("embed_norm_layer", (None,), None)
    # After the map, of tokens that do not exist here, or only in training:
    options.inert("num_classes", "global_pool", "final_norm", "fc_norm", "no_embed_class")
    options.inert("pool_include_prefix", "weight_init", "fix_init", "drop_rate", "pos_drop_rate")
    options.inert("patch_drop_rate", "proj_drop_rate", "attn_drop_rate")
    options.inert("dynamic_img_size")  # without it the input has the size of the model
    options.done()
    vit = ViT(**for_mode(arguments, mode))
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        outputs = {"map": vit(images[0])["last_feat"]}
        tokens = enumerate(recorder.tokens[1:])
        return outputs, {f"blocks.{i}": each.flatten(1, 2) for i, each in tokens}

    return Built(vit, call, load_by_conversion(case, vit, "timm"))
