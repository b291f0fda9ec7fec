"""What a file holds, read off its names and shapes: format, architecture, head, numbers."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from vitdet.convert.engine import detect
from vitdet.convert.formats import FORMATS
from vitdet.convert.names import Names, kind_of, nests, shapes_of, unnest
from vitdet.convert.rules import KINDS, Shape, Shapes, root_of
from vitdet.utils.checks import InputError

_PATCH = "patch_embed.proj.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
# blocks of networks in stages: of a Vision Longformer, of a ViTAE-S
_STAGE = re.compile(r"layer(\d+)\.(\d+)\.(.+)$|layers\.(\d+)\.NC\.(\d+)\.(.+)$")
_LEVEL = re.compile(r"/backbone\.(?:simfp_|fpn_output)(\d)\.")
_CLASSIFIER = re.compile(r"/roi_heads\.box_predictor\.(?:(\d+)\.)?cls_score\.weight$")
_REGRESSOR = re.compile(r"/roi_heads\.box_predictor\.(?:\d+\.)?bbox_pred\.weight$")
# the MLP's last layer: the first one is twice as wide where SwiGLU packs its two into one
_LAST = ("mlp.fc2.weight", "mlp.w3.weight")


def describe(
    content: Mapping[str, Any], *, weights: str | None = None, source: str = "source"
) -> dict[str, Any]:
    """Describe a file by plain values, for JSON.

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict; tensors without data do.
        weights: the key of the file that holds the state dict; None to find it.
        source: the file's name, for messages.

    Returns:
        "format" ("" for an unknown one) and "what" it is, "nested_under" which key the state dict
        lies, what else is "beside" it, the "backbone_root" before its names; "tensors",
        "parameters", "bytes", "dtypes" {dtype: tensors}; sizes of the "backbone" as
        `vitdet.backbones` names them, as far as shapes tell; levels of the "pyramid"; kind of the
        "head" and its classes, {} for a backbone; of files of ours "class_names" and what is left
        "initialised" by the model itself; "notes".

    Raises:
        InputError: there is no state dict in it.
    """
    state_dict, nest = unnest(content, source, weights)
    tensors = state_dict.values()
    others = [key for key in nests(content) if key != nest] if nest else []
    notes = [f"other weights: {', '.join(others)} (--weights)"] if others else []
    fmt, what = "", ""
    try:
        fmt = detect(content, weights)
        what = FORMATS[fmt].what
    except InputError as error:
        notes.append(str(error).removeprefix("source: "))
    about = content.get("vitdet")
    about = about if isinstance(about, Mapping) else {}
    lists = {
        word: [str(name) for name in names] if isinstance(names := about.get(word), list) else []
        for word in ("class_names", "initialised")
    }
    if isinstance(origin := about.get("source_format"), str):
        notes.append(f"converted from {origin}")
    inner, root = _inner(shapes_of(state_dict), fmt)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    levels = sorted({found[1] for found in map(_LEVEL.match, inner) if found})
    return {
        "format": fmt,
        "what": what,
        "nested_under": nest,
        "beside": sorted({str(key) for key in content} - {nest}) if nest else [],
        "backbone_root": root,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "dtypes": dict(dtypes.most_common()),
        "backbone": _backbone({k: v for k, v in inner.items() if not k.startswith("/")}, fmt),
        "pyramid": [f"p{level}" for level in levels],
        "head": _head(inner),
        **lists,
        "notes": notes,
    }


def backbone_shapes(
    content: Mapping[str, Any], fmt: str, *, weights: str | None = None, source: str = "source"
) -> dict[str, Shape]:
    """Return {name in the backbone, as ours: shape} of a file; arguments as of `describe`."""
    inner, _ = _inner(shapes_of(unnest(content, source, weights)[0]), fmt)
    return {name: shape for name, shape in inner.items() if not name.startswith("/")}


def _inner(shapes: Shapes, format_name: str) -> tuple[dict[str, Shape], str]:
    """Return {inner name: shape}, see `vitdet.convert.names`, and the backbone's root."""
    fmt = FORMATS.get(format_name)
    anchors = [fmt.anchor] if fmt and fmt.anchor else [_PATCH, *(kind.anchor for kind in KINDS)]
    root = root_of(shapes, *anchors)
    if root is None:
        return dict(shapes), ""
    if fmt is None:
        return {name.removeprefix(root): shape for name, shape in shapes.items()}, root
    names = Names(fmt, root, "")
    return {names.of_file(name)[0]: shape for name, shape in shapes.items()}, root


