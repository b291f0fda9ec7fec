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
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitdet.utils.checks import fail
from vitdet.utils.state_dicts import rows_entry, rows_of, some

Shapes = Mapping[str, tuple[int, ...]]

_LISTS = "Give COCO's annotation format, or a list of names."


@dataclass(frozen=True)
class _Layout:
    """Which rows of a tensor belong to a class.

    Attributes:
        pattern: names of such tensors.
        rows: rows a class.
        spare: rows that belong to no class, last: the background.
        anchors: whether the whole is repeated, once an anchor.
        optional: whether a model may have one set of rows for all classes instead.
    """

    pattern: re.Pattern[str]
    rows: int
    spare: int = 0
    anchors: bool = False
    optional: bool = False

    def count(self, classes: int) -> int:
        return classes * self.rows + self.spare

    def repeats(self, size: int, classes: int) -> int:
        """Return how often the rows of all classes are there, 0 when this is no such tensor."""
        count = self.count(classes)
        if self.anchors:
            return 0 if size % count else size // count
        return int(size == count)


_PREDICTOR = r"(^|\.)box_predictor\.(\d+\.)?"
_LAYOUTS = (
    _Layout(re.compile(_PREDICTOR + r"cls_score\.(weight|bias)$"), 1, spare=1),
    _Layout(re.compile(_PREDICTOR + r"bbox_pred\.(weight|bias)$"), 4, optional=True),
    _Layout(re.compile(r"(^|\.)mask_head\.predictor\.(weight|bias)$"), 1, optional=True),
    _Layout(re.compile(r"^head\.cls_score\.(weight|bias)$"), 1, anchors=True),
)
# ... and what other projects call a classifier with background row
_CLASSIFIER = re.compile(r"(box_predictor\.(\d+\.)?cls_score|(^|\.)fc_cls)\.weight$")
# Computed from the data set's counts, so never carried over.
_COUNTED = re.compile(_PREDICTOR + r"fed_loss_cls_weights$")


@dataclass(frozen=True)
class ClassMap:
    """Which class of the new list has its rows from which class of the old one.

    Attributes:
        source: names of the file's classes, in the order of its rows.
        target: names of the new classes, in the order of the new rows.
        rows: for each new class the old row, None when it starts anew.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    rows: tuple[int | None, ...]

    def __bool__(self) -> bool:
        """Whether there is a class in common."""
        return any(row is not None for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for a report: who comes from whom, who starts anew or is left."""
        pairs = zip(self.target, self.rows, strict=True)
        carried = {name: self.source[row] for name, row in pairs if row is not None}
        used = set(carried.values())
        return {
            "carried": carried,
            "initialised": [name for name in self.target if name not in carried],
            "left_out": [name for name in self.source if name not in used],
        }


@dataclass
class Carried:
    """What `carry` made.

    Attributes:
        weights: the state dict, class rows in the new order; rows that start anew are zeros.
        initialised: what the model initialises itself: names, and "name[rows]" for single rows.
    """

    weights: dict[str, torch.Tensor]
    initialised: list[str] = field(default_factory=list)


def read_names(path: str | Path) -> list[str]:
    """Return the class names in a JSON file, see `read_classes`."""
    return list(read_classes(path).values())


def read_classes(path: str | Path) -> dict[int, str]:
    """Return {category id: name} of a JSON file: COCO's annotation format, or a plain list.

    They stand in the order of a head's rows: that of the ids, or of the list, which is 1, 2, ...

    Raises:
        InputError: no such file, no JSON, no names, a name or an id that stands there twice.
    """
    what = f"class list {path}"
    content = _read_json(Path(path), what)
    if isinstance(content, dict) and isinstance(content.get("categories"), list):
        ids, names = _of_categories(content["categories"], what)
    elif isinstance(content, list):
        ids, names = list(range(1, len(content) + 1)), content
    else:
        got = f"the keys {some(content)}" if isinstance(content, dict) else type(content).__name__
        fail(what, expected='a list of names, or "categories"', got=got, remedy=_LISTS)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        wrong = next((repr(name) for name in names if not isinstance(name, str)), "an empty one")
        got = wrong if names else "no class"
        fail(what, expected="a name for every class", got=got, remedy=_LISTS)
    _check_unique(names, what)
    return dict(zip(ids, names, strict=True))


