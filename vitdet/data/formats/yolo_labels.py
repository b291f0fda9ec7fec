"""Files of YOLO's labels: where they are, and what their lines mean.

A line is `class x y width height` (centre of the box), `class x1 y1 x2 y2 x3 y3 ...` (a polygon),
or for poses `class x y width height` and key points `px py` or `px py visibility`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitdet.data.files import Listing, read_text, written
from vitdet.data.formats.names import plain
from vitdet.data.formats.parts import Json, counted
from vitdet.utils.checks import InputError

_SLACK = 0.01  # how far a number may lie outside 0 to 1; what sticks out of the image is checked
_BOX, _POLYGON = 4, 6  # numbers after the class
_FEW = 3  # lines that may look like key points by chance
_MOST_COMPARED = 500  # lines


class Line(NamedTuple):
    """A line of a label file: where it stands, its class number, the numbers after it."""

    path: Path
    number: int
    label: float
    values: list[float]

    @property
    def where(self) -> str:
        """File and line, for error messages."""
        return f"{self.path}, line {self.number}"


class Labels:
    """Finds the label file of an image.

    Args:
        folder: of the data.
        images: folder of the images, where the user named it: labels lie in `folder` then.
    """

    def __init__(self, folder: Path, images: Path | None) -> None:
        self._folder, self._images = folder, images
        self._inside: dict[Path, dict[str, str]] = {}
        self._found: dict[Path, Path | None] = {}
        self._used: dict[Path, Path] = {}

    def of(self, image: Path) -> Path | None:
        """Return the label file of an image, None where it has none.

        Raises:
            InputError: another image has the same labels.
        """
        if image not in self._found:
            self._found[image] = found = self._look_for(image)
            if found is not None:
                other = self._used.setdefault(found, image)
                if other != image and other.parent == image.parent:
                    raise InputError(
                        f"images of {image.parent}: expected names that differ by more than their "
                        f"suffix, as labels go by them, got {other.name} and {image.name}. "
                        "Rename one of them, with its labels."
                    )
        return self._found[image]

    def orphans(self, listing: Listing, names_file: Path) -> list[str]:
        """Return a line on label files without an image, if there are any."""
        mine = {path.parent for path in self._used}
        with_images = {image.parent for image in self._found}
        texts = {written(path): path for path in listing.of(".txt")}
        orphans = [
            texts[path]
            for path in texts
            if path not in self._used
            and (path.parent in mine or "labels" in map(str.lower, path.parent.parts))
            and path.parent not in with_images
            and path.name not in ("classes.txt", names_file.name)
        ]
        if not orphans:
            return []
        first = orphans[0].relative_to(listing.folder)
        return [f"left out: {counted(len(orphans), 'label file')} without image (first: {first})"]

    def _look_for(self, image: Path) -> Path | None:
        folders = self._folders(image)
        if self._images is not None and image.is_relative_to(self._images):
            inside = image.parent.relative_to(self._images)
            folders = [self._folder / name / inside for name in ("labels", "Labels", ".")] + folders
        real = Path(os.path.realpath(image))
        choices = [(folder, image.stem) for folder in folders]
        if real != image and folders == [image.parent]:
            choices += [(folder, real.stem) for folder in self._folders(real)]
        for folder, stem in choices:
            names = self._names(folder)
            name = names.get(f"{stem}.txt") or names.get(plain(f"{stem}.txt"))
            if name is not None:
                return folder / name
        return None

    def _folders(self, image: Path) -> list[Path]:
        """Return where "labels" stands for the last "images", else the folder of the image."""
        parts = image.parts[:-1]
        last = next((i for i in reversed(range(len(parts))) if plain(parts[i]) == "images"), None)
        if last is not None:
            name = self._names(Path(*parts[:last])).get("labels")
            folder = Path(*parts[:last], name or "labels", *parts[last + 1 :])
            if folder.is_dir():
                return [folder]
        return [image.parent]

    def _names(self, folder: Path) -> dict[str, str]:
        """Return {name: name} of a folder's entries, and by their plain names."""
        if folder not in self._inside:
            names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
            self._inside[folder] = {plain(n): n for n in names} | {n: n for n in names}
        return self._inside[folder]


def read_labels(path: Path | None) -> list[Line]:
    """Return the lines of a label file.

    Raises:
        InputError: a line that is wrong, with its number.
    """
    found: list[Line] = []
    if path is None:
        return found
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if words:
            where = f"{path}, line {number}"
            values = [_number(where, words, word) for word in words]
            found.append(Line(path, number, values[0], values[1:]))
    return found


