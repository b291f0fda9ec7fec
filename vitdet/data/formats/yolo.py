"""YOLO's text labels: one file an image, one line an object, in parts of the image's sides.

A line is `class x y width height` (centre of the box) or `class x1 y1 x2 y2 x3 y3 ...` (a polygon).
Names stand in a data.yaml, which also says where the parts are, or in a classes.txt, one a line.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vitdet.data.formats.parts import (
    WHOLE,
    Found,
    Json,
    Part,
    has_images,
    image_size,
    images_by_stem,
    list_images,
    make_content,
    read_lines,
    split_of,
)
from vitdet.utils.checks import fail

logger = logging.getLogger(__name__)

NAME = "YOLO text labels"
LOOKED_FOR = "a data.yaml or classes.txt with images/ and labels/ (YOLO)"
_NAME_FILES = ("classes.txt", "labels/classes.txt", "obj.names", "labels.txt")
_YAML_PARTS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_SLACK = 0.01  # how far a number may lie outside 0 to 1; what sticks out of the image is checked
_BOX, _POLYGON = 4, 6  # numbers after the class


def find(folder: Path) -> list[Path]:
    """Return the file with the names of the classes, [] where there is none of this format."""
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        if any(line.partition(":")[0].strip() in _YAML_PARTS for line in read_lines(path)):
            return [path]
    for name in _NAME_FILES:
        if (folder / name).is_file() and next(folder.rglob("*.txt"), None) is not None:
            return [folder / name]
    return []


def read(folder: Path, files: list[Path], images: Path | None = None) -> Found:
    """Read the parts of a data set.

    Raises:
        InputError: names, images or labels that are missing or wrong, with file and line.
    """
    del images  # labels find their images by name
    (path,) = files
    if path.suffix in (".yaml", ".yml"):
        names, places = _read_yaml(path)
    else:
        names = [line.strip() for line in read_lines(path) if line.strip()]
        places = _places(folder)
    if not names:
        fail(f"{path}", expected="names of classes", got="none", remedy="Write one a line.")
    parts = {}
    for split, where in places.items():
        parts[split] = Part(split, _content(folder, where, names, path.name), folder, where[0])
    return Found(folder, NAME, parts)


def _read_yaml(path: Path) -> tuple[list[str], dict[str, list[Path]]]:
    """Return names, and the folders or lists of images of each part."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(str(path), expected="YAML", got=f"text that is not ({error})", remedy="Correct it.")
    if not isinstance(content, dict):
        got = type(content).__name__
        fail(str(path), expected="keys names, train and val", got=f"a {got}", remedy="Add them.")
    names = _names(path, content)
    places: dict[str, list[Path]] = {}
    for key, split in _YAML_PARTS.items():
        values = content.get(key)
        if values:
            values = values if isinstance(values, list) else [values]
            places[split] = [_resolve(path, content.get("path"), key, each) for each in values]
    return names, places


def _names(path: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, list) or not names:
        fail(
            f"{path}: names",
            expected="a list of class names, or {0: name, 1: name, ...}",
            got=repr(names)[:80] if "names" in content else "no such key",
            remedy="Add names: [first, second, ...] in the order of the class numbers.",
        )
    if content.get("nc") not in (None, len(names)):
        fail(
            f"{path}: names",
            expected=f"{content['nc']} names, as nc says",
            got=f"{len(names)}",
            remedy="Correct one of the two.",
        )
    return [str(name) for name in names]


def _resolve(path: Path, root: Any, key: str, value: Any) -> Path:
    """Return the place that a data.yaml names.

    Relative to its `path`, or to itself. Roboflow writes ../train/images for what lies beside it.
    """
    text = str(value)
    bases = [path.parent / str(root)] if root else []
    bases.append(path.parent)
    tried = [base / each for base in bases for each in (text, text.removeprefix("../"))]
    for place in tried:
        if place.exists():
            return place.resolve()
    fail(
        f"{path}: {key}",
        expected="a folder of images, or a text file that lists them",
        got=f"nothing at {' or '.join(dict.fromkeys(map(str, tried)))}",
        remedy="Correct it; it is relative to the file, or to its path: if there is one.",
    )


def _places(folder: Path) -> dict[str, list[Path]]:
    """Return the folders of images of each part, where no data.yaml says so."""
    images = folder / "images"
    base = images if images.is_dir() else folder
    found = {}
    for child in sorted(base.iterdir()):
        split = split_of(child.name) if child.is_dir() else None
        if split is not None:
            found[split] = [child / "images" if (child / "images").is_dir() else child]
    return found or {WHOLE: [base]}