def read_table(path: str | Path) -> dict[str, str]:
    """Return a JSON table {class of the new list: class of the file's list}.

    Raises:
        InputError: no such file, no JSON, something else than text to text.
    """
    what = f"class table {path}"
    content = _read_json(Path(path), what)
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        got = type(content).__name__ if not isinstance(content, dict) else "other values than text"
        remedy = 'Write it so: {"cellular_telephone": "cell phone"}.'
        fail(what, expected="{new class: class of the file}", got=got, remedy=remedy)
    return content


def match(
    source: Sequence[str], target: Sequence[str], table: Mapping[str, str] | None = None
) -> ClassMap:
    """Find for each new class the old class of the same name.

    Args:
        source: names of the file's classes.
        target: names of the new classes.
        table: {new class: old class} for those that are called differently. When it is given, if
            only as {}, names are also compared without regard to case, underscores, hyphens and
            spaces; without it they must be equal.

    Raises:
        InputError: a class twice in a list, two old classes for one new class, a name in the table
            that is in no list.
    """
    if table is None:
        _check_unique(source, "classes of the file")
        _check_unique(target, "new classes")
        place = {name: row for row, name in enumerate(source)}
        rows = [place.get(name) for name in target]
    else:
        rows = _match_loosely(source, target, table)
    return ClassMap(tuple(source), tuple(target), tuple(rows))


def _match_loosely(
    source: Sequence[str], target: Sequence[str], table: Mapping[str, str]
) -> list[int | None]:
    loose = {"classes of the file": source, "new classes": target, "class table": table}
    for what, names in loose.items():
        _check_unique(names, what, loosely=True)
    place = {_loosen(name): row for row, name in enumerate(source)}
    known = {_loosen(name) for name in target}
    pairs = {_loosen(new): _loosen(old) for new, old in table.items()}
    for new, old in table.items():
        for name, names, where in ((new, known, "new classes"), (old, place, "file's classes")):
            if _loosen(name) not in names:
                remedy = "The table is {new class: class of the file}."
                fail("class table", expected=f"one of the {where}", got=repr(name), remedy=remedy)
    return [place.get(pairs.get(_loosen(name), _loosen(name))) for name in target]


