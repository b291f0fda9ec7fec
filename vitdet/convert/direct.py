"""A file's weights in our names without a model to fit them to: for the way out alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vitdet.convert.core import check_finite, open_up
from vitdet.convert.places import Places
from vitdet.convert.plan import Given
from vitdet.convert.report import Report
from vitdet.convert.rules import KINDS, Drop, Format, Refuse, root_of
from vitdet.utils.checks import fail
from vitdet.utils.state_dicts import some

_ROOT = "backbone.net."  # where a detector of ours has its backbone


def rename(
    content: Mapping[str, Any],
    *,
    source_format: str | None = None,
    weights: str | None = None,
    source: str = "source",
) -> tuple[dict[str, torch.Tensor], dict[str, str], Report]:
    """Give a file's weights our names, and change nothing else.

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict.
        source_format: a name in `FORMATS`; None to recognise it.
        weights: the key of the file that holds the state dict; None to find it.
        source: the file's name, for messages.

    Returns:
        (state dict, {name: rule} of what the format allows to leave out, account).

    Raises:
        InputError: a format whose weights have to be computed, which takes a model.
    """
    state_dict, fmt, report = open_up(content, source_format, weights, source)
    if fmt.makes:
        remedy = "Add --config-file with a recipe of its size."
        got = f"{fmt.name}, whose weights have to be fitted to one"
        what, expected = f"{source} without a recipe", "a format that only renames"
        fail(what, expected=expected, got=got, remedy=remedy)
    places = _places(fmt, state_dict, source)
    result: dict[str, torch.Tensor] = {}
    constants: dict[str, str] = {}
    for key, tensor in state_dict.items():
        inner, rule = places.inner(key)
        name = (places.target(inner) or inner.removeprefix("/")) if _renames(fmt) else key
        if isinstance(rule, Refuse):
            remedy = "These weights cannot be used."
            fail(f"{source}: {key} as {fmt.name}", expected="a weight", got=rule.why, remedy=remedy)
        if name in result:
            remedy = "Check --source-format."
            fail(f"{source}: weights for {name}", expected="one key", got="two", remedy=remedy)
        check_finite(Given((key,), tensor, rule), source)
        result[name] = tensor
        report.used[key] = name
        if isinstance(rule, Drop):
            constants[name] = rule.why
    return result, constants, report


def _renames(fmt: Format) -> bool:
    return any(getattr(rule, "to", None) is not None for rule in (*fmt.rules, *fmt.outside))


def _places(fmt: Format, names: Mapping[str, object], source: str) -> Places:
    anchors = [fmt.anchor] if fmt.anchor else [kind.anchor for kind in KINDS]
    roots = [root for anchor in anchors if (root := root_of(names, anchor)) is not None]
    if not roots and _renames(fmt):
        remedy = "Check --source-format."
        expected = f"a key that ends in {fmt.anchor}"
        fail(f"{source} as {fmt.name}", expected=expected, got=some(list(names)), remedy=remedy)
    # without a known backbone, as in Swin, every name is outside of it
    return Places(fmt, roots[0] if roots else "backbone.", _ROOT if fmt.detector else "")
