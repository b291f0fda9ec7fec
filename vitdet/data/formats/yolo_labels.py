"""Files of YOLO's labels: where they are, and what their lines mean."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitdet.data.files import Listing, exists, is_link, read_text, written
from vitdet.data.formats.parts import Json, counted
from vitdet.utils.checks import InputError

_SLACK = 0.01  # how far a number may lie outside 0 to 1; what sticks out of the image is checked
_BOX, _POLYGON = 4, 6  # numbers after the class
_FEW = 3  # lines that may look like key points by chance


class Line(NamedTuple):
    """A line of labels: file and number for people, number of the class, numbers after it."""

    where: str
    label: float
    values: list[float]


def label_file(image: Path, folder: Path, given: Path | None) -> Path | None:
    """Return the label file of an image, whose path is as it is written; None where it has none.

    The folder of the data has the labels where the user named (`given`) another for the images.
    """
    own, real, stem = _label_folders(image), Path(os.path.realpath(image)), image.stem
    places = [(place, stem) for place in own]
    if not own:
        places = [(image.parent, stem), *((x, real.stem) for x in _label_folders(real))]
        places.append((real.parent, real.stem))
    if given is not None and image.is_relative_to(given):
        inside = image.parent.relative_to(given)
        names = ("labels", "Labels", ".")
        places = [*((folder / name / inside, stem) for name in names), *places]
    paths = (place / f"{name}.txt" for place, name in places)
    return next((path for path in paths if exists(path) or is_link(path)), None)


def _label_folders(image: Path) -> list[Path]:
    """Return the folder with "labels" for the last "images" of a path, [] where there is none."""
    parts = image.parts[:-1]
    last = max((i for i, part in enumerate(parts) if part.lower() == "images"), default=None)
    if last is None:
        return []
    names = ("labels", "Labels", "LABELS")
    folders = (Path(*parts[:last], name, *parts[last + 1 :]) for name in names)
    return [each for each in folders if each.is_dir()][:1]


def check_names(labels: Iterable[tuple[Path, Path | None]]) -> None:
    """Stop where two images of a folder have the same labels."""
    used: dict[Path, Path] = {}
    for image, path in labels:
        other = used.setdefault(path, image) if path else image
        if other.parent == image.parent and other != image:
            raise InputError(
                f"images of {image.parent}: expected names that differ by more than their suffix, "
                f"got {other.name} and {image.name}. Rename one of them."
            )


def orphans(listing: Listing, labels: dict[Path, Path | None], names: Path) -> list[str]:
    """Return a line on label files without an image, if there are any."""
    used = {path for path in labels.values() if path}
    mine, with_images = {path.parent for path in used}, {image.parent for image in labels}
    found = [
        text
        for text in listing.of(".txt")
        if (path := written(text)) not in used
        and (path.parent in mine or "labels" in map(str.lower, path.parent.parts))
        and path.parent not in with_images
        and path.name not in ("classes.txt", names.name)
    ]
    count, first = counted(len(found), "label file"), (found or [listing.folder])[0]
    line = f"left out: {count} without image (first: {first.relative_to(listing.folder)})"
    return [line] if found else []


def read_lines(path: Path | None) -> list[Line]:
    """Return the lines of a label file; a line that is none is an InputError with its number."""
    found = []
    for number, text in enumerate(read_text(path).splitlines() if path else (), 1):
        try:
            values = list(map(float, text.split()))
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise InputError(
                f"{path}, line {number}: expected finite numbers with blanks between them, the "
                f"first one that of the class and not its name, got {text.strip()[:80]!r}."
            )
        if values:
            found.append(Line(f"{path}, line {number}", values[0], values[1:]))
    return found


def check_for_key_points(names: Path, files: Iterable[list[Line]]) -> None:
    """Stop where lines look like boxes with key points, which would be taken for polygons.

    All lines have one length, and the points beyond a box lie inside it. Two corners beyond a box
    may be those of an oriented box, whose corners all turn to one side.

    Raises:
        InputError: asks for `kpt_shape`.
    """
    lines = [line for found in files for line in found if len(line.values) > _BOX]
    counts = {len(line.values) for line in lines}
    count = counts.pop() if len(counts) == 1 else 0
    if count == 2 * _BOX and all(_is_convex(line.values) for line in lines):
        return
    for numbers in (3, 2):
        points, rest = divmod(count - _BOX, numbers)
        if points <= 0 or rest or (numbers == 2 and len(lines) < _FEW):
            continue
        if sum(_is_pose(line.values, numbers) for line in lines) >= 0.9 * len(lines):
            raise InputError(
                f"{lines[0].where}: expected boxes or polygons, got {count + 1} numbers that look "
                f"like a box and {counted(points, 'key point')}, as in all lines. If so, write "
                f"`kpt_shape: [{points}, {numbers}]` into a data.yaml ({names} names the classes), "
                "and the boxes are read; if they are polygons, `kpt_shape: none`."
            )


def _is_pose(values: list[float], numbers: int) -> bool:
    x, y, width, height = values[:_BOX]
    points = np.array(values[_BOX:]).reshape(-1, numbers)
    if numbers == 3 and not set(points[:, 2]) <= {0.0, 1.0, 2.0}:  # visibility
        return False
    half, centre = np.array([width, height]) / 2, np.array([x, y])
    inside = min(centre - half) >= -2 * _SLACK and max(centre + half) <= 1 + 2 * _SLACK
    seen = points[(points[:, :2] != 0).any(axis=1), :2]
    return bool(min(half) > 0 and inside and (np.abs(seen - centre) <= 1.1 * half + _SLACK).all())


def _is_convex(values: list[float]) -> bool:
    sides = np.roll(points := np.array(values).reshape(-1, 2), -1, axis=0) - points
    turns = sides[:, 0] * np.roll(sides[:, 1], -1) - sides[:, 1] * np.roll(sides[:, 0], -1)
    return bool((turns > 0).all() or (turns < 0).all())


def object_of(line: Line, names: list[str], size: tuple[int, int], shape: tuple[int, int]) -> Json:
    """Return what a line means in an image of (height, width) pixels, in COCO's terms.

    A line is `class x y width height` (centre of the box), `class x1 y1 x2 y2 x3 y3 ...` (a
    polygon), or for poses a box and `shape` (key points, numbers of each; (0, 2) for none).
    """
    values = line.values
    if line.label not in range(len(names)):
        last, got = len(names) - 1, f"{line.label:g}"
        raise InputError(f"{line.where}: expected a class number from 0 to {last}, got {got}.")
    if shape[0] and len(values) != _BOX:
        if len(values) != _BOX + shape[0] * shape[1]:
            wanted = f"a class, a box and {shape[0]} x {shape[1]} numbers, as kpt_shape says"
            raise InputError(f"{line.where}: expected {wanted}, got {len(values) + 1} numbers.")
        values = values[:_BOX]
    if len(values) != _BOX and (len(values) < _POLYGON or len(values) % 2):
        raise InputError(
            f"{line.where}: expected a class and x y width height, or a class and three or more "
            f"points x y, got {len(values) + 1} numbers. (A sixth number is the score of a "
            "prediction; key points need kpt_shape in the data.yaml.)"
        )
    outside = [value for value in values if not -_SLACK <= value <= 1 + _SLACK]
    if outside:
        wanted = "parts of the image's sides, 0 to 1"
        raise InputError(f"{line.where}: expected {wanted}, got {outside[0]:g} (pixels?).")
    height, width = size
    found: Json = {"category_id": int(line.label) + 1, "iscrowd": 0}
    if len(values) == _BOX:
        x, y, w, h = values
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return found | {"bbox": [round(v, 3) for v in box], "area": round(box[2] * box[3], 3)}
    points = np.array(values).reshape(-1, 2).clip(0, 1) * (width, height)
    xs, ys = points.T
    box = [xs.min(), ys.min(), xs.max() - xs.min(), ys.max() - ys.min()]
    return found | {
        "bbox": [round(float(v), 3) for v in box],
        "area": round(abs(float(np.sum(xs * np.roll(ys, -1) - np.roll(xs, -1) * ys))) / 2, 3),
        "segmentation": [[round(float(v), 3) for v in points.ravel()]],
    }
