"""Detectors of other projects: the recipe that a file is for, and its weights by our names.

Nothing is written: the file is converted in memory, with the account of `vitdet.convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from vitdet import config
from vitdet.convert import Report, convert, detect
from vitdet.convert.names import shapes_of
from vitdet.convert.recipes import COMMANDS, Command
from vitdet.utils.checks import InputError
from vitdet.utils.state_dicts import without_data

# what a row may have to allow
ALLOWED = {"resize_patch_embed": "--resize-patch-embed", "allow_inexact": "--allow-inexact"}


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


def account(row: Command, content: Mapping[str, Any], weights: str | None = None) -> Report | None:
    """Return how a file goes into the recipe of a row, None where it does not; see `without_data`.

    `weights` is the key of the file that holds them, None to find it.
    """
    cfg = config.load_config(config.CONFIGS / f"{row.recipe}.py", row.overrides)
    allowed: dict[str, Any] = {name: flag in row.options for name, flag in ALLOWED.items()}
    try:
        return converted(content, cfg.model, weights=weights, **allowed)[1]
    except InputError:
        return None


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
    bare = without_data(content)
    fits = [x for x in rows.values() if (found := account(x, bare)) and not found.initialised]
    if len(fits) > 1:
        text = f"weights {source}: {len(fits)} recipes take it. Name the one that it is of, with"
        recipes = ", ".join(f"configs/{row.recipe}.py" for row in fits)
        raise InputError(f"{text} config=... or --config-file: {recipes}.")
    return fits[0] if fits else None