def _at(shape: Shape, index: int) -> int:
    """Return one number of a shape, 0 when it has fewer: a damaged file may have any shape."""
    return shape[index] if -len(shape) <= index < len(shape) else 0


def _backbone(inside: Shapes, fmt: str) -> dict[str, Any]:
    try:
        kind = kind_of(inside)[0]
        if fmt and len(FORMATS[fmt].kinds) == 1:  # q, k and v may be apart in the file alone
            kind = next(each for each in KINDS if each.name == FORMATS[fmt].kinds[0])
        found: dict[str, Any] = {"kind": kind.name, "what": kind.what}
    except InputError:
        found = {}
    if any(map(_STAGE.match, inside)):
        return found | _stages(inside)
    if _PATCH in inside and any(map(_BLOCK.match, inside)):
        return found | _plain(inside)
    return found


def _plain(inside: Shapes) -> dict[str, Any]:
    """Return the sizes of a backbone of equal blocks: ViT, EVA, ViTAE-B."""
    kernel = inside[_PATCH]
    width, patch = _at(kernel, 0), _at(kernel, -1)
    blocks = [(int(found[1]), found[2]) for found in map(_BLOCK.match, inside) if found]
    first = {name: inside[f"blocks.0.{name}"] for block, name in blocks if block == 0}
    sizes: dict[str, Any] = {"embed_dim": width, "depth": len({block for block, _ in blocks})}
    head_dim = _head_dim(inside, first)
    if head_dim and width % head_dim == 0:
        sizes["num_heads"] = width // head_dim
    elif heads := _at(first.get("attn.relative_position_bias_table", ()), 1):
        sizes["num_heads"] = heads
    sizes |= {"patch_size": patch, "in_chans": _at(kernel, 1)}
    hidden = next((_at(first[name], 1) for name in _LAST if name in first), 0)
    if hidden and width:
        sizes["mlp_ratio"] = round(hidden / width, 4)
    names = set(first)
    sizes["qkv_bias"] = bool(names & {"attn.qkv.bias", "attn.q_bias", "attn.q_proj.bias"})
    sizes["layer_scale"] = bool(names & {"ls1.gamma", "gamma_1"})
    sizes["use_rel_pos"] = "attn.rel_pos_h" in names
    if residual := {block for block, name in blocks if name.startswith("residual.")}:
        sizes["residual_block_indexes"] = sorted(residual)
    if "cls_token" in inside:
        sizes["class_token"] = True
    tokens = inside.get("reg_token", inside.get("register_tokens", ()))
    if registers := _at(tokens, 1):
        sizes["num_register_tokens"] = registers
    return sizes | _positions(inside, patch) | _windows(inside, patch)


def _head_dim(inside: Shapes, first: Shapes) -> int:
    """Return the channels of a head where a shape tells them, else 0."""
    of_blocks = [first.get(f"attn.{name}", ()) for name in ("rel_pos_h", "q_norm.weight")]
    tables = [first.get("attn.rope.freqs_cos", ()), inside.get("rope.freqs_cos", ())]
    periods = _at(inside.get("rope_embed.periods", ()), 0)
    return next((_at(shape, -1) for shape in (*of_blocks, *tables) if shape), 4 * periods)


