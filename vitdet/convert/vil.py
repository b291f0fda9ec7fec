"""microsoft/vision-longformer: classifiers; rules for its detectors too.

As converter.py of microsoft/VisionLongformerForObjectDetection does: fused q, k, v are split where
the detector attends sparsely, global tokens get copies, positions are stretched. What that leaves
out without a word is done here, or is in the account.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from vitdet.convert.rules import Drop, File, Format, Inexact, Make, Shape
from vitdet.convert.tensors import Parts, copy, join, part
from vitdet.utils.checks import fail

INDEX = "index of the position table: computed"
CLASSIFIER = "classifier, which a detector does not use"
COPIES = "weights of global tokens: the model's share those of the others"
SHARED = "projection of the values: the model's share that of the keys"
NO_TOKENS = "positions of global tokens: the stage has none"


def _first(parts: Parts) -> torch.Tensor:
    tensor = parts[0]
    assert tensor is not None, "the first source of a rule is never optional"
    return tensor


def _keys_and_values(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return the last two thirds along the first axis: k and v of q, k, v."""
    del shape
    fused = _first(parts)
    if len(fused) % 3:
        remedy = "The file is damaged."
        fail("attn.qkv", expected="a multiple of 3 rows", got=len(fused), remedy=remedy)
    return fused[len(fused) // 3 :].clone()


def _for_every_token(parts: Parts, shape: Shape) -> torch.Tensor:
    """Repeat what one global token has for as many as the model has."""
    tensor = _first(parts)
    fits = tensor.ndim == len(shape) and all(
        rows in (1, wanted) for rows, wanted in zip(tensor.shape, shape, strict=True)
    )
    return tensor.expand(shape).clone() if fits else tensor


def _axis(parts: Parts, shape: Shape) -> torch.Tensor:
    """Stretch positions along one axis (1, S, C), linearly."""
    tensor = _first(parts)
    if tensor.shape[1] == shape[1]:
        return tensor
    # not under autocast or in half precision: this is done once
    return F.interpolate(tensor.float().mT, size=shape[1], mode="linear").mT.to(tensor.dtype)


def _offsets(parts: Parts, shape: Shape) -> torch.Tensor:
    """Stretch relative positions (side * side, N), bilinearly."""
    tensor = _first(parts)
    return tensor if len(tensor) == shape[0] else _stretched(tensor, math.isqrt(shape[0]))


def _tokens(parts: Parts, shape: Shape) -> torch.Tensor:
    """Stretch a projection (G + S * S, F) along the tokens of its square map, bilinearly."""
    tensor = _first(parts)
    if len(tensor) == shape[0]:
        return tensor
    over = len(tensor) - math.isqrt(len(tensor)) ** 2
    map_side = math.isqrt(shape[0] - over)
    return torch.cat([tensor[:over], _stretched(tensor[over:], map_side)])


def _stretched(table: torch.Tensor, side: int) -> torch.Tensor:
    old = math.isqrt(len(table))
    if old * old != len(table):
        remedy = "Check --source-format."
        fail("position table", expected="a square", got=f"{len(table)} rows", remedy=remedy)
    square = table.float().T.unflatten(1, (old, old))[None]
    square = F.interpolate(square, size=(side, side), mode="bilinear", align_corners=False)
    return square[0].flatten(1).T.to(table.dtype).contiguous()


RULES = (
    Drop(r".*\.relative_position_index$", INDEX),
    Drop(r"(norm|head)\.(weight|bias)$", CLASSIFIER),
    Drop(r"(.*\.attn\.(query|kv|proj))_global\.", COPIES, same_as=r"\1."),
    Drop(r"(.*\.attn\.proj)_v$", SHARED, same_as=r"\1_k"),
    Drop(r".*\.cls_pos_embed$", NO_TOKENS),
    Inexact(r".*\.cls_token$", "global tokens"),
    Inexact(r".*\.[xy]_pos_embed$", "absolute positions"),
    Inexact(r".*_relative_position_bias(_table)?$", "relative positions"),
)
MAKES = (
    Make(r"(.*\.attn\.)query(_global)?\.(weight|bias)$", (r"\1qkv.\3",), part(0)),
    Make(r"(.*\.attn\.)kv(_global)?\.(weight|bias)$", (r"\1qkv.\3",), _keys_and_values),
    Make(r"(.*\.attn\.)(query|kv|proj)_global\.(weight|bias)$", (r"\1\2.\3",), copy),
    Make(r"(.*\.attn\.)qkv\.(weight|bias)$", (r"\1query.\2", r"\1kv.\2"), join),
    Make(r"(.*\.attn\.)proj_v$", (r"\1proj_k",), _tokens),
    Make(r".*\.attn\.proj_[kv]$", (r"\g<0>",), _tokens),
    Make(r".*\.(cls_token|cls_pos_embed)$", (r"\g<0>",), _for_every_token),
    Make(r".*\.g2[lg]_relative_position_bias$", (r"\g<0>",), _for_every_token),
    Make(r".*\.[xy]_pos_embed$", (r"\g<0>",), _axis),
    Make(r".*\.local_relative_position_bias_table$", (r"\g<0>",), _offsets),
)
# how often the random features of a performer were drawn
OPTIONAL = (r"num_redraws$", r"calls_since_last_redraw$")


def _recognise(file: File) -> bool:
    return "vitdet" not in file.keys and file.has(r"layer1\.1\.(attn|norm)\.")


FORMAT = Format(
    name="vil",
    what="Vision Longformer classifiers",
    recognise=_recognise,
    rules=RULES,
    makes=MAKES,
    kinds=("vil",),
    optional=OPTIONAL,
)
