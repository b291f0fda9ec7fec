"""`vitdet inspect FILE`: what a weights file holds, and which recipes it fits.

Nothing in the file is run. A recipe is compared by its names and shapes: its model is built on the
meta device, and the file converted for it without data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitdet import checkpoint
from vitdet.app.convert import add_reading_arguments
from vitdet.convert import Report, convert
from vitdet.convert.inspect import Description, describe
from vitdet.convert.nesting import unnest
from vitdet.convert.recipes import COMMANDS
from vitdet.utils.checks import InputError, fail, one_line, printable
from vitdet.utils.state_dicts import some

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_PARTS = "common"  # the folder of what recipes are made of
# what may have to be allowed, from nothing to most
_LEAVE: tuple[tuple[str, ...], ...] = (
    (),
    ("resize_patch_embed",),
    ("backbone_only",),
    ("allow_inexact",),
    ("resize_patch_embed", "allow_inexact"),
)


Shapes = dict[str, tuple[int, ...]]
Recipe = tuple[Shapes, dict[str, Any]]  # of its model, and the arguments of its backbone


@dataclass
class Fit:
    """How a file fits a recipe.

    Attributes:
        recipe: its path.
        fit: "whole" (every weight of the model, as it is), "resized" (every weight, some resized),
            "start" (the rest is left to initialisation).
        options: what converter.py has to be given beside the files: options, changes to the recipe.
        resized: {model's name: [shape in the file, shape in the model]}.
        dropped: {rule: names of the file}.
        initialised: names of the model that the file does not fill.
    """

    recipe: str
    fit: str
    options: list[str] = field(default_factory=list)
    resized: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the sub-command."""
    parser.add_argument("file", type=Path, help="weights: .pth .pt .bin .ckpt .safetensors .pkl")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_reading_arguments(parser)
    parser.add_argument(
        "--configs",
        type=Path,
        metavar="FOLDER",
        help="try every recipe there; left out: those of docs/conversion.md for such files",
    )
    parser.add_argument("--no-recipes", action="store_true", help="try no recipes")


def run(args: argparse.Namespace) -> int:
    """Print what the file holds; return 0, or 1 when its format is none that is known.

    Raises:
        InputError: no such file, damaged, no tensors in it.
    """
    content = _without_data(checkpoint.read(args.file, trust=args.trust))
    found = describe(content, weights=args.weights, source=str(args.file))
    candidates = [] if args.no_recipes else _candidates(args.configs, found)
    fits, failed = fitting(content, found, candidates, args.weights)
    found.notes += failed
    if args.json:
        record = {"file": str(args.file), "file_bytes": args.file.stat().st_size}
        record |= found.as_dict() | {"recipes": [asdict(fit) for fit in fits]}
        print(json.dumps(record, indent=1))
    else:
        recipes = [] if args.no_recipes else _recipe_lines(fits, len(candidates))
        print(*map(printable, [*_lines(args.file, found), *recipes]), sep="\n")
    return 0 if found.format else 1


def _candidates(folder: Path | None, found: Description) -> list[Candidate]:
    if folder is None:
        return known(found) if CONFIGS.is_dir() else []
    if not folder.is_dir():
        fail("--configs", expected="a folder", got=str(folder), remedy="Check the path.")
    return every(folder)


def _without_data(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with its state dicts on the meta device, so that the data can go."""

    def bare(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return {
        key: {name: bare(each) for name, each in value.items()}
        if isinstance(value, Mapping)
        else bare(value)
        for key, value in content.items()
    }


# --- recipes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A recipe to try.

    Attributes:
        path: the file.
        overrides: changes to it.
    """

    path: Path
    overrides: tuple[str, ...] = ()


def known(found: Description) -> list[Candidate]:
    """Return the recipes that `vitdet.convert.recipes` names for files like this one.

    Files in our names, ours and detectron2's, may be of any recipe of their width; files that this
    project wrote also of its own small recipes.
    """
    sizes = found.backbone
    width = sizes.get("embed_dim") or next(iter(sizes.get("embed_dims", ())), 0)
    ours = found.format in ("vitdet", "detectron2")
    candidates = [
        Candidate(CONFIGS / f"{command.recipe}.py", () if ours else command.overrides)
        for command in COMMANDS
        if command.width == width and (ours or command.format == found.format)
    ]
    if found.format == "vitdet":
        candidates += [*every(CONFIGS / "mini"), *every(CONFIGS / "own")]
    return list(dict.fromkeys(candidates))


def every(folder: Path) -> list[Candidate]:
    """Return all recipes of a folder and its subfolders, but those in "common"."""
    paths = (
        path
        for path in sorted(folder.rglob("*.py"))
        if _PARTS not in path.relative_to(folder).parts and not path.name.startswith("_")
    )
    return [Candidate(path) for path in paths]


def fitting(
    content: Mapping[str, Any],
    found: Description,
    candidates: Iterable[Candidate],
    weights: str | None = None,
) -> tuple[list[Fit], list[str]]:
    """Return the recipes that a file fits, and notes on recipes that do not load.

    Args:
        content: what `vitdet.checkpoint.read` returned; tensors without data do.
        found: its description.
        candidates: what to try.
        weights: the key of the file that holds the state dict; None to find it.

    Returns:
        (the fits, best ones first; notes).
    """
    fits: list[Fit] = []
    notes: list[str] = []
    for candidate in candidates:
        try:
            recipe = _recipe(candidate, found)
        except InputError as error:
            notes.append(f"recipe {_short(candidate.path)} was not tried: {error}")
            continue
        fit = _fit(candidate, content, found, recipe, weights) if recipe else None
        if fit is not None:
            fits.append(fit)
    order = ("whole", "resized", "start")
    return sorted(fits, key=lambda fit: (order.index(fit.fit), len(fit.options))), notes


def _recipe(candidate: Candidate, found: Description) -> Recipe | None:
    """Return a recipe's model, None when its sizes show that it is another one."""
    from vitdet import config  # detectron2 takes seconds to import

    cfg = config.load_config(candidate.path, candidate.overrides)
    if "model" not in cfg:
        return None
    settings = config.backbone_settings(cfg.model)
    for name in ("embed_dim", "depth"):
        known_size = found.backbone.get(name, settings.get(name))
        if isinstance(settings.get(name), int) and settings[name] != known_size:
            return None
    model = config.build_model(cfg.model, device="meta")
    settings = config.model_settings(cfg.model, model)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}, settings


def _fit(
    candidate: Candidate,
    content: Mapping[str, Any],
    found: Description,
    recipe: Recipe,
    weights: str | None,
) -> Fit | None:
    target, settings = recipe
    if "kind" not in found.backbone:  # a backbone of detectron2's own, which is not converted
        state_dict, _ = unnest(content, "source", weights)
        given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        if given == target:
            return Fit(_short(candidate.path), "whole")
    for leave in _LEAVE:
        try:
            _, report = convert(
                content,
                target,
                weights=weights,
                backbone_only="backbone_only" in leave,
                resize_patch_embed="resize_patch_embed" in leave,
                allow_inexact="allow_inexact" in leave,
                settings=settings,
            )
        except InputError:
            continue
        return _fit_of(candidate, report, leave)
    return None


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _fit_of(candidate: Candidate, report: Report, leave: tuple[str, ...]) -> Fit:
    word = "start" if report.initialised else "resized" if report.resized else "whole"
    dropped: dict[str, list[str]] = {}
    for name, why in (report.dropped | report.inexact).items():
        dropped.setdefault(why, []).append(name)
    options = [f"--{name.replace('_', '-')}" for name in leave]
    options += candidate.overrides
    return Fit(
        _short(candidate.path), word, options, dict(report.resized), dropped, report.initialised
    )


# --- text -----------------------------------------------------------------------------------------


def _lines(path: Path, found: Description) -> list[str]:
    nested = f", under {found.nested_under!r}" if found.nested_under else ""
    what = f": {found.what}" if found.what else ""
    dtypes = ", ".join(f"{name} {count}" for name, count in found.dtypes.items())
    lines = [
        f"file         {one_line(str(path))}, {_bytes(path.stat().st_size)}",
        f"format       {found.format or 'unknown'}{nested}{what}",
        f"tensors      {found.tensors} ({dtypes}), {found.parameters / 1e6:.2f} M numbers, "
        f"{_bytes(found.bytes)}",
    ]
    if found.beside:
        lines.append(f"beside       {some(found.beside, 8)}")
    sizes = {key: value for key, value in found.backbone.items() if key not in ("kind", "what")}
    if sizes:
        root = f", names after {found.backbone_root!r}" if found.backbone_root else ""
        lines.append(f"backbone     {found.backbone.get('what', 'of equal blocks')}{root}")
        lines += [f"             {key} = {value}" for key, value in sizes.items()]
        if "num_heads" not in sizes:
            lines.append("             num_heads is not in the shapes")
    if found.pyramid:
        lines.append(f"pyramid      {' '.join(found.pyramid)}")
    if found.head:
        values = ", ".join(f"{key} {value}" for key, value in found.head.items() if key != "kind")
        lines.append(f"head         {found.head['kind']}, {values}")
    if found.class_names:
        lines.append(f"classes      {some(found.class_names, 8)}")
    if found.initialised:
        lines.append(f"left open    {len(found.initialised)} names ({some(found.initialised)})")
    return lines + [f"note         {one_line(note)}" for note in found.notes]


def _recipe_lines(fits: list[Fit], tried: int) -> list[str]:
    if not fits:
        return [f"recipes      it fits none of {tried} (--configs FOLDER tries all in a folder)"]
    lines = []
    for fit in fits:
        options = f" with {' '.join(fit.options)}" if fit.options else ""
        dropped = sum(map(len, fit.dropped.values()))
        counts = {"resized": len(fit.resized), "dropped": dropped}
        counts["left to initialisation"] = len(fit.initialised)
        parts = [f"{count} {word}" for word, count in counts.items() if count]
        lines.append(
            f"{fit.fit:<12} {fit.recipe}{options}" + (": " * bool(parts)) + ", ".join(parts)
        )
    return lines + _details(fits[0])


def _details(fit: Fit) -> list[str]:
    lines = [f"first        {fit.recipe}"] if fit.resized or fit.dropped or fit.initialised else []
    for name, (have, want) in list(fit.resized.items())[:2]:
        lines.append(f"             resized {name} from {tuple(have)} to {tuple(want)}")
    for why, names in fit.dropped.items():
        lines.append(f"             dropped {len(names)} ({some(names, 2)}): {why}")
    if fit.initialised:
        count, names = len(fit.initialised), some(fit.initialised, 2)
        lines.append(f"             left to initialisation {count} ({names})")
    return lines


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"
