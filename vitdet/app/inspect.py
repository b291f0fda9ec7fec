"""`vitdet inspect FILE`: what a weights file holds, and the command that converts it.

Nothing in the file is run. Of the table in docs/conversion.md those rows are named whose recipe
takes the file: its model is built on the meta device, and the file converted for it without data.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitdet.app.convert import add_reading_arguments
from vitdet.convert import FORMATS, detect
from vitdet.convert.names import Names, kind_of, nests, shapes_of, unnest
from vitdet.convert.recipes import COMMANDS, Command
from vitdet.convert.rules import KINDS, PATCH, Shape, Shapes, root_of
from vitdet.utils.checks import InputError, one_line, printable
from vitdet.utils.state_dicts import some
from vitdet.weights import locate, read

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
# an attention of a network in stages: of a Vision Longformer, of a ViTAE-S
_STAGE = re.compile(r"(layer\d+|layers\.\d+\.NC)\.(\d+)\.attn\.proj\.weight$")
_LEVEL = re.compile(r"/backbone\.(?:simfp_|fpn_output)(\d)\.")
_CLASSIFIER = re.compile(r"/roi_heads\.box_predictor\.(?:(\d+)\.)?cls_score\.weight$")
_REGRESSOR = re.compile(r"/roi_heads\.box_predictor\.(?:\d+\.)?bbox_pred\.weight$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the sub-command."""
    parser.add_argument("file", type=Path, help="weights, a folder of the hub, or a name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_reading_arguments(parser)
    parser.add_argument("--no-recipes", action="store_true", help="try no recipes")


def run(args: argparse.Namespace) -> int:
    """Print what the file holds; return 0, or 1 when its format is none that is known."""
    from vitdet.predict.others import without_data  # detectron2 takes seconds to import

    content = without_data(read(args.file, trust=args.trust).content)
    place = locate(args.file)
    size = sum(part.stat().st_size for part in (place, *place.glob("*")) if part.is_file())
    found: dict[str, Any] = {"file": str(args.file), "file_bytes": size}
    found |= describe(content, weights=args.weights, source=str(args.file))
    tried = [] if args.no_recipes else _rows(content, found)
    fits = [fit for row in tried if (fit := _fit(row, content, args.weights))]
    found["recipes"] = sorted(fits, key=lambda fit: fit["initialised"])
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        recipes = [] if args.no_recipes else _recipe_lines(content, found)
        print(*map(printable, _lines(found) + recipes), sep="\n")
    return 0 if found["format"] else 1


def _about(content: Mapping[str, Any]) -> Mapping[str, Any]:
    about = content.get("vitdet")
    return about if isinstance(about, Mapping) else {}


# --- what names and shapes tell ------------------------------------------------------------------


def describe(
    content: Mapping[str, Any], *, weights: str | None = None, source: str = "source"
) -> dict[str, Any]:
    """Describe a file by plain values, for JSON; sizes as `vitdet.backbones` names them.

    Args are those of `vitdet.convert.convert`; tensors without data do. The "format" is "" for an
    unknown one. Raises InputError when there is no state dict in the content.
    """
    state_dict, nest = unnest(content, source, weights)
    tensors = state_dict.values()
    others = [key for key in nests(content) if key != nest] if nest else []
    notes = [f"other weights: {', '.join(others)} (--weights)"] if others else []
    fmt, about = "", _about(content)
    try:
        fmt = detect(content, weights)
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


def is_foundation(found: Mapping[str, Any]) -> bool:
    """Whether what `describe` returned is a plain ViT alone, of another project."""
    plain = found["backbone"].get("kind") in ("vit", "eva02")
    return plain and not (found["head"] or found["pyramid"] or found["format"] in ("", "vitdet"))


def backbone_shapes(
    content: Mapping[str, Any], fmt: str, *, weights: str | None = None, source: str = "source"
) -> dict[str, Shape]:
    """Return {name in the backbone, as ours: shape} of a file; arguments as of `describe`."""
    inner, _ = _inner(shapes_of(unnest(content, source, weights)[0]), fmt)
    return {name: shape for name, shape in inner.items() if not name.startswith("/")}


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
    sizes = {"embed_dims": [stages[stage][0] for stage in order]} if stages else _plain(inside)
    depths = {"depths": [len(stages[stage]) for stage in order]} if stages else {}
    return {"kind": kind.name, "what": kind.what} | sizes | depths


def _plain(inside: Shapes) -> dict[str, Any]:
    """Return the sizes of a backbone of equal blocks: ViT, EVA, ViTAE-B."""
    width, patch = _at(inside[PATCH], 0), _at(inside[PATCH], -1)
    blocks = [(int(found[1]), found[2]) for found in map(_BLOCK.match, inside) if found]
    first = {name: inside[f"blocks.0.{name}"] for block, name in blocks if block == 0}
    # the MLP's last layer: the first one is twice as wide where SwiGLU packs its two into one
    hidden = _at(first.get("mlp.fc2.weight", first.get("mlp.w3.weight", ())), 1)
    heads = width // (_head_dim(inside, first) or width or 1)
    if heads == 1:  # no head is as wide as the model: nothing tells
        heads = _at(first.get("attn.relative_position_bias_table", ()), 1)
    sizes = {
        "embed_dim": width,
        "depth": len({block for block, _ in blocks}),
        "num_heads": heads or None,
        "patch_size": patch,
        "in_chans": _at(inside[PATCH], 1),
        "mlp_ratio": round(hidden / width, 4) if hidden and width else None,
        "qkv_bias": bool(first.keys() & {"attn.qkv.bias", "attn.q_bias", "attn.q_proj.bias"}),
        "layer_scale": bool(first.keys() & {"ls1.gamma", "gamma_1"}),
        "use_rel_pos": "attn.rel_pos_h" in first,
        "residual_block_indexes": sorted({i for i, n in blocks if "residual." in n}) or None,
        "class_token": "cls_token" in inside or None,
        "num_register_tokens": _at(inside.get("reg_token", ()), 1) or None,
    }
    sizes |= _positions(inside.get("pos_embed"), patch) | _windows(inside, patch)
    return {name: value for name, value in sizes.items() if value is not None}


def _head_dim(inside: Shapes, first: Shapes) -> int:
    """Return the channels of a head where a shape tells them, else 0."""
    of_blocks = [first.get(f"attn.{name}", ()) for name in ("rel_pos_h", "q_norm.weight")]
    tables = [first.get("attn.rope.freqs_cos", ()), inside.get("rope.freqs_cos", ())]
    periods = _at(inside.get("rope_embed.periods", ()), 0)
    return next((_at(shape, -1) for shape in (*of_blocks, *tables) if shape), 4 * periods)


def _positions(shape: Shape | None, patch: int) -> dict[str, Any]:
    if shape is None:
        return {"use_abs_pos": False}
    rows = _at(shape, -2)  # (1, rows, C), or (rows, C), or (1, H, W, C)
    side = math.isqrt(rows)
    grid = list(shape[1:3]) if len(shape) == 4 else [side, side]
    row = len(shape) != 4 and rows == side * side + 1
    if len(shape) != 4 and rows - side * side > 1:
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


# --- the command ---------------------------------------------------------------------------------


def _rows(content: Mapping[str, Any], found: Mapping[str, Any]) -> list[Command]:
    """Return the rows of the table for files of this format and width.

    A converted file of ours goes into the recipes of the format that it was converted from.
    """
    sizes, origin = found["backbone"], _about(content).get("source_format", found["format"])
    width = sizes.get("embed_dim", next(iter(sizes.get("embed_dims", ())), 0))
    return [row for row in COMMANDS if row.format == origin and row.width == width]


def _fit(row: Command, content: Mapping[str, Any], weights: str | None) -> dict[str, Any] | None:
    """Return how the file goes into a row's recipe, None where it does not."""
    from vitdet.predict.others import ALLOWED, account  # detectron2 takes seconds to import

    report = account(row, content, weights)
    if report is None:
        return None
    counts = {"resized": len(report.resized), "dropped": len(report.dropped | report.inexact)}
    counts["initialised"] = len(report.initialised)
    words = [word for word in row.options if word in ALLOWED.values()] + list(row.overrides)
    return {"recipe": f"configs/{row.recipe}.py", "options": words, **counts}


def _recipe_lines(content: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the commands that convert the file, the one that leaves the least open first."""
    if isinstance(_about(content).get("config"), str):
        return ["recipe       in the file: vitdet predict, val, export need no --config-file"]
    lines = []
    if is_foundation(found):
        lines.append(
            f"train        vitdet train --data FOLDER --weights {shlex.quote(found['file'])}"
        )
    file = ["--source-model", found["file"], "--output-model", "OUT.pth"]
    for fit in found["recipes"]:
        counts = [f"{fit[word]} {word}" for word in ("resized", "dropped", "initialised")]
        words = ["--config-file", fit["recipe"], *fit["options"]]
        lines.append(f"recipe       {', '.join(counts)}: {shlex.join(words[1:])}")
        lines.append(f"             python converter.py {shlex.join([*file, *words])}")
    return lines or ["recipe       none of docs/conversion.md takes it as it is"]


def _lines(found: Mapping[str, Any]) -> list[str]:
    nested = f", under {found['nested_under']!r}" if found["nested_under"] else ""
    what = f": {found['what']}" if found["what"] else ""
    dtypes = ", ".join(f"{name} {count}" for name, count in found["dtypes"].items())
    numbers = f"{found['parameters'] / 1e6:.2f} M numbers, {_bytes(found['bytes'])}"
    lines = [
        f"file         {one_line(found['file'])}, {_bytes(found['file_bytes'])}",
        f"format       {found['format'] or 'unknown'}{nested}{what}",
        f"tensors      {found['tensors']} ({dtypes}), {numbers}",
    ]
    if found["beside"]:
        lines.append(f"beside       {some(found['beside'], 8)}")
    if backbone := found["backbone"]:
        root = f", names after {found['backbone_root']!r}" if found["backbone_root"] else ""
        lines.append(f"backbone     {backbone['what']}{root}")
        sizes = {key: value for key, value in backbone.items() if key not in ("kind", "what")}
        lines += [f"             {key} = {value}" for key, value in sizes.items()]
        if "num_heads" not in backbone:
            lines.append("             num_heads is not in the shapes")
    if found["pyramid"]:
        lines.append(f"pyramid      {' '.join(found['pyramid'])}")
    if head := found["head"]:
        values = ", ".join(f"{key} {value}" for key, value in head.items() if key != "kind")
        lines.append(f"head         {head['kind']}, {values}")
    if found["class_names"]:
        lines.append(f"classes      {some(found['class_names'], 8)}")
    if names := found["initialised"]:
        lines.append(f"left open    {len(names)} names ({some(names)})")
    return lines + [f"note         {one_line(note)}" for note in found["notes"]]


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"
