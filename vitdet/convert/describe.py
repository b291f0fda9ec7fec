"""What names and shapes tell of a weights file, as plain values."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from vitdet.convert.engine import detect
from vitdet.convert.formats import FORMATS
from vitdet.convert.names import Names, kind_of, nests, shapes_of, unnest
from vitdet.convert.rules import KINDS, PATCH, Shape, Shapes, root_of
from vitdet.utils.checks import InputError, check_word

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
# an attention of a network in stages: of a Vision Longformer, of a ViTAE-S
_STAGE = re.compile(r"(layer\d+|layers\.\d+\.NC)\.(\d+)\.attn\.proj\.weight$")
_LEVEL = re.compile(r"/backbone\.(?:simfp_|fpn_output)(\d)\.")
_CLASSIFIER = re.compile(r"/roi_heads\.box_predictor\.(?:(\d+)\.)?cls_score\.weight$")
_REGRESSOR = re.compile(r"/roi_heads\.box_predictor\.(?:\d+\.)?bbox_pred\.weight$")


def about_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a file of ours says of itself, {} for any other."""
    about = content.get("vitdet")
    return about if isinstance(about, Mapping) else {}


def describe(
    content: Mapping[str, Any],
    *,
    weights: str | None = None,
    source_format: str | None = None,
    source: str = "source",
) -> dict[str, Any]:
    """Describe a file by plain values, for JSON; sizes as `vitdet.backbones` names them.

    Args are those of `vitdet.convert.convert`; tensors without data do. The "format" is "" for an
    unknown one. Raises InputError when there is no state dict in the content.
    """
    state_dict, nest = unnest(content, source, weights)
    tensors = state_dict.values()
    others = [key for key in nests(content) if key != nest] if nest else []
    notes = [f"other weights: {', '.join(others)} (--weights)"] if others else []
    if source_format:
        check_word("--source-format", source_format, FORMATS)
    fmt, about = "", about_of(content)
    try:
        fmt = source_format or detect(content, weights)
    except InputError as error:
        notes.append(str(error).removeprefix("source: "))
    if isinstance(origin := about.get("source_format"), str):
        notes.append(f"converted from {origin}")
    lists = {
        word: [str(name) for name in names] if isinstance(names := about.get(word), list) else []
        for word in ("class_names", "initialised")
    }
    inner, root = _inner(shapes_of(state_dict), fmt)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    levels = sorted({found[1] for found in map(_LEVEL.match, inner) if found})
    return {
        "format": fmt,
        "what": FORMATS[fmt].what if fmt else "",
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


def is_plain(found: Mapping[str, Any], *, alone: bool = True) -> bool:
    """Whether what `describe` returned is a plain ViT of another project, and nothing beside it."""
    plain = found["backbone"].get("kind") in ("vit", "eva02")
    alone = alone and bool(found["head"] or found["pyramid"])
    return plain and not alone and found["format"] not in ("", "vitdet")


def _inner(shapes: Shapes, format_name: str) -> tuple[dict[str, Shape], str]:
    """Return {inner name: shape}, see `vitdet.convert.names`, and the backbone's root."""
    fmt = FORMATS[format_name or "vitdet"]
    anchors = [fmt.anchor] if fmt.anchor else [PATCH, *(kind.anchor for kind in KINDS)]
    root = root_of(shapes, *anchors)
    if root is None:
        return dict(shapes), ""
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
    except InputError:
        return {}
    stages: dict[str, list[int]] = defaultdict(list)  # the channels of every block
    for name in inside:
        if found := _STAGE.match(name):
            stages[found[1]].append(_at(inside[name], 0))
    order = sorted(stages)
    sizes = {"embed_dims": [stages[stage][0] for stage in order]} if stages else _plain(inside, fmt)
    depths = {"depths": [len(stages[stage]) for stage in order]} if stages else {}
    return {"kind": kind.name, "what": kind.what} | sizes | depths


def _plain(inside: Shapes, fmt: str) -> dict[str, Any]:
    """Return the sizes of a backbone of equal blocks: ViT, EVA, ViTAE-B."""
    width, patch = _at(inside[PATCH], 0), _at(inside[PATCH], -1)
    blocks = [(int(found[1]), found[2]) for found in map(_BLOCK.match, inside) if found]
    first = {name: inside[f"blocks.0.{name}"] for block, name in blocks if block == 0}
    biases = {"attn.qkv.bias", "attn.q_bias", "attn.q_proj.bias"}
    made = (make.find("blocks.0.attn.qkv.bias", inside) for make in FORMATS[fmt or "vitdet"].makes)
    heads = width // (_head_dim(inside, first) or width or 1)
    if heads == 1:  # no head is as wide as the model: nothing tells
        heads = _at(first.get("attn.relative_position_bias_table", ()), 1)
    sizes = {
        "embed_dim": width,
        "depth": len({block for block, _ in blocks}),
        "num_heads": heads or None,
        "patch_size": patch,
        "in_chans": _at(inside[PATCH], 1),
        "qkv_bias": bool(first.keys() & biases) or any(made),  # of zeros, where the format says so
        "layer_scale": bool(first.keys() & {"ls1.gamma", "gamma_1"}),
        "use_rel_pos": "attn.rel_pos_h" in first,
        "pre_norm": "norm_pre.weight" in inside,
        "patch_bias": PATCH.replace("weight", "bias") in inside,
        "inner_attn_norm": "attn.inner_attn_ln.weight" in first,
        "residual_block_indexes": sorted({i for i, n in blocks if "residual." in n}) or None,
        "class_token": "cls_token" in inside or None,
        "num_register_tokens": _at(inside.get("reg_token", ()), 1) or None,
    }
    sizes |= _feed_forward(first, width)
    before = 2 if "dist_token" in inside else 1  # rows of its tokens
    sizes |= _positions(inside.get("pos_embed"), patch, before) | _windows(inside, patch)
    return {name: value for name, value in sizes.items() if value is not None}


def _feed_forward(first: Shapes, width: int) -> dict[str, Any]:
    # the last layer: the first one is twice as wide where SwiGLU packs its two into one
    hidden = _at(first.get("mlp.fc2.weight", first.get("mlp.w3.weight", ())), 1)
    gated = any(name.startswith(("mlp.w1", "mlp.w12.")) for name in first)
    gated = gated or 0 < 2 * hidden == _at(first.get("mlp.fc1.weight", ()), 0)
    kind = "mlp" if not gated else "swiglu_norm" if "mlp.ffn_ln.weight" in first else "swiglu"
    width = width or 1  # of a damaged file
    ratio = hidden / width
    if int(width * ratio) != hidden:  # the product may round down
        ratio = (hidden + 0.5) / width
    return {"ffn_layer": kind, "mlp_ratio": ratio or None}


def _head_dim(inside: Shapes, first: Shapes) -> int:
    """Return the channels of a head where a shape tells them, else 0."""
    of_blocks = [first.get(f"attn.{name}", ()) for name in ("rel_pos_h", "q_norm.weight")]
    tables = [first.get("attn.rope.freqs_cos", ()), inside.get("rope.freqs_cos", ())]
    periods = _at(inside.get("rope_embed.periods", ()), 0)
    return next((_at(shape, -1) for shape in (*of_blocks, *tables) if shape), 4 * periods)


def _positions(shape: Shape | None, patch: int, before: int) -> dict[str, Any]:
    if shape is None:
        return {"use_abs_pos": False}
    rows = _at(shape, -2)  # (1, rows, C), or (rows, C), or (1, H, W, C)
    side = math.isqrt(rows)
    grid = list(shape[1:3]) if len(shape) == 4 else [side, side]
    row = len(shape) != 4 and rows == side * side + before
    if len(shape) != 4 and rows != side * side and not row:
        return {"use_abs_pos": True, "pos_embed_rows": rows}
    sizes = {"use_abs_pos": True, "pos_embed_grid": grid, "pretrain_img_size": grid[0] * patch}
    return sizes | {"pretrain_use_cls_token": row}


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
        return {}  # one size for all blocks says nothing about windows
    window, whole = sorted(sides)
    found = {"window_size": window, "global_block_indexes": sorted(sides[whole])}
    return found | {"img_size": whole * patch}


def _head(inner: Shapes) -> dict[str, Any]:
    stages = {name: found[1] for name in inner if (found := _CLASSIFIER.match(name))}
    if not stages:
        scores = _at(inner.get("/head.cls_score.weight", ()), 0)
        anchors = _at(inner.get("/head.bbox_pred.weight", ()), 0) // 4
        retinanet = {"kind": "RetinaNet", "num_classes": scores // (anchors or 1)}
        return retinanet | {"anchors": anchors} if scores and anchors else {}
    classes = _at(inner[next(iter(stages))], 0) - 1
    masks = any(name.startswith("/roi_heads.mask_head.") for name in inner)
    kind = "Mask R-CNN" if masks else "R-CNN" if any(stages.values()) else "Faster R-CNN"
    boxes = next((_at(inner[name], 0) for name in inner if _REGRESSOR.match(name)), 0)
    head = {"kind": f"Cascade {kind}" if any(stages.values()) else kind, "num_classes": classes}
    return head | {"stages": len(stages), "class_specific_boxes": boxes == 4 * classes}
