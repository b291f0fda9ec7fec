"""What a file holds, read off its names and shapes: format, architecture, head, numbers."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vitdet.convert.core import FORMATS, detect
from vitdet.convert.nesting import nests, unnest
from vitdet.convert.places import Places, kind_of
from vitdet.convert.rules import KINDS, Shapes, root_of
from vitdet.utils.checks import InputError

_PATCH = "patch_embed.proj.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
_STAGE = re.compile(r"layer(\d+)\.(\d+)\.(.+)$")
_CELL = re.compile(r"layers\.(\d+)\.NC\.(\d+)\.(.+)$")
_LEVEL = re.compile(r"/backbone\.(?:simfp_|fpn_output)(\d)\.")
_CLASSIFIER = re.compile(r"/roi_heads\.box_predictor\.(?:(\d+)\.)?cls_score\.weight$")
_REGRESSOR = re.compile(r"/roi_heads\.box_predictor\.(?:\d+\.)?bbox_pred\.weight$")


@dataclass
class Description:
    """What a file holds.

    Attributes:
        format: a name in `FORMATS`, "" when none fits or the file is no known one.
        what: whose files have that format.
        nested_under: key of the file that holds the state dict, "" when the file is one.
        beside: what else lies in the file.
        backbone_root: what stands before the backbone's names.
        tensors: how many there are.
        parameters: how many numbers they have.
        bytes: how many bytes the numbers take.
        dtypes: {dtype: tensors}.
        backbone: sizes of the backbone, as `vitdet.backbones` names them; what the shapes do not
            say is absent.
        pyramid: names of the pyramid's levels.
        head: kind of detector and its classes, empty for a backbone.
        class_names: of the classes, when the file has them.
        initialised: what a file of ours leaves to the model's own initialisation.
        notes: anything else worth reading.
    """

    format: str = ""
    what: str = ""
    nested_under: str = ""
    beside: list[str] = field(default_factory=list)
    backbone_root: str = ""
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    pyramid: list[str] = field(default_factory=list)
    head: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def describe(
    content: Mapping[str, Any], *, weights: str | None = None, source: str = "source"
) -> Description:
    """Describe a file.

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict; tensors without data do.
        weights: the key of the file that holds the state dict; None to find it.
        source: the file's name, for messages.

    Raises:
        InputError: there is no state dict in it.
    """
    state_dict, nest = unnest(content, source, weights)
    result = Description(nested_under=nest, **_numbers(state_dict.values()))
    result.beside = sorted({str(key) for key in content} - {nest}) if nest else []
    others = [key for key in nests(content) if key != nest] if nest else []
    if others:
        result.notes.append(f"other weights: {', '.join(others)} (--weights)")
    try:
        result.format = detect(content, weights)
    except InputError as error:
        result.notes.append(str(error).removeprefix("source: "))
    else:
        result.what = FORMATS[result.format].what
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    inner, result.backbone_root = _inner(shapes, result.format)
    result.backbone = _backbone(inner)
    levels = {found[1] for found in map(_LEVEL.match, inner) if found}
    result.pyramid = [f"p{level}" for level in sorted(levels)]
    result.head = _head(inner)
    _take_about(result, content)
    return result


def _numbers(tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
    given = list(tensors)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in given)
    return {
        "tensors": len(given),
        "parameters": sum(tensor.numel() for tensor in given),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in given),
        "dtypes": dict(dtypes.most_common()),
    }


def _take_about(result: Description, content: Mapping[str, Any]) -> None:
    about = content.get("vitdet")
    if not isinstance(about, Mapping):
        return
    for word in ("class_names", "initialised"):
        names = about.get(word)
        if isinstance(names, list):
            setattr(result, word, [str(name) for name in names])
    if isinstance(origin := about.get("source_format"), str):
        result.notes.append(f"converted from {origin}")


def _inner(shapes: Shapes, format_name: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """Return {inner name: shape}, see `vitdet.convert.places`, and the backbone's root."""
    fmt = FORMATS.get(format_name)
    anchors = [fmt.anchor] if fmt and fmt.anchor else [_PATCH, *(kind.anchor for kind in KINDS)]
    roots = (root for anchor in anchors if (root := root_of(shapes, anchor)) is not None)
    root = next(roots, None)
    if root is None:
        return dict(shapes), ""
    if fmt is None:
        named = {name.removeprefix(root): shape for name, shape in shapes.items()}
        return {name: shape for name, shape in named.items() if name in shapes or root}, root
    places = Places(fmt, root, "")
    return {places.inner(name)[0]: tuple(shape) for name, shape in shapes.items()}, root