def _loosen(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _check_unique(names: Iterable[str], what: str, *, loosely: bool = False) -> None:
    spelt: dict[str, list[str]] = {}
    for name in names:
        spelt.setdefault(_loosen(name) if loosely else name, []).append(name)
    twice = next((same for same in spelt.values() if len(same) > 1), None)
    if twice:
        way = " without regard to case and underscores" if loosely else ""
        remedy = "Rename one: rows are carried over by name."
        got = " and ".join(map(repr, twice))
        fail(what, expected=f"each name once{way}", got=got, remedy=remedy)


def _of_categories(categories: list[Any], what: str) -> tuple[list[int], list[Any]]:
    """Return ids and names in the order of the ids, which is the order of a head's rows."""
    ids = [each.get("id") if isinstance(each, dict) else None for each in categories]
    if not all(type(number) is int for number in ids):
        fail(what, expected='an "id" and a "name" in every category', got="none", remedy=_LISTS)
    twice = [str(number) for number, count in Counter(ids).items() if count > 1]
    if twice:
        remedy = "Rows are in the order of the ids, so each is there once."
        fail(what, expected="each id once", got=f"{twice[0]} twice", remedy=remedy)
    ordered = sorted(categories, key=lambda each: each["id"])
    return [each["id"] for each in ordered], [each.get("name") for each in ordered]


def _read_json(path: Path, what: str) -> Any:
    if not path.is_file():
        fail(what, expected="a file", got="nothing there", remedy="Check the path.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        fail(what, expected="JSON", got=str(error)[:100], remedy=_LISTS)


def with_classes(shapes: Shapes, have: int, want: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a model would have with another number of classes.

    Args:
        shapes: {name: shape} of a model with `have` classes. With one class, four rows of a box
            regressor may be one class's or everyone's: start from a model with two or more.
        have: its number of classes.
        want: the other number.
    """
    result = {name: tuple(shape) for name, shape in shapes.items()}
    for name, layout, repeats in _class_tensors(shapes, have):
        result[name] = (repeats * layout.count(want), *result[name][1:])
    for name in filter(_COUNTED.search, result):
        result[name] = (want,)
    return result


def count_in(shapes: Shapes) -> int | None:
    """Return the number of classes of the detector in a file of any format, None without one."""
    counts = {shape[0] - 1 for name, shape in shapes.items() if _CLASSIFIER.search(name) and shape}
    return counts.pop() if len(counts) == 1 else None


def check_count(shapes: Shapes, names: Collection[str], source: str) -> None:
    """Raise InputError when the file's classifier is for another number of classes.

    Args:
        shapes: {name: shape} of the file, in any format's names.
        names: of the file's classes.
        source: the file, for the message.
    """
    count = count_in(shapes)
    if count not in (None, len(names)):
        remedy = "Give the class list that it was trained on."
        expected = f"{count} names, as its head has classes"
        fail(f"classes of {source}", expected=expected, got=f"{len(names)} names", remedy=remedy)


def _class_tensors(shapes: Shapes, classes: int) -> list[tuple[str, _Layout, int]]:
    """Return (name, layout, repeats) of the tensors that have rows for each class."""
    found = []
    for name, shape in shapes.items():
        layout = next((each for each in _LAYOUTS if each.pattern.search(name)), None)
        if layout is None:
            continue
        repeats = layout.repeats(shape[0], classes) if shape else 0
        if repeats:
            found.append((name, layout, repeats))
        elif not layout.optional:
            remedy = "Check the class list: it has another number of classes than the head."
            expected = f"rows for {classes} classes"
            fail(f"{name}", expected=expected, got=f"the shape {tuple(shape)}", remedy=remedy)
    return found


def carry(
    weights: Mapping[str, torch.Tensor],
    target: Shapes,
    classes: ClassMap,
    initialised: Collection[str] = (),
) -> Carried:
    """Move the rows of every class to its place in the new list.

    Args:
        weights: a state dict in our names, of a detector with `classes.source`. With one class the
            target's shapes say whether a regressor or mask predictor is that class's or everyone's.
        target: {name: shape} of the model with `classes.target`.
        classes: from `match`.
        initialised: what the weights leave to initialisation already, as `Carried.initialised`.

    Raises:
        InputError: no head, or one for another number of classes.
    """
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    tensors = [
        (name, layout, repeats)
        for name, layout, repeats in _class_tensors(given, len(classes.source))
        if target.get(name, (0,))[0] == repeats * layout.count(len(classes.target))
    ]
    if not any(not layout.optional for _, layout, _ in tensors):
        remedy = "Leave out --source-classes and --target-classes for a backbone."
        got = f"names like {some(given)}"
        fail("weights", expected="a detector with a classifier", got=got, remedy=remedy)
    fresh_before = dict(found for found in map(rows_of, initialised) if found)
    moved = {name for name, _, _ in tensors}
    result = Carried(dict(weights))
    result.initialised = [name for name in initialised if name.partition("[")[0] not in moved]
    for name, layout, repeats in tensors:
        places = _places(classes, layout, repeats)
        empty = fresh_before.get(name, ())
        result.weights[name], fresh = _move(weights[name], places, empty)
        if fresh:
            result.initialised.append(rows_entry(name, fresh))
    for name in filter(_COUNTED.search, weights):
        del result.weights[name]
        if name in target:
            result.initialised.append(name)
    return result


def _places(classes: ClassMap, layout: _Layout, repeats: int) -> list[int | None]:
    """Return for each new row the old one, None for one that starts anew."""
    old = layout.count(len(classes.source))
    rows: list[int | None] = []
    for start in range(0, repeats * old, old):
        for row in classes.rows:
            first = None if row is None else start + row * layout.rows
            rows += [None if first is None else first + i for i in range(layout.rows)]
        rows += range(start + old - layout.spare, start + old)
    return rows


def _move(
    tensor: torch.Tensor, places: Sequence[int | None], empty: Iterable[range]
) -> tuple[torch.Tensor, list[int]]:
    """Return the tensor with its rows in the new order, zeros in those that start anew, and these.

    Args:
        tensor: (rows, ...).
        places: for each new row the old one, None for a row that starts anew.
        empty: old rows without weights.
    """
    moved = tensor.new_zeros((len(places), *tensor.shape[1:]))
    fresh = [
        new for new, old in enumerate(places) if old is None or any(old in rows for rows in empty)
    ]
    pairs = [(new, old) for new, old in enumerate(places) if old is not None]
    moved[[new for new, _ in pairs]] = tensor[[old for _, old in pairs]]
    return moved, fresh
