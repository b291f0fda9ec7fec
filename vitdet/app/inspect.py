"""`vitdet inspect FILE`: what a weights file holds, and the command that converts it.

Nothing in the file is run. Of the table in docs/conversion.md those rows are named whose recipe
takes the file: its model is built on the meta device, and the file converted for it without data.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from vitdet.app import follow
from vitdet.convert.describe import about_of, describe, is_plain
from vitdet.convert.recipes import COMMANDS, Command
from vitdet.utils.checks import one_line, printable
from vitdet.utils.state_dicts import some, without_data
from vitdet.weights import Weights, locate, read

_USUAL = "configs/COCO/mask_rcnn_vitdet_b_100ep.py"  # it follows any plain ViT


def run(args: argparse.Namespace) -> int:
    """Print what the file holds; return 0, or 1 when its format is none that is known."""
    held = read(args.file, trust=args.trust)
    held = replace(held, content=without_data(held.content))
    place = locate(args.file)
    size = sum(part.stat().st_size for part in (place, *place.glob("*")) if part.is_file())
    found: dict[str, Any] = {"file": str(args.file), "file_bytes": size}
    found |= describe(held.content, weights=args.weights, source=str(args.file))
    how = {"weights": args.weights, "source": str(args.file)}
    follow.net_settings(held.content, held.config, **how)  # one that training would refuse
    found["recipes"] = [] if args.no_recipes else _fits(held, found, args.weights)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        recipes = [] if args.no_recipes else _recipe_lines(held.content, found)
        print(*map(printable, _lines(found) + recipes), sep="\n")
    return 0 if found["format"] else 1


# --- the command ---------------------------------------------------------------------------------


def _rows(content: Mapping[str, Any], found: Mapping[str, Any]) -> list[Command]:
    """Return the rows of the table for files of this format and width.

    A converted file of ours goes into the recipes of the format that it was converted from.
    """
    sizes, origin = found["backbone"], about_of(content).get("source_format", found["format"])
    width = sizes.get("embed_dim", next(iter(sizes.get("embed_dims", ())), 0))
    rows = [row for row in COMMANDS if row.format == origin and row.width == width]
    return list({row.words(): row for row in rows}.values())


def _fits(held: Weights, found: Mapping[str, Any], weights: str | None) -> list[dict[str, Any]]:
    """Return how the file goes into the recipes of the table, the least left open first."""
    rows = _rows(held.content, found)
    if not rows:
        return []
    from vitdet.predict.others import ALLOWED, takes  # detectron2 takes seconds to import

    def changes(cfg: DictConfig, row: Command) -> list[str] | None:
        return follow.changes(cfg, held, row.overrides, weights=weights)

    fits = []
    for row, report in takes(rows, held.content, changes, weights):
        counts = {"resized": len(report.resized), "dropped": len(report.dropped | report.inexact)}
        counts["initialised"] = len(report.initialised)
        words = [word for word in row.options if word in ALLOWED.values()] + list(row.overrides)
        fits.append({"recipe": f"configs/{row.recipe}.py", "options": words, **counts})
    return sorted(fits, key=lambda fit: fit["initialised"])


def _recipe_lines(content: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the commands that convert the file, the one that leaves the least open first."""
    if isinstance(about_of(content).get("config"), str):
        return ["recipe       in the file: vitdet predict, val, export need no --config-file"]
    lines = []
    usual = [{"recipe": _USUAL, "options": []}] if is_plain(found) else []
    best = next(iter([*found["recipes"], *usual]), None)
    if best and not any(word.startswith("--") for word in best["options"]):
        words = ["--weights", found["file"], *best["options"]]
        own = f"vitdet train --data FOLDER {shlex.join(words)}" if is_plain(found) else ""
        line = f"vitdet recipe --config-file {best['recipe']} {shlex.join(words)}"
        heads = ("train        ", " " * 13)
        lines += [head + text for head, text in zip(heads, filter(None, (own, line)), strict=False)]
    file = ["--source-model", found["file"], "--output-model", "OUT.pth"]
    for fit in found["recipes"]:
        counts = [f"{fit[word]} {word}" for word in ("resized", "dropped", "initialised")]
        words = ["--config-file", fit["recipe"], *fit["options"]]
        lines.append(f"recipe       {', '.join(counts)}: {shlex.join(words[1:])}")
        lines.append(f"             vitdet convert {shlex.join([*file, *words])}")
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
        lines += [f"             {key} = {_short(value)}" for key, value in sizes.items()]
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


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"
