"""Carry a detector's head over to other classes, by class name.

Rows of the classifier, of a class-specific box regressor and of a class-specific mask predictor
move to where the same class stands in the new list. Layouts are detectron2's: the classifier has
one row a class and the background row last (modeling/roi_heads/fast_rcnn.py), the box regressor
four rows a class, the mask predictor one (mask_head.py), and a RetinaNet's classifier one row a
class for each anchor and no background (meta_arch/retinanet.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitdet.convert.names import shapes_of
from vitdet.convert.rules import Shapes
from vitdet.utils.checks import InputError
from vitdet.utils.state_dicts import rows_entry, rows_of, some


@dataclass(frozen=True)
class _Layout:
    """How many rows of which tensors belong to a class.

    `background` rows, the last, belong to none. With `anchors` all are repeated, once an anchor.
    With `optional` a model may have one set of rows for all classes instead.
    """

    pattern: re.Pattern[str]
    rows: int
    background: int = 0
    anchors: bool = False
    optional: bool = False

    def count(self, classes: int) -> int:
        return classes * self.rows + self.background


_PREDICTOR = r"(^|\.)box_predictor\.(\d+\.)?"
_LAYOUTS = (
    _Layout(re.compile(_PREDICTOR + r"cls_score\.(weight|bias)$"), 1, background=1),
    _Layout(re.compile(_PREDICTOR + r"bbox_pred\.(weight|bias)$"), 4, optional=True),
    _Layout(re.compile(r"(^|\.)mask_head\.predictor\.(weight|bias)$"), 1, optional=True),
    _Layout(re.compile(r"^head\.cls_score\.(weight|bias)$"), 1, anchors=True),
)
# Computed from the data set's counts, so never carried over.
_COUNTED = re.compile(_PREDICTOR + r"fed_loss_cls_weights$")


@dataclass(frozen=True)
class ClassMap:
    """The file's classes and the new ones, and of each new one the old row, None for a new one."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    rows: tuple[int | None, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for a report: who comes from whom, who starts anew or is left."""
        pairs = zip(self.target, self.rows, strict=True)
        carried = {name: self.source[row] for name, row in pairs if row is not None}
        anew = [name for name in self.target if name not in carried]
        left_out = [name for name in self.source if name not in carried.values()]
        return {"carried": carried, "initialised": anew, "left_out": left_out}


def read_classes(path: str | Path) -> dict[int, str]:
    """Return {category id: name} of a JSON file: COCO's annotation format, or a plain list.

    They stand in the order of a head's rows: that of the ids, or of the list, which is 1, 2, ...
    """
    what = f"class list {path}"
    content = _read_json(path, what)
    pairs: list[Any] = []
    if isinstance(content, dict) and isinstance(content.get("categories"), list):
        entries = [each if isinstance(each, dict) else {} for each in content["categories"]]
        pairs = [(each.get("id"), each.get("name")) for each in entries]
    elif isinstance(content, list):
        pairs = list(enumerate(content, 1))
    wrong = [p for p in pairs if type(p[0]) is not int or type(p[1]) is not str or not p[1].strip()]
    if wrong or not pairs:
        got = f"the id {wrong[0][0]!r:.40}, the name {wrong[0][1]!r:.40}" if wrong else "none"
        text = 'a list of names, or COCO\'s "categories" with an "id" and a "name" each'
        raise InputError(f"{what}: expected {text}, got {got}. Write it so.")
    _rows((name for _, name in pairs), what, str)
    _rows((str(number) for number, _ in pairs), f"{what}: ids", str)
    return dict(sorted(pairs))


def read_table(path: str | Path) -> dict[str, str]:
    """Return a JSON table {class of the new list: class of the file's list}."""
    what = f"class table {path}"
    content = _read_json(path, what)
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        text = f"{what}: expected {{new class: class of the file}}, got something else. "
        raise InputError(f'{text}Write it so: {{"cellular_telephone": "cell phone"}}.')
    return content


def match(
    source: Sequence[str], target: Sequence[str], table: Mapping[str, str] | None = None
) -> ClassMap:
    """Find for each new class the old class of the same name.

    `table` is {new class: old class} for those that are called differently. When it is given, if
    only as {}, names are also compared without regard to case, underscores, hyphens and spaces;
    without it they must be equal. Raises InputError for a class that stands in a list twice, or in
    the table and in no list.
    """
    spell = str if table is None else _loosen
    table = table or {}
    old, new = _rows(source, "classes of the file", spell), _rows(target, "new classes", spell)
    _rows(table, "class table", spell)
    for pair in table.items():
        for name, names, what in zip(pair, (new, old), ("new", "file's"), strict=True):
            if spell(name) not in names:
                text = f"class table: expected one of the {what} classes, got {name!r}. The table"
                raise InputError(f"{text} is {{new class: class of the file}}.")
    pairs = {spell(new): spell(old) for new, old in table.items()}
    rows = [old.get(pairs.get(name, name)) for name in map(spell, target)]
    return ClassMap(tuple(source), tuple(target), tuple(rows))