def _positions(inside: Shapes, patch: int) -> dict[str, Any]:
    shape = inside.get("pos_embed")
    if shape is None:
        return {"use_abs_pos": False}
    before, grid = 0, list(shape[1:3])  # (1, H, W, C)
    if len(shape) != 4:  # (1, rows, C), or (rows, C)
        rows = _at(shape, -2)
        squares = (n for n in (0, 1) if rows > n and math.isqrt(rows - n) ** 2 == rows - n)
        before = next(squares, -1)
        if before < 0:
            return {"use_abs_pos": True, "pos_embed_rows": rows}
        grid = [math.isqrt(rows - before)] * 2
    size = {"pos_embed_grid": grid, "pretrain_img_size": grid[0] * patch}
    return {"use_abs_pos": True, **size, "pretrain_use_cls_token": bool(before)}


def _windows(inside: Shapes, patch: int) -> dict[str, Any]:
    """Tell windows from global blocks by the sizes of their position tables."""
    sides: dict[int, list[int]] = defaultdict(list)
    for name, shape in inside.items():
        found = _BLOCK.match(name)
        if found and found[2] == "attn.rel_pos_h":
            sides[(_at(shape, 0) + 1) // 2].append(int(found[1]))
        elif found and found[2] == "attn.rope.freqs_cos":
            sides[math.isqrt(math.prod(shape[:-1]))].append(int(found[1]))
    if len(sides) != 2:
        # one size for all blocks says nothing about windows
        return {"table_sides": sorted(sides)} if sides else {}
    window, whole = sorted(sides)
    found = {"window_size": window, "global_block_indexes": sorted(sides[whole])}
    return found | {"img_size": whole * patch}


def _stages(inside: Shapes) -> dict[str, Any]:
    """Return the sizes of a Vision Longformer or a ViTAE-S, stage by stage."""
    widths: dict[int, int] = {}
    blocks: dict[int, set[str]] = defaultdict(set)
    patches: dict[int, int | None] = {}
    heads: dict[int, int] = {}
    for name, shape in inside.items():
        found = _STAGE.match(name)
        if found is None:
            continue
        stage, block, rest = found[1] or found[4], found[2] or found[5], found[3] or found[6]
        stage = int(stage)
        patches.setdefault(stage, None)
        if rest.startswith("attn.") or found[4]:
            blocks[stage].add(block)
        if rest == "proj.weight" and block == "0" and found[1]:
            widths[stage], patches[stage] = _at(shape, 0), _at(shape, -1)
        if rest == "norm1.weight" and found[4]:
            widths[stage] = _at(shape, 0)
        if rest.endswith("local_relative_position_bias_table"):
            heads[stage] = _at(shape, 1)
    order = sorted(patches)
    sizes: dict[str, Any] = {
        "embed_dims": [widths.get(stage, 0) for stage in order],
        "depths": [len(blocks[stage]) for stage in order],
    }
    if any(patches.values()):
        sizes["patch_sizes"] = [patches[stage] for stage in order]
    return sizes | ({"num_heads": [heads[s] for s in order]} if len(heads) == len(order) else {})


def _head(inner: Shapes) -> dict[str, Any]:
    stages = {name: found[1] for name in inner if (found := _CLASSIFIER.match(name))}
    if not stages:
        scores = _at(inner.get("/head.cls_score.weight", ()), 0)
        anchors = _at(inner.get("/head.bbox_pred.weight", ()), 0) // 4
        retinanet = {"kind": "RetinaNet", "num_classes": scores // (anchors or 1)}
        return retinanet | {"anchors": anchors} if scores and anchors else {}
    classes = _at(inner[next(iter(stages))], 0) - 1
    masks = any(name.startswith("/roi_heads.mask_head.") for name in inner)
    kind = "Mask R-CNN" if masks else "Faster R-CNN"
    if any(stages.values()):
        kind = "Cascade Mask R-CNN" if masks else "Cascade R-CNN"
    boxes = next((_at(inner[name], 0) for name in inner if _REGRESSOR.match(name)), 0)
    head = {"kind": kind, "num_classes": classes, "stages": len(stages)}
    return head | {"class_specific_boxes": boxes == 4 * classes}
