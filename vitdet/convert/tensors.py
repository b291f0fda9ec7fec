"""One weight of the model from tensors of a file: computed from others, fitted to its shape."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F

from vitdet.convert.names import Names, Source
from vitdet.convert.rules import Drop, Function, Shape, Shapes
from vitdet.layers.positions import resize_pos_embed, resize_rel_pos
from vitdet.utils.checks import InputError

Grid = tuple[int, int] | None
_SCALE = re.compile(r"(.*)\.ls([12])\.gamma$")
_SCALED = {"1": ("attn.proj",), "2": ("mlp.fc2", "mlp.w3")}

# --- functions of `rules.Make`: (shape in the model, tensors of a file) -> tensor ----------------


def copy(_: Shape, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as it is: another name for the same weight."""
    return tensor


def join(shape: Shape, *parts: torch.Tensor | None) -> torch.Tensor:
    """Concatenate along the first axis; absent parts are zeros: q, no k, v to one bias."""
    given = [part for part in parts if part is not None]
    rows, absent = sum(map(len, given)), len(parts) - len(given)
    left = max(shape[0] - rows, 0) // absent if absent else 0
    zeros = given[0].new_zeros((left, *given[0].shape[1:]))
    return torch.cat([zeros if part is None else part for part in parts])


def part(index: int, count: int = 3, to: int | None = None) -> Function:
    """Return the function that takes part `index` (or up to `to`) of `count` equal ones."""

    def take(_: Shape, whole: torch.Tensor) -> torch.Tensor:
        rows, rest = divmod(len(whole), count)
        if rest:
            text = f"expected a multiple of {count} rows, got {len(whole)}. The file is damaged."
            raise InputError(f"attn.qkv: {text}")
        return whole[index * rows : (to or index + 1) * rows].clone()

    return take


def scaled_by_head(_: Shape, table: torch.Tensor) -> torch.Tensor:
    """Multiply a table (places, D) by D ** -0.5: tables learned for scaled queries."""
    return table * table.shape[-1] ** -0.5


def positions(shape: Shape, tensor: torch.Tensor) -> torch.Tensor:
    """Return a class token or positions as (1, rows, C), from (C), (rows, C) or (1, H, W, C)."""
    rows = tensor.flatten(1, 2) if tensor.ndim == 4 else tensor
    return rows[(None,) * max(len(shape) - rows.ndim, 0)]


