"""Fit the tensors of a file to a model: positions, patch kernels, the class row, LayerScale."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F

from vitdet.convert.names import Names, Source
from vitdet.convert.rules import Drop, Shape, Shapes
from vitdet.layers.positions import resize_pos_embed, resize_rel_pos
from vitdet.utils.checks import InputError

Grid = tuple[int, int] | None
_SCALE = re.compile(r"(.*)\.ls([12])\.gamma$")
_SCALED = {"1": ("attn.proj",), "2": ("mlp.fc2", "mlp.w3")}


def fit(
    name: str,
    tensor: torch.Tensor,
    shape: Shape,
    *,
    resize_patch_embed: bool,
    source: str,
    grid: Grid = None,
) -> tuple[torch.Tensor, list[str]]:
    """Return a tensor of a backbone in the model's shape, and notes about what that took.

    Position embeddings are resized as detectron2 does at run time (bicubic), relative position
    tables linearly, patch kernels on demand. Anything else comes back as it is.

    Args:
        name: inside the backbone, as detectron2 spells it.
        tensor: the file's.
        shape: the model's.
        resize_patch_embed: whether a kernel may be resampled (bicubic), as
            baaivision/EVA does for its "p14to16" files; another patch size is an error else.
        source: the file, for messages.
        grid: (H, W) of the model's absolute positions, None for a square. A file's are square.
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
        if not resize_patch_embed:
            raise InputError(
                f"{source}: {name}: expected patch size {want} (model), got patch size {have} "
                "(file). Use a recipe with its patch size, or allow to resample the kernel "
                "(bicubic): --resize-patch-embed."
            )
        sizes = {"size": shape[-2:], "mode": "bicubic", "align_corners": False}
        kernel = F.interpolate(tensor.float(), **sizes).to(tensor.dtype)
        return kernel, [f"patch_embed resampled from {have} to {want} pixels"]
    return tensor, []


def class_rows(rows: int, what: str, grid: Grid = None) -> int:
    """Return how many of the rows of a position embedding stand before its grid: 0 or 1.

    The grid is a square where it is not given.
    """
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
        raise InputError(
            f"{source}: --fold-layer-scale: expected LayerScale in the file alone, got {got}. "
            "Leave the option out."
        )
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