def with_classes(shapes: Shapes, have: int, want: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a model with `have` classes would have with `want`.

    Start from two or more: four rows of a box regressor may be one class's or everyone's.
    """
    result = {name: tuple(shape) for name, shape in shapes.items()}
    for name, layout, repeats in _class_tensors(shapes, have):
        result[name] = (repeats * layout.count(want), *result[name][1:])
    return result | {name: (want,) for name in result if _COUNTED.search(name)}


def carry(
    weights: Mapping[str, torch.Tensor],
    target: Shapes,
    classes: ClassMap,
    initialised: Collection[str] = (),
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Move the rows of every class to its place in the new list.

    Args:
        weights: a state dict in our names, of a detector with `classes.source`. With one class the
            target's shapes say whether a regressor or mask predictor is that class's or everyone's.
        target: {name: shape} of the model with `classes.target`.
        classes: from `match`.
        initialised: what the weights leave to initialisation already, as is returned.

    Returns:
        (state dict with class rows in the new order, zeros in those that start anew; what the model
        initialises itself: names, and "name[rows]" for single rows).
    """
    given = shapes_of(weights)
    tensors = [
        (name, layout, repeats)
        for name, layout, repeats in _class_tensors(given, len(classes.source))
        if target.get(name, (0,))[0] == repeats * layout.count(len(classes.target))
    ]
    if all(layout.optional for _, layout, _ in tensors):
        raise InputError(
            f"weights: expected a detector with a classifier, got names like {some(given)}. "
            "Leave out --source-classes and --target-classes for a backbone."
        )
    open_before = dict(found for found in map(rows_of, initialised) if found)
    moved = {name for name, _, _ in tensors}
    left = [name for name in initialised if name.partition("[")[0] not in moved]
    result = dict(weights)
    for name, layout, repeats in tensors:
        rows = _new_rows(classes, layout, repeats)
        empty = open_before.get(name, ())
        anew = [old is None or any(old in each for each in empty) for old in rows]
        fresh = [row for row, yes in enumerate(anew) if yes]
        pairs = [(new, old) for new, old in enumerate(rows) if old is not None]
        result[name] = weights[name].new_zeros((len(rows), *given[name][1:]))
        result[name][[new for new, _ in pairs]] = weights[name][[old for _, old in pairs]]
        left += [rows_entry(name, fresh)] if fresh else []
    for name in filter(_COUNTED.search, weights):
        del result[name]
        left += [name] if name in target else []
    return result, left


def _class_tensors(shapes: Shapes, classes: int) -> list[tuple[str, _Layout, int]]:
    """Return (name, layout, repeats) of the tensors that have rows for each class."""
    found = []
    for name, shape in shapes.items():
        layout = next((each for each in _LAYOUTS if each.pattern.search(name)), None)
        if layout is None:
            continue
        repeats, rest = divmod(shape[0], layout.count(classes)) if shape else (0, 0)
        if repeats and not rest and (repeats == 1 or layout.anchors):
            found.append((name, layout, repeats))
        elif not layout.optional:
            text = f"expected rows for {classes} classes, got the shape {tuple(shape)}"
            raise InputError(f"{name}: {text}. Check the class list: its number is another.")
    return found


def _new_rows(classes: ClassMap, layout: _Layout, repeats: int) -> list[int | None]:
    """Return for each new row the old one, None for one that starts anew."""
    count = layout.count(len(classes.source))
    rows: list[int | None] = []
    for start in range(0, repeats * count, count):
        for row in classes.rows:
            first = None if row is None else start + row * layout.rows
            rows += [None if first is None else first + i for i in range(layout.rows)]
        rows += range(start + count - layout.background, start + count)
    return rows


def _loosen(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _rows(names: Iterable[str], what: str, spell: Callable[[str], str]) -> dict[str, int]:
    """Return {spelling: row}; raise InputError when two names have one spelling."""
    first: dict[str, str] = {}
    for name in names:
        if spell(name) in first:
            how = "" if spell is str else " without regard to case and underscores"
            got = f"{first[spell(name)]!r} and {name!r}"
            raise InputError(
                f"{what}: expected each once{how}, got {got}. Rename one: rows "
                "are carried over by name, in the order of the ids."
            )
        first[spell(name)] = name
    return {name: row for row, name in enumerate(first)}


def _read_json(path: str | Path, what: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: expected JSON, got {error!s:.100}. Look into it.") from error