def kernel(shape: Shape, tensor: torch.Tensor) -> torch.Tensor:
    """Return a patch kernel (C, channels, P, P), from a linear layer's (C, P * P * channels) too.

    The layer reads the rows of a patch, in each its pixels, in each their channels (SigLIP 2).
    """
    if tensor.ndim != 2:
        return tensor
    side = math.isqrt(tensor.shape[1] // shape[1])
    if side * side * shape[1] != tensor.shape[1]:
        return tensor
    return tensor.unflatten(1, (side, side, shape[1])).permute(0, 3, 1, 2).contiguous()


def zeros(shape: Shape, neighbour: torch.Tensor) -> torch.Tensor:
    """Return zeros where a file has no tensor, of the kind of its neighbour."""
    return neighbour.new_zeros(shape)


def masked(_: Shape, bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the bias where the mask is one, and zeros for k, where it is zero or not a number."""
    return torch.where(mask == 1, bias, torch.zeros_like(bias))


def centred(shape: Shape, kernel: torch.Tensor) -> torch.Tensor:
    """Put a kernel into the middle of a larger one, with zeros round it."""
    more = shape[-1] - kernel.shape[-1] if kernel.ndim == len(shape) == 4 else 0
    return kernel if more <= 0 or more % 2 else F.pad(kernel, [more // 2] * 4)


def every_token(shape: Shape, tensor: torch.Tensor) -> torch.Tensor:
    """Repeat what one global token has for as many as the model has."""
    pairs = zip(tensor.shape, shape, strict=False)
    fits = tensor.ndim == len(shape) and all(rows in (1, wanted) for rows, wanted in pairs)
    return tensor.expand(shape).clone() if fits else tensor


def axis(shape: Shape, tensor: torch.Tensor) -> torch.Tensor:
    """Stretch positions along one axis (1, S, C), linearly."""
    if tensor.shape[1] == shape[1]:
        return tensor
    # not under autocast or in half precision: this is done once
    return F.interpolate(tensor.float().mT, size=shape[1], mode="linear").mT.to(tensor.dtype)


def offsets(shape: Shape, tensor: torch.Tensor) -> torch.Tensor:
    """Stretch relative positions (side * side, N), bilinearly."""
    return tensor if len(tensor) == shape[0] else _stretched(tensor, math.isqrt(shape[0]))


def tokens(shape: Shape, tensor: torch.Tensor) -> torch.Tensor:
    """Stretch a projection (G + S * S, F) along the tokens of its square map, bilinearly."""
    if len(tensor) == shape[0]:
        return tensor
    first = len(tensor) - math.isqrt(len(tensor)) ** 2  # global tokens
    map_side = math.isqrt(shape[0] - first)
    return torch.cat([tensor[:first], _stretched(tensor[first:], map_side)])


def _stretched(table: torch.Tensor, side: int) -> torch.Tensor:
    old = math.isqrt(len(table))
    if old * old != len(table):
        text = f"expected a square, got {len(table)} rows. Check --source-format."
        raise InputError(f"position table: {text}")
    square = table.float().T.unflatten(1, (old, old))[None]
    square = F.interpolate(square, size=(side, side), mode="bilinear", align_corners=False)
    return square[0].flatten(1).T.to(table.dtype).contiguous()


# --- the shape of the model ----------------------------------------------------------------------


def fit(
    name: str, tensor: torch.Tensor, shape: Shape, *, resize_kernel: bool, source: str, grid: Grid
) -> tuple[torch.Tensor, list[str]]:
    """Return a tensor of a backbone in the model's shape, and notes about what that took.

    Positions are resized as detectron2 does at run time (bicubic; linear for relative ones), patch
    kernels, where that is allowed, as baaivision/EVA does for its "p14to16" files (bicubic). `grid`
    is (H, W) of the model's absolute positions, None for a square; a file's are square.
    """
    if tuple(tensor.shape) == shape:
        return tensor, []
    if name == "pos_embed" and tensor.ndim == len(shape) == 3 and tensor.shape[2] == shape[2]:
        return _pos_embed(tensor, shape, source, grid)
    if name.endswith((".rel_pos_h", ".rel_pos_w")) and tensor.ndim == len(shape) == 2:
        places = (shape[0] + 1) // 2
        return resize_rel_pos(tensor.float(), places).to(tensor.dtype).contiguous(), []
    if name == "patch_embed.proj.weight" and tuple(tensor.shape[:2]) == shape[:2]:
        have, want = tensor.shape[-1], shape[-1]
        if not resize_kernel:
            raise InputError(
                f"{source}: {name}: expected patch size {want} (model), got patch size {have} "
                "(file). Take a recipe with its patch size, or --resize-patch-embed (bicubic)."
            )
        sizes = {"size": shape[-2:], "mode": "bicubic", "align_corners": False}
        kernel = F.interpolate(tensor.float(), **sizes).to(tensor.dtype)
        return kernel, [f"patch_embed resampled from {have} to {want} pixels"]
    return tensor, []


def class_rows(rows: int, what: str, grid: Grid = None) -> int:
    """Return how many rows of a position embedding stand before its grid, or square: 0 or 1."""
    for before in (0, 1):
        if rows - before == (math.prod(grid) if grid else math.isqrt(rows - before) ** 2):
            return before
    raise InputError(
        f"{what}: expected a square grid, with or without one class row, got {rows} rows. "
        "Files with more tokens (distillation) or other grids cannot be used."
    )


def _pos_embed(
    tensor: torch.Tensor, shape: Shape, source: str, grid: Grid
) -> tuple[torch.Tensor, list[str]]:
    want = class_rows(shape[1], f"{source}: pos_embed of the model", grid)
    height, width = grid or (math.isqrt(shape[1] - want),) * 2
    same = tensor.shape[1] - height * width in (0, 1)
    of_file = f"{source}: pos_embed of the file"
    have = class_rows(tensor.shape[1], of_file, (height, width) if same else None)
    notes = []
    places = tensor[:, have:]
    if places.shape[1] != height * width:
        side = math.isqrt(places.shape[1])
        resized = resize_pos_embed(places.float(), (height, width))
        places = resized.to(tensor.dtype).flatten(1, 2)
        if side > min(height, width):
            notes.append(
                f"pos_embed shrinks from {side}x{side} to {height}x{width} places: to keep "
                f"all, set the backbone's pretrain_img_size to {side} times its patch size"
            )
    if want and not have:
        notes.append("pos_embed: class row filled with zeros, the file has none")
        places = torch.cat([places.new_zeros(1, 1, shape[2]), places], dim=1)
    elif want:
        places = torch.cat([tensor[:, :1], places], dim=1)
    elif have:
        notes.append("pos_embed: class row dropped, the model has none")
    return places.contiguous(), notes


# --- several weights at once ---------------------------------------------------------------------


def add_class_row(given: dict[str, Source], names: Names, target: Shapes, source: str) -> list[str]:
    """Add the row of `pos_embed` to the class token when the model has the token and no row.

    The first block reads the sum of both, so the network stays the same. timm does so for DINOv2
    with registers (huggingface/pytorch-image-models, models/vision_transformer.py). Returns notes.
    """
    token, positions = given.get("cls_token"), given.get("pos_embed")
    shape = target.get(names.in_model("pos_embed") or "")
    if token is None or positions is None or names.in_model("cls_token") not in target:
        return []
    if shape is None or positions.tensor.ndim not in (2, 3):
        return []
    rows = positions.tensor[(None,) * (3 - positions.tensor.ndim)]
    has = class_rows(rows.shape[1], f"{source}: pos_embed of the file")
    if not has or class_rows(shape[1], f"{source}: pos_embed of the model"):
        return []
    tensor = token.tensor + rows[:, :1].reshape(token.tensor.shape)
    given["cls_token"] = Source((*token.keys, *positions.keys), tensor, token.rule)
    given["pos_embed"] = Source(positions.keys, rows[:, 1:], positions.rule)
    return ["pos_embed: class row added to cls_token, the model has none"]


def split_distillation(given: dict[str, Source], source: str) -> list[str]:
    """Make of a distillation token, with its own row of `pos_embed`, a register token.

    The first block reads their sum, so the network stays the same (Touvron et al., "Training
    data-efficient image transformers", Sec. 4). Returns notes.
    """
    token, positions = given.pop("dist_token", None), given.get("pos_embed")
    if token is None or positions is None:
        return []
    rows = positions.tensor[(None,) * (3 - positions.tensor.ndim)]
    if math.isqrt(rows.shape[1] - 2) ** 2 != rows.shape[1] - 2:
        got = f"got {rows.shape[1]} rows"
        raise InputError(f"{source}: pos_embed: expected two rows before a square grid, {got}.")
    keys = (*token.keys, *positions.keys)
    drop = Drop("", "distillation token: a detector's backbone has none")
    given["reg_token"] = Source(keys, token.tensor + rows[:, 1:2], drop)
    kept = torch.cat([rows[:, :1], rows[:, 2:]], dim=1)
    given["pos_embed"] = Source(positions.keys, kept, positions.rule)
    return ["pos_embed: its row of the distillation token goes with that token"]


def fold(given: dict[str, Source], names: Names, target: Shapes, source: str) -> list[str]:
    """Multiply every LayerScale into the layer before it; return notes.

    gamma * (W x + b) = (gamma W) x + gamma b (Touvron et al., "Going deeper with Image
    Transformers", Sec. 2).

    Raises:
        InputError: the file has no LayerScale, or the model has.
    """
    scales = {name: found for name in given if (found := _SCALE.match(name))}
    kept = [name for name in scales if names.in_model(name) in target]
    if kept or not scales:
        got = f"{kept[0]} in the model" if kept else "none in the file"
        text = f"expected LayerScale in the file alone, got {got}. Leave the option out."
        raise InputError(f"{source}: --fold-layer-scale: {text}")
    for name, found in scales.items():
        scale = given.pop(name)
        layers = (f"{found[1]}.{layer}" for layer in _SCALED[found[2]])
        for each in (f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")):
            if each in given:
                weight = given[each]
                rows = scale.tensor.float().reshape(-1, *[1] * (weight.tensor.ndim - 1))
                tensor = (weight.tensor.float() * rows).to(weight.tensor.dtype)
                given[each] = Source((*weight.keys, *scale.keys), tensor, weight.rule)
    return [f"LayerScale of {len(scales)} branches folded into the layers before it"]
