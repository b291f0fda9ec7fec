"""Numbers, boxes and masks of annotation files, in all the ways in which tools write them."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from vitdet.utils.run_lengths import covers, encode_segmentation, mask_util

_FAR = 10  # times the image's longer side: a polygon may go so far, and is cut off at the edge
_LONGEST_TEXT = 40  # characters of a number
_WHOLE = 2**63
_DEEPEST = 4  # nesting of lists
_EMPTY = (None, [], {}, "")


def shown(value: Any) -> str:
    """Return a value for people, cut short however large or deep it is."""
    if type(value) is int and abs(value) < _WHOLE:
        return str(value)
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"a {type(value).__name__} that is too large to print"


def number(value: Any) -> int | float | None:
    """Return a finite number, also one that is written as text; None for anything else."""
    try:
        if isinstance(value, str) and len(value) <= _LONGEST_TEXT:
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if math.isfinite(value) else None
    except (ValueError, OverflowError):  # no number, or one of hundreds of digits
        return None


def whole(value: Any) -> int | None:
    """Return a whole number of at most 63 bits, also from "7" and 7.0; None for anything else."""
    found = value if type(value) is int else number(value)
    if found is None or found != int(found) or abs(found) >= _WHOLE:
        return None
    return int(found)


def numbers(values: Any) -> list[int | float] | None:
    """Return a list of finite numbers, the same list where nothing had to be read as one."""
    if not isinstance(values, list | tuple):
        return None
    try:
        if isinstance(values, list) and set(map(type, values)) <= {int, float}:
            return values if all(map(math.isfinite, values)) else None
    except OverflowError:
        return None
    found = [read for value in values if (read := number(value)) is not None]
    return found if len(found) == len(values) else None


def read_box(given: Any) -> list[int | float] | None:
    """Return four numbers of a box: a list, text of one, or {"x", "y", "width", "height"}."""
    given = _parsed(given)
    if isinstance(given, dict):
        width, height = (given.get(key, given.get(key[0])) for key in ("width", "height"))
        given = [given.get("x"), given.get("y"), width, height]
    box = numbers(given)
    return box if box is not None and len(box) == 4 else None


class Mask(NamedTuple):
    """A mask as it was read."""

    # polygons [[x1, y1, x2, y2, ...], ...] or run lengths {"size", "counts"}; what was given itself
    # where it needed no change; None without a mask
    value: Any = None
    encoded: Any = None  # its compressed run lengths, for pycocotools; None without a mask
    problem: str = ""  # the kind of fault: "wrong mask", "empty mask"
    got: str = ""  # what was found instead


def read_mask(given: Any, size: tuple[int, int]) -> Mask:
    """Read a segmentation: polygons in any nesting, run lengths in any form, or none.

    What is returned without a problem pycocotools can draw: it checks nothing itself, and would
    take all memory or write beyond its own. `size` is the (height, width) of the image in pixels.
    """
    if given in _EMPTY:
        return Mask()
    parts = list(_parts(given))
    if not parts or (isinstance(parts[0], dict) and not parts[0].get("counts", parts[0])):
        return Mask()
    lengths = isinstance(parts[0], dict)
    value, got = _run_lengths(parts, size) if lengths else _polygons(parts, given, size)
    if value is None:
        return Mask(problem="wrong mask", got=got)
    encoded = encode_segmentation(value, size)
    if not mask_util.area(encoded):
        return Mask(problem="empty mask", got="no pixel of the image")
    return Mask(value, encoded)


def _polygons(parts: list[Any], given: Any, size: tuple[int, int]) -> tuple[Any, str]:
    """Return (polygons, "") or (None, what was found)."""
    if not all(map(is_polygon, parts)):
        return None, f"{shown(given)}, not lists x1, y1, x2, y2, ... of three or more points"
    # pycocotools walks along every edge, also where it is millions of pixels outside
    if any(max(map(abs, part)) > _FAR * max(size) for part in parts):
        return None, f"{shown(given)}, points far outside the image of {size[1]} x {size[0]}"
    same = isinstance(given, list) and [id(part) for part in given] == [id(part) for part in parts]
    return (given if same else parts), ""


def _run_lengths(parts: list[Any], size: tuple[int, int]) -> tuple[Any, str]:
    """Return (run lengths of this size, "") or (None, what was found)."""
    found = []
    for part in parts:
        read = part if isinstance(part, dict) else {}
        sides, counts = read.get("size", list(size)), _parsed(read.get("counts"))
        if numbers(sides) != list(size):
            return None, f"run lengths of size {shown(sides)}, not {list(size)} (height, width)"
        if isinstance(counts, list) and set(map(type, counts)) != {int}:
            counts = list(map(whole, counts))
        lengths = {"size": list(size), "counts": counts}
        if (isinstance(counts, str) and not counts.isascii()) or not covers(lengths, size):
            return None, f"{shown(counts)}, no run lengths of {math.prod(size)} pixels"
        same = counts is read.get("counts") and set(map(type, read.get("size", ()))) == {int}
        found.append(part if same else lengths)
    if len(found) == 1:
        return found[0], ""
    return as_text(mask_util.merge([encode_segmentation(each, size) for each in found])), ""


def is_polygon(part: Any) -> bool:
    """Whether a list has the coordinates of three or more points."""
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def as_text(encoded: Any) -> dict[str, Any]:
    """Return compressed run lengths as a json file holds them."""
    counts = encoded["counts"]
    text = counts if isinstance(counts, str) else counts.decode("ascii")
    return {"size": [int(side) for side in encoded["size"]], "counts": text}


def _parsed(given: Any) -> Any:
    """Return what a text holds that tables were written with, such as "[[1, 2, 3]]"."""
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    return given


def _parts(given: Any, depth: int = 0) -> Iterator[Any]:
    """Yield polygons x1, y1, x2, y2, ... and run lengths in any nesting; None for what is none."""
    read = _parsed(given) if depth == 0 else given
    if isinstance(read, dict):
        yield read
    elif not isinstance(read, list | tuple) or depth > _DEEPEST:
        yield None
    elif len(read) >= 3 and all(map(_is_point, read)):
        points = [[p["x"], p["y"]] if isinstance(p, dict) else p for p in read]
        yield numbers([value for point in points for value in point])
    elif read and not isinstance(read[0], list | tuple | dict):
        yield numbers(read)
    else:
        for part in read:
            if part not in _EMPTY:
                yield from _parts(part, depth + 1)


def _is_point(part: Any) -> bool:
    if isinstance(part, dict):
        return {"x", "y"} <= set(part)
    return isinstance(part, list | tuple) and len(part) == 2
