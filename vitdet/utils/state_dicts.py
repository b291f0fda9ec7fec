"""Say in one line why the weights of a file do not fit a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from vitdet.utils.checks import InputError, fail

Shapes = Mapping[str, tuple[int, ...]]
_BLOCK = re.compile(r"^(?:.*\.)?blocks\.(\d+)\.")
_EMBED = re.compile(r"patch_embed\.proj\.weight$")
_CLASSES = re.compile(r"box_predictor\.(\d+\.)?cls_score\.weight$")
# (name, what its first dimension counts, entries that are not counted, remedy)
_COUNTS = (
    (_EMBED, "channels (embed_dim)", 0, "Use the recipe of its size."),
    (_CLASSES, "classes", 1, "Use a recipe with its classes, or convert its backbone alone."),
)


def some(names: Collection[str], count: int = 3) -> str:
    """Return the first names as text, with dots when there are more."""
    shown = ", ".join(str(name) for name in list(names)[:count])
    return shown + (", ..." if len(names) > count else "")


def block_count(names: Iterable[str]) -> int:
    """Return how many transformer blocks the names speak of."""
    return len({found[1] for found in map(_BLOCK.match, names) if found})


def compare_sizes(given: Shapes, target: Shapes, *, source: str) -> None:
    """Raise InputError when file and model differ in width, depth or number of classes.

    Args:
        given: {name: shape} of the file, in the model's names.
        target: {name: shape} of the model.
        source: the file, for the message.
    """
    for pattern, what, spare, advice in _COUNTS:
        for name in filter(pattern.search, given):
            have, want = given[name][0] - spare, target.get(name, given[name])[0] - spare
            if have != want:
                raise InputError(f"{source}: file has {have} {what}, model {want}. {advice}")
    blocks, wanted = block_count(given), block_count(target)
    if blocks and wanted and blocks != wanted:
        advice = "Use the recipe of its size."
        raise InputError(f"{source}: file has {blocks} blocks, model {wanted}. {advice}")


def compare_shapes(given: Shapes, target: Shapes, *, source: str, remedy: str) -> None:
    """Raise InputError when a name that both have has two shapes; sizes are named as sizes.

    Args:
        given: {name: shape} of the file, in the model's names.
        target: {name: shape} of the model.
        source: the file, for the message.
        remedy: what to do when neither the size nor the number of classes is the cause.
    """
    compare_sizes(given, target, source=source)
    wrong = [name for name in given if name in target and given[name] != target[name]]
    if wrong:
        name = wrong[0]
        more = f" (and of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        expected, got = f"{target[name]} (model)", f"{given[name]} (file)"
        fail(f"{source}: shape of {name}{more}", expected=expected, got=got, remedy=remedy)
