"""What a recipe's plain ViT has to be for given weights: the recipe follows the file.

Sizes come from the shapes, what no shape tells from config.json, or from the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitdet.app.inspect import backbone_shapes, describe, is_foundation
from vitdet.convert import FORMATS
from vitdet.utils.checks import InputError

# Heads whose channels are not 64, by width: ViT-H, EVA-g, SigLIP-so400m, ViT-G
_HEADS = {1280: 16, 1408: 16, 1152: 16, 1664: 16}
_ACTIVATIONS = {
    **{"gelu": "gelu", "quick_gelu": "quick_gelu", "silu": "gelu"},  # silu is that of a SwiGLU
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
}


def net_settings(
    content: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    weights: str | None = None,
    patch_size: int = 16,
    source: str = "source",
) -> dict[str, Any]:
    """Return {argument of `vitdet.backbones.vit.ViT`: value}, as far as a file tells them.

    Args:
        content: of a file of a foundation model, as `vitdet.checkpoint.read` returned it.
        config: config.json of its folder, {} where there is none.
        weights: the key of the file that holds the state dict, None to find it.
        patch_size: of the model; positions keep the file's grid.
        source: the file, for messages.

    Returns:
        {} for detectors, files of ours, unknown formats, and backbones that are no plain ViT.

    Raises:
        InputError: config.json and the weights are of two models; an activation that ours lack.
    """
    found = describe(content, weights=weights, source=source)
    sizes = found["backbone"]
    if not is_foundation(found):
        return {}
    config = vision if isinstance(vision := config.get("vision_config"), Mapping) else config
    for ours, theirs in (("embed_dim", "hidden_size"), ("depth", "num_hidden_layers")):
        if config.get(theirs, sizes[ours]) != sizes[ours]:
            raise InputError(
                f"{source}: config.json says {theirs} {config[theirs]}, the weights have "
                f"{sizes[ours]}: they are not of one model. Fetch both anew."
            )
    inside = backbone_shapes(content, found["format"], weights=weights, source=source)
    first = {name[9:]: shape for name, shape in inside.items() if name.startswith("blocks.0.")}
    settings = {name: sizes[name] for name in ("embed_dim", "depth", "qkv_bias", "layer_scale")}
    settings |= _heads(sizes, config, found["format"])
    settings |= _feed_forward(first, sizes["embed_dim"])
    settings |= _positions(sizes, inside, patch_size)
    settings["pre_norm"] = "norm_pre.weight" in inside
    settings |= _untold(found["format"], content, config, settings, source)
    if settings["rope"] == "pe":
        grid = sizes.get("pos_embed_grid", [16])[0]
        settings |= {"rope_pretrain_grid": grid, "pos_embed_resize": "tile"}
        settings |= {"patch_bias": "patch_embed.proj.bias" in inside, "use_rel_pos": False}
    depth = settings["depth"]
    settings["global_block_indexes"] = sorted({max(depth * k // 4 - 1, 0) for k in (1, 2, 3, 4)})
    if sizes["kind"] == "eva02":
        grid = sizes.get("pos_embed_grid", [16])[0]
        settings |= {"split_qkv": True, "rope": "eva02", "rope_pretrain_grid": grid}
        settings |= {"inner_attn_norm": "attn.inner_attn_ln.weight" in first, "use_rel_pos": False}
    return settings


def _heads(sizes: Mapping[str, Any], config: Mapping[str, Any], fmt: str) -> dict[str, int]:
    width = sizes["embed_dim"]
    told = config.get("num_attention_heads", sizes.get("num_heads"))
    usual: int = width // 64 or 1
    if not fmt.startswith(("dino", "hf_dino")):
        usual = (_HEADS | {1536: 16} if ("rope", "pe") in FORMATS[fmt].settings else _HEADS).get(
            width, usual
        )
    return {"num_heads": int(told or usual)}


def _feed_forward(first: Mapping[str, tuple[int, ...]], width: int) -> dict[str, Any]:
    last = next((first[f"mlp.{n}.weight"] for n in ("fc2", "w3") if f"mlp.{n}.weight" in first), ())
    hidden = last[-1] if last else 4 * width
    gated = any(name.startswith(("mlp.w1", "mlp.w12.")) for name in first)
    gated = gated or first.get("mlp.fc1.weight", (0,))[0] == 2 * hidden
    kind = "mlp" if not gated else "swiglu_norm" if "mlp.ffn_ln.weight" in first else "swiglu"
    ratio = hidden / width
    if int(width * ratio) != hidden:  # the product may round down
        ratio = (hidden + 0.5) / width
    return {"mlp_ratio": ratio, "ffn_layer": kind}


def _positions(
    sizes: Mapping[str, Any], inside: Mapping[str, tuple[int, ...]], patch_size: int
) -> dict[str, Any]:
    if not sizes.get("use_abs_pos"):
        return {"use_abs_pos": False}
    grid, row = sizes.get("pos_embed_grid"), sizes.get("pretrain_use_cls_token", False)
    if "dist_token" in inside:
        rows = inside["pos_embed"][-2]
        grid, row = [round((rows - 2) ** 0.5)] * 2, True
    if grid is None:
        return {"use_abs_pos": True}
    size = grid[0] * patch_size
    square = grid[0] == grid[1]
    pretrain: Any = size if square else [side * patch_size for side in grid]
    return {"use_abs_pos": True, "pretrain_img_size": pretrain, "pretrain_use_cls_token": row}


def _untold(
    fmt: str,
    content: Mapping[str, Any],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    source: str,
) -> dict[str, Any]:
    """Return the epsilon, the activation and the rotary positions, which no shape tells."""
    known = {key: value for key, value in FORMATS[fmt].settings if "." not in key}
    eps, act, timm = known.get("norm_eps", 1e-6), "gelu", str(config.get("architecture", ""))
    if fmt == "hf_vit" and not settings["layer_scale"]:
        eps = 1e-12
    elif fmt == "hf_clip" and not settings["pre_norm"]:
        act = "gelu_tanh"  # SigLIP
    elif fmt in ("clip", "hf_clip") or settings["pre_norm"]:
        eps = 1e-5
        ours = {"input_resolution", "context_length"} & set(content)  # OpenAI's archives
        act = "quick_gelu" if fmt == "hf_clip" or ours or "quickgelu" in timm else "gelu"
    elif "siglip" in timm and "siglip2" not in timm:
        act = "gelu_tanh"
    if "hidden_act" in config:
        if config["hidden_act"] not in _ACTIVATIONS:
            text = f"expected one of {', '.join(_ACTIVATIONS)}, got {config['hidden_act']}"
            raise InputError(
                f"{source}: config.json: hidden_act: {text}. Our models have no other."
            )
        act = _ACTIVATIONS[config["hidden_act"]]
    eps = config.get("layer_norm_eps", eps)
    return {"norm_eps": float(eps), "act_layer": act, "rope": known.get("rope", "none")}


def pixels(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return "pixel_mean" and "pixel_std" of the pretraining, {} where no json tells them.

    Args:
        config: config.json of timm, which has them under "pretrained_cfg".
        preprocessor: preprocessor_config.json of transformers.
    """
    timm = config.get("pretrained_cfg")
    timm = timm if isinstance(timm, Mapping) else {}
    found = {}
    for name, ours, theirs in (
        ("mean", "pixel_mean", "image_mean"),
        ("std", "pixel_std", "image_std"),
    ):
        values = timm.get(name, preprocessor.get(theirs))
        if not isinstance(values, list) or len(values) != 3:
            return {}
        found[ours] = [round(255 * float(value), 3) for value in values]
    return found
