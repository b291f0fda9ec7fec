"""Detectors of other projects: the recipe that a file is for, and its weights by our names.

Nothing is written: the file is converted in memory, with the account of `vitdet.convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from vitdet import config
from vitdet.convert import Report, convert, detect
from vitdet.convert.describe import describe
from vitdet.convert.names import shapes_of
from vitdet.convert.recipes import COMMANDS, Command
from vitdet.utils.checks import InputError
from vitdet.utils.state_dicts import without_data

# what a row may have to allow
ALLOWED = {"resize_patch_embed": "--resize-patch-embed", "allow_inexact": "--allow-inexact"}
_TABLES = ("window_size", "img_size")


def converted(
    content: Mapping[str, Any], model: DictConfig, **options: Any
) -> tuple[dict[str, torch.Tensor], Report]:
    """Return the weights of a file for a `model` node, which is not built, and their account.

    `options` are those of `vitdet.convert.convert`. Raises InputError as it does.
    """
    empty = config.build_model(model, device="meta")
    settings = config.model_settings(model, empty)
    return convert(content, shapes_of(empty.state_dict()), settings=settings, **options)


def as_ours(content: Mapping[str, Any], model: DictConfig, **options: Any) -> dict[str, Any]:
    """Return the content of a file as one of ours has it; arguments as of `converted`.

    A file that has a model's names already comes back as it is.
    """
    state = content.get("model", content)
    ours = config.build_model(model, device="meta").state_dict().keys()
    if isinstance(state, Mapping) and state.keys() == ours:
        return dict(content)
    state, report = converted(content, model, **options)
    return {"model": state, "vitdet": {"initialised": report.initialised}}


def takes(
    rows: Iterable[Command],
    content: Mapping[str, Any],
    follow: Callable[[DictConfig, Command], list[str] | None] = lambda *_: None,
    weights: str | None = None,
) -> list[tuple[Command, Report]]:
    """Return the rows whose recipe takes a file, with the account of each; see `without_data`.

    Where tables of a file tell windows and image, only recipes with these, if there are any: EVA-02
    calls detectors of one shape `bsl` and `sys`.

    Args:
        rows: of `vitdet.convert.recipes`.
        content: as `vitdet.checkpoint.read` returned it.
        follow: gives the changes by which a recipe follows a file, None where it does not.
        weights: the key of the file that holds them, None to find it.
    """
    told, found = describe(content, weights=weights)["backbone"], []
    for row in rows:
        path = config.CONFIGS / f"{row.recipe}.py"
        allowed: dict[str, Any] = {name: flag in row.options for name, flag in ALLOWED.items()}
        try:
            cfg = config.load_config(path, row.overrides)
            changes = follow(cfg, row)
            if changes is not None:
                cfg = config.load_config(path, [*changes, *row.overrides])
                allowed["resize_patch_embed"] = True
            _, report = converted(content, cfg.model, weights=weights, **allowed)
        except InputError:
            continue
        now = config.backbone_settings(cfg.model)
        same = all(told.get(key, now.get(key)) == now.get(key) for key in _TABLES)
        found.append((same, row, report))
    best = max((same for same, *_ in found), default=False)
    return [(row, report) for same, row, report in found if same == best]


def find_recipe(content: Mapping[str, Any], source: str) -> Command | None:
    """Return the row of the table (`vitdet.convert.recipes`) whose recipe a file fills, if any.

    Raises:
        InputError: several recipes take it.
    """
    try:
        note = content.get("vitdet")
        origin = note.get("source_format") if isinstance(note, Mapping) else detect(content)
    except InputError:
        return None
    exact = [row for row in COMMANDS if not set(row.options) & set(ALLOWED.values())]
    rows = {(row.recipe, row.overrides): row for row in exact if row.format == origin}
    taken = takes(rows.values(), without_data(content))
    fits = [row for row, report in taken if not report.initialised]
    if len(fits) > 1:
        text = f"weights {source}: {len(fits)} recipes take it. Name the one that it is of, with"
        recipes = ", ".join(f"configs/{row.recipe}.py" for row in fits)
        raise InputError(f"{text} config=... or --config-file: {recipes}.")
    return fits[0] if fits else None


def check_detector(content: Mapping[str, Any], source: str) -> None:
    """Raise an InputError for a backbone alone, of a format that is known."""
    found = describe(content, source=source)
    sizes = found["backbone"]
    if sizes and not found["head"] and found["format"] not in ("", "vitdet"):
        raise InputError(
            f"weights {source}: expected a detector, got a backbone alone ({found['what']}, "
            f"{sizes['what']}). Train a detector that begins with it: vitdet train --data FOLDER "
            f"--weights {source}"
        )
