"""facebookresearch/dinov3: ViT backbones, under its own names and under those of timm.

dinov3/models/vision_transformer.py; timm: models/eva.py with rope_type "dinov3". Positions are
rotary, so the model needs `rope="dinov3"` and `use_abs_pos=False`. k has no bias: the original
keeps a bias of q, k and v with a mask over it, timm has one of q and v, or none at all where the
published ones are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitdet.convert.mae import CLASS_TOKEN, CLASSIFIER, FINAL_NORM, MASK_TOKEN, REGISTERS
from vitdet.convert.rules import Drop, File, Format, Make, Rename, Shape
from vitdet.convert.tensors import copy, join, zeros

_QKV = r"(.*\.attn\.)qkv\.bias$"
_PERIODS = "periods of the rotary positions: computed (the file has them rounded to bfloat16)"


def _recognise(file: File) -> bool:
    blocks = file.has(r"(.*\.)?blocks\.(0\.)?0\.attn\.qkv\.weight$")
    if not blocks or file.has(r"(.*\.)?pos_embed$"):
        return False
    timm = file.has(r"reg_token$") and file.has(r"blocks\.0\.gamma_1$")
    return timm or file.has(r"(.*\.)?storage_tokens$")


def masked(parts: Sequence[torch.Tensor | None], shape: Shape) -> torch.Tensor:
    """Return the bias where the mask is one, and zeros for k, where it is zero or not a number."""
    del shape
    bias, mask = parts
    assert bias is not None
    assert mask is not None
    return torch.where(mask == 1, bias, torch.zeros_like(bias))


FORMAT = Format(
    name="dinov3",
    what="DINOv3 ViT of its own repository, and under timm's names",
    recognise=_recognise,
    rules=(
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"storage_tokens$", REGISTERS, "reg_token"),
        Drop(r"reg_token$", REGISTERS),
        Drop(r"mask_token$", MASK_TOKEN),
        Drop(r"rope_embed\.periods$", _PERIODS),
        Drop(r"norm\.|cls_norm\.|local_cls_norm\.", FINAL_NORM),
        Drop(r"(fc_norm|head)\.", CLASSIFIER),
        Rename(r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        Rename(r"(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
        Rename(r"(blocks\.\d+\.mlp)\.fc1_g\.", r"\1.w1."),
        Rename(r"(blocks\.\d+\.mlp)\.fc1_x\.", r"\1.w2."),
    ),
    outside=(Drop(r"(dino|ibot)_head\.|gram_", "heads of the pretraining"),),
    makes=(
        Make(_QKV, (r"\1qkv.bias", r"\1qkv.bias_mask"), masked),
        Make(_QKV, (r"\1q_bias", r"?\1k_bias", r"\1v_bias"), join),
        Make(_QKV, (r"\1qkv.weight",), zeros, "biases of q, k and v are zero: the file has none"),
        Make(r"(.*\.mlp\.)w3\.(weight|bias)$", (r"\1fc2.\2",), copy),
    ),
    settings=(("rope", "dinov3"), ("norm_eps", 1e-5)),
)
