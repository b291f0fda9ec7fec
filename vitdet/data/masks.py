"""Numbers, boxes and masks of annotation files, in all the ways in which tools write them."""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any, NamedTuple

from vitdet.utils.run_lengths import encode_segmentation, mask_util

_FAR = 10  # times the image's longer side: a polygon may go so far, and is cut off at the edge
_LONGEST_TEXT = 40  # characters of a number
_WHOLE = 2**63
_PLAIN = {int, float}


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
    if isinstance(values, list) and set(map(type, values)) <= _PLAIN:
        try:
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
    """A mask as it was read.

    Attributes:
        value: polygons [[x1, y1, x2, y2, ...], ...] or run lengths {"size", "counts"}; what was
            given itself where it needed no change; None without a mask.
        encoded: its compressed run lengths, for pycocotools; None without a mask.
        problem: "" or the kind of fault: "wrong mask", "empty mask".
        got: what was found instead.
    """

    value: Any = None
    encoded: Any = None
    problem: str = ""
    got: str = ""


def read_mask(given: Any, size: tuple[int, int]) -> Mask:
    """Read a segmentation: polygons in any nesting, run lengths in any form, or none.

    What is returned without a problem pycocotools can draw: it checks nothing itself, and would
    take all memory or write beyond its own.

    Args:
        given: the value in the file.
        size: (height, width) of the image in pixels.
    """
    parsed = _parsed(given)
    if _is_empty(parsed):
        return Mask()
    if isinstance(parsed, dict):
        value, got = _run_lengths(parsed, size)
    elif isinstance(parsed, list | tuple):
        value, got = _read_list(list(parsed), given, size)
    else:
        value, got = None, shown(given)
    if value is None:
        return Mask(problem="wrong mask", got=got)
    encoded = encode_segmentation(value, size)
    if not mask_util.area(encoded):
        return Mask(problem="empty mask", got="no pixel of the image")
    return Mask(value, encoded)


def is_polygon(part: Any) -> bool:
    """Whether a list has the coordinates of three or more points."""
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def _parsed(given: Any) -> Any:
    """Return what a text holds that tables were written with, such as "[[1, 2, 3]]"."""
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    return given


def _is_empty(given: Any) -> bool:
    """Whether there is no mask: null, "", [], [[]], {}, or no counts in run lengths."""
    if isinstance(given, dict):
        return not given or not given.get("counts", True)
    if isinstance(given, list | tuple):
        return all(part is None or part in ([], {}, "") for part in given)
    return given is None or given == ""


def _read_list(parts: list[Any], given: Any, size: tuple[int, int]) -> tuple[Any, str]:
    """Return (polygons or run lengths, "") or (None, what was found)."""
    while len(parts) == 1 and isinstance(parts[0], list) and isinstance(_first(parts[0]), list):
        parts = parts[0]  # nested once more than needed
    parts = [part for part in parts if part is not None and part not in ([], {}, "")]
    if all(isinstance(part, dict) and "counts" in part for part in parts):
        read = [_run_lengths(part, size) for part in parts]
        wrong = next((got for value, got in read if value is None), None)
        if wrong is not None or len(read) == 1:
            return read[0] if len(read) == 1 else (None, wrong or "")
        return _text(mask_util.merge([encode_segmentation(each, size) for each, _ in read])), ""
    if number(_first(parts)) is not None:
        parts = [parts]  # one polygon without the list round it
    elif len(parts) >= 3 and all(_is_point(part) for part in parts):
        parts = [parts]
    polygons = [_polygon(part) for part in parts]
    if not all(is_polygon(part) for part in polygons):
        return None, f"{shown(given)}, not lists x1, y1, x2, y2, ... of three or more points"
    # pycocotools walks along every edge, also where it is millions of pixels outside
    far = _FAR * max(size)
    if any(max(map(abs, part)) > far for part in polygons if part):
        return None, f"{shown(given)}, points far outside the image of {size[1]} x {size[0]}"
    same = isinstance(given, list) and len(given) == len(polygons)
    if same and all(a is b for a, b in zip(given, polygons, strict=True)):
        return given, ""
    return polygons, ""


def _first(values: list[Any]) -> Any:
    return values[0] if values else None


def _is_point(part: Any) -> bool:
    if isinstance(part, dict):
        return {"x", "y"} <= set(part)
    return isinstance(part, list | tuple) and len(part) == 2


def _polygon(part: Any) -> list[int | float] | None:
    """Return x1, y1, x2, y2, ... of one polygon, also of one written as points."""
    if isinstance(part, list) and part and all(_is_point(point) for point in part):
        points = [[p["x"], p["y"]] if isinstance(p, dict) else p for p in part]
        part = [value for point in points for value in point]
    return numbers(part)


def _run_lengths(given: Any, size: tuple[int, int]) -> tuple[Any, str]:
    """Return (run lengths of this size, "") or (None, what was found)."""
    sides, counts = given.get("size", list(size)), _parsed(given.get("counts"))
    if numbers(sides) != list(size):
        return None, f"run lengths of size {shown(sides)}, not {list(size)} (height, width)"
    lengths = _lengths_of(counts) if isinstance(counts, str | bytes) else numbers(counts)
    if lengths is None or min(lengths) < 0 or any(value != int(value) for value in lengths):
        return None, f"{shown(counts)}, no run lengths"
    if sum(lengths) != math.prod(size):
        return None, f"run lengths that add up to {shown(sum(lengths))}, not {math.prod(size)}"
    plain = isinstance(counts, str) or all(type(value) is int for value in lengths)
    as_given = counts is given.get("counts") and (lengths is counts or isinstance(counts, str))
    if plain and as_given and given.get("size") == list(size):
        return given, ""
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    kept = counts if isinstance(counts, str) else [int(value) for value in lengths]
    return {"size": list(size), "counts": kept}, ""


def _text(encoded: Any) -> dict[str, Any]:
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}


def written(encoded: Any) -> dict[str, Any]:
    """Return compressed run lengths as a json file holds them."""
    return encoded if isinstance(encoded["counts"], str) else _text(encoded)


def _lengths_of(text: str | bytes) -> list[int] | None:
    """Return the run lengths of COCO's compressed form, None where it is none.

    Six bits a character from "0" on: five of a number, the lowest first, and one for more to come;
    from the third number on it is the difference to the last but one (pycocotools, maskApi.c).
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text.encode("utf-8", "replace") if isinstance(text, str) else text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return None if shift else lengths
