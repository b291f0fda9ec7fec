"""Say in one line why the weights of a file do not fit a model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from vitdet.utils.checks import InputError, one_line

Shapes = Mapping[str, tuple[int, ...]]
_BLOCK = re.compile(r"^(?:.*\.)?blocks\.(\d+)\.")
_ROWS = re.compile(r"(.+)\[(\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*)\]$")
_SIZE = "Use the recipe of its size."
# (name, what its first dimension counts, entries that are not counted, remedy)
_COUNTS = (
    (re.compile(r"patch_embed\.proj\.weight$"), "channels (embed_dim)", 0, _SIZE),
    (
        re.compile(r"box_predictor\.(\d+\.)?cls_score\.weight$"),
        *("classes", 1, "Use a recipe, or lists, with its classes, or convert its backbone alone."),
    ),
)


def some(names: Collection[str], count: int = 3) -> str:
    """Return the first names as text, with dots when there are more."""
    shown = one_line(", ".join(str(name) for name in list(names)[:count]))
    return shown + (", ..." if len(names) > count else "")


def rows_of(entry: str) -> tuple[str, list[range]] | None:
    """Read "name[0-3,7]": rows of a tensor that a file leaves to the model's own initialisation.

    Returns:
        (name, rising ranges of rows), no ranges when the numbers do not rise; None for a name.
    """
    found = _ROWS.match(entry)
    if found is None:
        return None
    ends = [part.partition("-") for part in found[2].split(",")]
    rows = [range(int(a), int(b or a) + 1) for a, _, b in ends]
    rising = all(rows) and all(a.stop <= b.start for a, b in itertools.pairwise(rows))
    return found[1], rows if rising else []


def rows_entry(name: str, rows: Sequence[int]) -> str:
    """Write rising row numbers as `rows_of` reads them."""
    ends: list[list[int]] = []
    for row in rows:
        if ends and row == ends[-1][1] + 1:
            ends[-1][1] = row
        else:
            ends.append([row, row])
    return f"{name}[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in ends)}]"


def _blocks(names: Iterable[str]) -> int:
    return len({found[1] for found in map(_BLOCK.match, names) if found})


def compare_sizes(given: Shapes, target: Shapes, *, source: str) -> None:
    """Raise InputError when file and model differ in width, depth or number of classes.

    Args:
        given: {name: shape} of the file, in the model's names.
        target: {name: shape} of the model.
        source: the file, for the message.
    """
    for pattern, what, spare, remedy in _COUNTS:
        for name in filter(pattern.search, given):
            have, want = given[name], target.get(name, given[name])
            if have and want and have[0] != want[0]:
                numbers = f"file has {have[0] - spare} {what}, model {want[0] - spare}"
                raise InputError(f"{source}: {numbers}. {remedy}")
    blocks, wanted = _blocks(given), _blocks(target)
    if blocks and wanted and blocks != wanted:
        raise InputError(f"{source}: file has {blocks} blocks, model {wanted}. {_SIZE}")


def compare_shapes(given: Shapes, target: Shapes, *, source: str, remedy: str) -> None:
    """Raise InputError when a name that both have has two shapes; sizes are named as sizes.

    Takes what `compare_sizes` takes, and what to do when no size is the cause.
    """
    compare_sizes(given, target, source=source)
    wrong = [name for name in given if name in target and given[name] != target[name]]
    if wrong:
        more = f" (and of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        shapes = f"expected {target[wrong[0]]} (model), got {given[wrong[0]]} (file)"
        raise InputError(f"{source}: shape of {wrong[0]}{more}: {shapes}. {remedy}")