def _backbone(inner: Shapes) -> dict[str, Any]:
    inside = {name: tuple(shape) for name, shape in inner.items() if not name.startswith("/")}
    try:
        kind = kind_of(inside)[0]
        found: dict[str, Any] = {"kind": kind.name, "what": kind.what}
    except InputError:
        found = {}
    if any(map(_STAGE.match, inside)):
        return found | _stages(inside)
    if any(map(_CELL.match, inside)):
        return found | _cells(inside)
    if _PATCH not in inside or not any(map(_BLOCK.match, inside)):
        return found
    return found | _plain(inside)


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
    sizes["patch_size"] = patch
    sizes["in_chans"] = _at(kernel, 1)
    hidden = next((_at(first[name], 1) for name in _LAST if name in first), 0)
    if hidden and width:
        sizes["mlp_ratio"] = round(hidden / width, 4)
    names = set(first)
    sizes["qkv_bias"] = bool(names & {"attn.qkv.bias", "attn.q_bias", "attn.q_proj.bias"})
    sizes["layer_scale"] = bool(names & {"ls1.gamma", "gamma_1"})
    sizes["use_rel_pos"] = "attn.rel_pos_h" in names
    residual = {block for block, name in blocks if name.startswith("residual.")}
    if residual:
        sizes["residual_block_indexes"] = sorted(residual)
    if "cls_token" in inside:
        sizes["class_token"] = True
    tokens = next((inside[name] for name in ("reg_token", "register_tokens") if name in inside), ())
    if registers := _at(tokens, 1):
        sizes["num_register_tokens"] = registers
    return sizes | _positions(inside, patch) | _windows(inside, patch)


# the MLP's last layer: the first one is twice as wide where SwiGLU packs its two into one
_LAST = ("mlp.fc2.weight", "mlp.w3.weight")


def _at(shape: tuple[int, ...], index: int) -> int:
    """Return one number of a shape, 0 when it has fewer: a damaged file may have any shape."""
    return shape[index] if -len(shape) <= index < len(shape) else 0


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
    found: dict[str, Any] = {"use_abs_pos": True}
    spare = 0
    if len(shape) == 4:  # (1, H, W, C)
        grid = [shape[1], shape[2]]
    else:  # (1, rows, C), or (rows, C)
        rows = _at(shape, -2)
        spares = (n for n in (0, 1) if rows > n and math.isqrt(rows - n) ** 2 == rows - n)
        spare = next(spares, -1)
        if spare < 0:
            return found | {"pos_embed_rows": rows}
        grid = [math.isqrt(rows - spare)] * 2
    found["pos_embed_grid"] = grid
    found["pretrain_img_size"] = grid[0] * patch
    found["pretrain_use_cls_token"] = bool(spare)
    return found


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
    return {
        "window_size": window,
        "global_block_indexes": sorted(sides[whole]),
        "img_size": whole * patch,
    }


def _stages(inside: Shapes) -> dict[str, Any]:
    """Return the sizes of a Vision Longformer, stage by stage."""
    stages: dict[int, dict[str, Any]] = {}
    for name, shape in inside.items():
        found = _STAGE.match(name)
        if found is None:
            continue
        stage = stages.setdefault(int(found[1]), {"attention": set(), "dim": 0, "heads": None})
        rest = found[3]
        if rest == "proj.weight" and found[2] == "0":
            stage["dim"], stage["patch"] = _at(shape, 0), _at(shape, -1)
        if rest.startswith("attn."):
            stage["attention"].add(found[2])
        if rest.endswith("local_relative_position_bias_table"):
            stage["heads"] = _at(shape, 1)
    order = [stages[number] for number in sorted(stages)]
    sizes = {
        "embed_dims": [stage["dim"] for stage in order],
        "depths": [len(stage["attention"]) for stage in order],
        "patch_sizes": [stage.get("patch") for stage in order],
    }
    heads = [stage["heads"] for stage in order]
    return sizes | ({"num_heads": heads} if all(heads) else {})


def _cells(inside: Shapes) -> dict[str, Any]:
    """Return the sizes of a ViTAE-S, stage by stage."""
    cells: dict[int, set[str]] = defaultdict(set)
    widths: dict[int, int] = {}
    for name, shape in inside.items():
        found = _CELL.match(name)
        if found:
            cells[int(found[1])].add(found[2])
            if found[3] == "norm1.weight":
                widths[int(found[1])] = _at(shape, 0)
    order = sorted(cells)
    return {
        "embed_dims": [widths.get(stage, 0) for stage in order],
        "depths": [len(cells[stage]) for stage in order],
    }


def _head(inner: Shapes) -> dict[str, Any]:
    stages = {name: found[1] for name in inner if (found := _CLASSIFIER.match(name))}
    if not stages:
        return _retinanet(inner)
    classes = _at(inner[next(iter(stages))], 0) - 1
    masks = any(name.startswith("/roi_heads.mask_head.") for name in inner)
    kind = "Mask R-CNN" if masks else "Faster R-CNN"
    if any(stages.values()):
        kind = "Cascade Mask R-CNN" if masks else "Cascade R-CNN"
    boxes = next((_at(inner[name], 0) for name in inner if _REGRESSOR.match(name)), 0)
    head = {"kind": kind, "num_classes": classes, "stages": len(stages)}
    return head | {"class_specific_boxes": boxes == 4 * classes}


def _retinanet(inner: Shapes) -> dict[str, Any]:
    scores = _at(inner.get("/head.cls_score.weight", ()), 0)
    anchors = _at(inner.get("/head.bbox_pred.weight", ()), 0) // 4
    if not scores or not anchors:
        return {}
    return {"kind": "RetinaNet", "num_classes": scores // anchors, "anchors": anchors}