def _content(folder: Path, places: list[Path], names: list[str], names_file: str) -> Json:
    images: list[Json] = []
    annotations: list[Json] = []
    used: set[Path] = set()
    for place in places:
        paths = _listed(place) if place.is_file() else list_images(place)
        if not paths:
            fail(str(place), expected="images", got="none", remedy="Correct the path.")
        for group in _by_folder(paths):
            for path in images_by_stem(group).values():
                height, width = image_size(path)
                number = len(images) + 1
                images.append(
                    {"id": number, "file_name": _name(path, folder), "height": height}
                    | {"width": width}
                )
                labels = labels_of(path)
                used.add(labels)
                if labels.is_file():
                    for each in read_labels(labels, names, (height, width)):
                        annotations.append({"image_id": number, **each})
    _tell_orphans(used, names_file)
    return make_content(images, annotations, names)


def _by_folder(paths: list[Path]) -> list[list[Path]]:
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    return list(folders.values())


def _listed(path: Path) -> list[Path]:
    """Return the images that a text file lists, each relative to the file."""
    found = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            image = path.parent / line.strip()
            if not image.is_file():
                where = f"{path}, line {number}"
                fail(where, expected="an image file", got=line.strip(), remedy="Correct the path.")
            found.append(image)
    return found


def _name(path: Path, folder: Path) -> str:
    """File name relative to the data's folder; absolute where the image lies elsewhere."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if folder in path.parents else str(path)


def labels_of(image: Path) -> Path:
    """Return where the labels of an image are: the last folder "images" becomes "labels".

    Without such a folder, or without a folder of labels, they lie beside the image.
    """
    *parents, name = image.parts
    if "images" in parents:
        last = len(parents) - 1 - parents[::-1].index("images")
        base = Path(*parents[:last], "labels")
        if base.is_dir():
            return base.joinpath(*parents[last + 1 :], name).with_suffix(".txt")
    return image.with_suffix(".txt")


def _tell_orphans(used: set[Path], names_file: str) -> None:
    """Say which labels have no image: they are left out."""
    folders = {path.parent for path in used}
    orphans = sorted(
        path
        for folder in folders
        if folder.is_dir() and not has_images(folder)
        for path in folder.glob("*.txt")
        if path not in used and path.name not in ("classes.txt", names_file)
    )
    if orphans:
        logger.warning("%d label files have no image, the first is %s", len(orphans), orphans[0])


def read_labels(path: Path, names: list[str], size: tuple[int, int]) -> Iterator[Json]:
    """Yield the annotations of a label file, without ids.

    Args:
        path: the file.
        names: of the classes.
        size: (height, width) of the image in pixels.

    Raises:
        InputError: a line that is wrong, with its number.
    """
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if words:
            yield _annotation(f"{path}, line {number}", words, names, size)


def _annotation(where: str, words: list[str], names: list[str], size: tuple[int, int]) -> Json:
    numbers = [_number(where, word) for word in words]
    label, values = numbers[0], numbers[1:]
    if label != int(label) or not 0 <= label < len(names):
        fail(
            where,
            expected=f"a class number from 0 to {len(names) - 1}",
            got=words[0],
            remedy="Correct it, or add the class to the names.",
        )
    if len(values) != _BOX and (len(values) < _POLYGON or len(values) % 2):
        fail(
            where,
            expected="a class and x y width height, or a class and three or more points x y",
            got=f"{len(words)} numbers",
            remedy="Correct it. (A sixth number is the score of a prediction.)",
        )
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        got = next(w for w, v in zip(words[1:], values, strict=True) if not 0 <= v <= 1)
        remedy = "Divide pixels by the image's width and height."
        fail(where, expected="parts of the image's sides, 0 to 1", got=got, remedy=remedy)
    height, width = size
    category = {"category_id": int(label) + 1, "iscrowd": 0}
    if len(values) == _BOX:
        x, y, w, h = values
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return category | {"bbox": _rounded(box), "area": round(box[2] * box[3], 3)}
    xs = [min(max(x, 0.0), 1.0) * width for x in values[::2]]
    ys = [min(max(y, 0.0), 1.0) * height for y in values[1::2]]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    polygon = [value for point in zip(xs, ys, strict=True) for value in point]
    return category | {
        "bbox": _rounded(box),
        "area": round(polygon_area(xs, ys), 3),
        "segmentation": [_rounded(polygon)],
    }


def _number(where: str, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        fail(where, expected="finite numbers", got=repr(word), remedy="Correct the line.")
    return value


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


def polygon_area(xs: list[float], ys: list[float]) -> float:
    """Return the area inside a polygon (the shoelace formula)."""
    pairs = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in pairs)) / 2