def _number(where: str, words: Sequence[str], word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    remedy = "Correct the line."
    if len(words) in (15, 16) and word == words[0]:
        remedy = "These look like labels of KITTI; convert them to COCO's format."
    elif len(words) in (9, 10) and word == words[8]:
        remedy = "These look like oriented boxes of DOTA; convert them to COCO's format."
    elif len(words) == 1 and "," in word:
        remedy = "Separate the numbers by blanks."
    elif word == words[0] and len(words) >= 1 + _BOX:
        remedy = "A line begins with the number of the class, from 0, not with its name."
    raise InputError(f"{where}: expected finite numbers, got {word!r}. {remedy}")


def check_for_key_points(folder: Path, files: list[list[Line]]) -> None:
    """Stop where lines look like boxes with key points, which would be taken for polygons.

    All lines have one length, and points beyond a box lie inside it. A few polygons may look so,
    too, unless their sides cross, or visibilities stand between the points.

    Raises:
        InputError: asks for `kpt_shape`.
    """
    lines = [line for found in files for line in found if len(line.values) > _BOX]
    counts = {len(line.values) for line in lines}
    if len(counts) != 1:
        return
    (count,) = counts
    if count == 2 * _BOX and all(_is_convex(line.values) for line in lines):
        return
    for numbers in (3, 2):
        points, rest = divmod(count - _BOX, numbers)
        if rest or not points:
            continue
        looks = [_looks_like_key_points(line.values, numbers) for line in lines]
        sure = numbers == 3 or len(lines) >= _FEW
        if sum(looks) < 0.9 * len(lines):
            continue
        if sure or any(_crosses_itself(line.values) for line in lines[:_MOST_COMPARED]):
            raise InputError(
                f"{lines[0].where}: expected boxes or polygons, got {count + 1} numbers that look "
                f"like a box and {counted(points, 'key point')}, as in all lines. If so, write "
                f"`kpt_shape: [{points}, {numbers}]` into the data.yaml of {folder}, and the boxes "
                "are read; if they are polygons, `kpt_shape: none`."
            )


def _looks_like_key_points(values: list[float], numbers: int) -> bool:
    x, y, width, height = values[:_BOX]
    points = np.array(values[_BOX:]).reshape(-1, numbers)
    if numbers == 3 and not set(points[:, 2]) <= {0.0, 1.0, 2.0}:
        return False
    half, centre = np.array([width, height]) / 2, np.array([x, y])
    first, last = centre - half, centre + half
    if min(half) <= 0 or min(first) < -2 * _SLACK or max(last) > 1 + 2 * _SLACK:
        return False
    seen = points[(points[:, :2] != 0).any(axis=1), :2]
    return bool((np.abs(seen - centre) <= 1.1 * half + _SLACK).all())


def _is_convex(values: list[float]) -> bool:
    """Whether all corners of a polygon turn to one side, as those of oriented boxes do."""
    sides = np.roll(points := np.array(values).reshape(-1, 2), -1, axis=0) - points
    turns = sides[:, 0] * np.roll(sides[:, 1], -1) - sides[:, 1] * np.roll(sides[:, 0], -1)
    return bool((turns > 0).all() or (turns < 0).all())


def _crosses_itself(values: list[float]) -> bool:
    """Whether two sides of a polygon cross."""
    if len(values) % 2:
        return False
    points = np.array(values).reshape(-1, 2)
    ends = np.roll(points, -1, axis=0)
    count = len(points)

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
        return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))

    for i in range(count):
        for j in range(i + 2, count - (i == 0)):
            a, b, c, d = points[i], ends[i], points[j], ends[j]
            if side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0:
                return True
    return False


def annotation(
    line: Line, names: Sequence[str], size: tuple[int, int], shape: tuple[int, int]
) -> Json:
    """Return what a line means, without ids.

    Args:
        line: of a label file.
        names: of the classes.
        size: (height, width) of the image in pixels.
        shape: (key points, numbers of each) behind a box; none for (0, 2).

    Raises:
        InputError: a line that is wrong, with its number.
    """
    values = line.values
    if line.label != int(line.label) or not 0 <= line.label < len(names):
        raise InputError(
            f"{line.where}: expected a class number from 0 to {len(names) - 1}, got "
            f"{line.label:g}. Correct it, or add the class to the names."
        )
    if shape[0] and len(values) != _BOX:
        if len(values) != _BOX + shape[0] * shape[1]:
            raise InputError(
                f"{line.where}: expected a class, a box and {shape[0]} x {shape[1]} numbers of key "
                f"points, as kpt_shape says, got {len(values) + 1} numbers. Correct one of the two."
            )
        values = values[:_BOX]
    if len(values) != _BOX and (len(values) < _POLYGON or len(values) % 2):
        raise InputError(
            f"{line.where}: expected a class and x y width height, or a class and three or more "
            f"points x y, got {len(values) + 1} numbers. Correct it. (A sixth number is the score "
            "of a prediction; key points need kpt_shape in the data.yaml.)"
        )
    outside = [value for value in values if not -_SLACK <= value <= 1 + _SLACK]
    if outside:
        raise InputError(
            f"{line.where}: expected parts of the image's sides, 0 to 1, got {outside[0]:g}. "
            "Divide pixels by the image's width and height."
        )
    height, width = size
    found: Json = {"category_id": int(line.label) + 1, "iscrowd": 0}
    if len(values) == _BOX:
        x, y, w, h = values
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return found | {"bbox": _rounded(box), "area": round(box[2] * box[3], 3)}
    points = np.array(values).reshape(-1, 2).clip(0, 1) * (width, height)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    xs, ys = points.T
    area = abs(float(np.sum(xs * np.roll(ys, -1) - np.roll(xs, -1) * ys))) / 2
    return found | {
        "bbox": _rounded([left, top, right - left, bottom - top]),
        "area": round(area, 3),
        "segmentation": [_rounded(points.ravel().tolist())],
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 3) for value in values]
