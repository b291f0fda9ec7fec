"""YOLO's text labels: one file an image, one line an object, in parts of the image's sides.

Names stand in a data.yaml, which also says where the parts are, or in a classes.txt, one a line.
Labels belong to the image of the same path with "labels" for its last "images", as the path is
written: a link is followed only where there are none.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from vitdet.data import files
from vitdet.data.files import WHOLE, Builder, Found, Listing, counted, listed
from vitdet.data.findings import Json
from vitdet.data.images import Size
from vitdet.utils.checks import InputError

NAME = "YOLO text labels"
LOOKED_FOR = "a data.yaml or classes.txt with images/ and labels/ (YOLO)"
_NAME_FILES = ("classes.txt", "predefined_classes.txt", "labels.txt", "names.txt")
_YAML_PARTS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_MAX_YAML = 4 << 20  # bytes
_SLACK = 0.01  # how far a number may lie outside 0 to 1; what sticks out of the image is checked
_BOX, _POLYGON = 4, 6  # numbers after the class
_SQUARE = 0.02  # how far, of its sides, a corner of an oriented box may lie off
_FEW = 3  # lines that may look like key points by chance

Places = dict[str, list[Path]]


class _Line(NamedTuple):
    """A line of labels: file and number for people, number of the class, numbers after it."""

    where: str
    label: float
    values: list[float]


def find(listing: Listing) -> list[Path]:
    """Return the file with the names of the classes, [] where there is none of this format."""
    inside = [path for path in listing.of(".yaml", ".yml") if path.parent == listing.folder]
    yamls = [path for path in inside if _names_parts(path)]
    yamls = [path for path in yamls if path.stem.lower() == "data"] or yamls
    if len(yamls) > 1:
        raise InputError(
            f"data folder {listing.folder}: expected one yaml of a data set, got "
            f"{listed([path.name for path in yamls])}. Name the one to use instead of the folder."
        )
    names = [path for path in listing.of(".txt") if path.name.lower() in _NAME_FILES]
    names += listing.of(".names", ".labels")
    if len(names) == len(listing.of(".txt", ".names", ".labels")):
        names = []  # without any label
    return yamls or sorted(names, key=lambda path: len(path.parts))[:1]


def _names_parts(path: Path) -> bool:
    keys = set(re.findall(r"^[\"']?(\w+)[\"']? *:", files.read_text(path, _MAX_YAML), re.MULTILINE))
    usual = "names" in keys or path.stem.lower() in ("data", "dataset")
    return usual and not keys.isdisjoint(_YAML_PARTS)


def read(
    listing: Listing, paths: list[Path], images: Path | None, splits: Collection[str]
) -> Found:
    """Read the parts of a data set: see `coco.read`. What is wrong is named with file and line."""
    (path,) = paths
    folder, notes = listing.folder, list[str]()
    if path.suffix.lower() in (".yaml", ".yml"):
        about = _read_yaml(path)
        places = _named_places(path, about, listing, images, notes)
    else:
        about = {"names": list(filter(None, map(str.strip, files.read_text(path).splitlines())))}
        places = _places(listing, images, notes)
    names, shape = _names(path, about), _key_point_shape(path, about)
    wanted = files.only_wanted(places, splits)
    labels = {split: _labels(split, where, listing, notes) for split, where in wanted.items()}
    used = {label for part in labels.values() for label in part.values()}
    lines = {label: list(_lines(label)) if label else [] for label in used}
    if shape is None:
        _check_for_key_points(path, [each for inside in lines.values() for each in inside])
    if len(wanted) == len(places):
        texts = [each for each in listing.of(".txt") if each.name not in (path.name, "classes.txt")]
        below = [each for each in texts if "labels" in map(str.lower, each.parent.parts)]
        rest = [each for each in below if files.written(each) not in used]
        notes += files.left_out("label file", "without image", rest, folder)
    parts = {}
    for split, found in labels.items():
        builder = Builder(folder, names)
        for image, label in found.items():
            if size := builder.add_image(image):
                objects = (_object(each, names, size, shape or (0, 2)) for each in lines[label])
                builder.add_objects(size, objects)
        parts[split] = builder.part(split, places[split][0])
    if shape and shape[0]:
        notes.append("key points are left out: boxes alone are read")
    return Found(folder, NAME, parts, tuple(notes))


# --- names and places -----------------------------------------------------------------------------


class _Loader(yaml.BaseLoader):
    """All scalars are text (a class may be called no, 1e3 or null); references are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds references (*name), which a data set does not need")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> dict[str, Any]:
    text = files.read_text(path, _MAX_YAML)
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        got = "text nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: expected YAML, got text that is not ({got}).") from error
    return content if isinstance(content, dict) else {}


def _names(path: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names", "no such key")
    if isinstance(names, dict) and {str(i) for i in range(len(names))} == set(names):
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        expected, got = "[name, name, ...] or {0: name, 1: name, ...}", repr(names)[:80]
        raise InputError(f"{path}: names: expected {expected}, got {got}.")
    twice = [name for name, count in Counter(names).items() if count > 1 or not name]
    if twice:
        raise InputError(f"{path}: names: expected names that differ, got {twice[0]!r} twice.")
    if content.get("nc", "") not in ("", str(len(names))):
        raise InputError(f"{path}: expected {content['nc']} names, as nc says, got {len(names)}.")
    return names


def _key_point_shape(path: Path, content: dict[str, Any]) -> tuple[int, int] | None:
    """Return (key points, numbers of each) of poses, (0, 2) where there are none, None unsaid."""
    match content.get("kpt_shape"):
        case None:
            return None
        case "" | "none" | "None" | "null" | "~" | []:
            return 0, 2
        case [str(points), ("2" | "3") as numbers] if points.isdecimal():
            return int(points), int(numbers)
        case got:
            expected = "[number of key points, 2 or 3] or none"
            raise InputError(f"{path}: kpt_shape: expected {expected}, got {got!r}.")


def _named_places(
    path: Path, content: dict[str, Any], listing: Listing, images: Path | None, notes: list[str]
) -> Places:
    """Return the folders or lists of images that a data.yaml names.

    They are relative to its `path`, to itself, or to the folder above. What another machine wrote
    is found by its end, as long as the name of the part stands in it; Roboflow writes
    ../train/images for what lies beside it, and names parts that an export does not have.
    """
    root = str(content.get("path") or "")
    bases = (images or path.parent, path.parent / files.home(root), path.parent, path.parent.parent)
    places = Places()
    for key, split in _YAML_PARTS.items():
        values = content.get(key) or []
        for value in map(str, values if isinstance(values, list) else [values]):
            parts = files.spellings(value)[:1]
            forms = (files.home(value), *(Path(*each) for each in parts))
            here = (base / form for form in forms for base in bases)
            place = next(filter(files.exists, here), None)
            if place is None:
                place = _by_end(f"{root}/{value}", listing, split)
                notes += [f"{path.name}: {value} is found as {place}"] if place else []
            if place is not None:
                places.setdefault(split, []).append(files.written(place))
            elif isinstance(values, list):
                raise InputError(f"{path}: {key}: nothing at {value}. Correct or remove it.")
            else:
                notes.append(f"{path.name}: nothing at {value}, which it names as {key}")
    if not places:
        raise InputError(
            f"{path}: train: expected a folder of images, or a text file that lists them, got "
            f"{'; '.join(notes) or 'no part'}. It is relative to the file, or to its path: key."
        )
    return places


def _by_end(name: str, listing: Listing, split: str) -> Path | None:
    """Return the folder of images, or list, that the end of a path means.

    Where the path says the part, that end has to say it.
    """
    folder, parts = listing.folder, files.spellings(name)[0]
    ends = (folder.joinpath(*parts[first:]) for first in range(1, len(parts)))
    place = next(filter(files.exists, ends), None)
    if place is None:
        below = _below(listing)
        folders = {each for path in below.images() for each in path.relative_to(folder).parents}
        choice = [*(folder / each for each in sorted(folders)), *below.of(".txt")]
        place = files.by_names([name], choice, split=split).get(name)
    if place is None or split not in map(files.split_of, parts):
        return place
    return place if split in map(files.split_of, place.relative_to(folder).parts) else None


def _below(listing: Listing) -> Listing:
    """Return what lies in a folder, also where the user named a file in it."""
    return listing if listing.files else files.list_files(listing.folder)


def _places(listing: Listing, images: Path | None, notes: list[str]) -> Places:
    """Return the images of each part where no yaml says so: by obj.data, or by names of folders."""
    for path in listing.of(".data"):
        lines = (line.partition("=") for line in files.read_text(path).splitlines())
        about = {key.strip(): value.strip() for key, _, value in lines if value}
        if not about.keys().isdisjoint(_YAML_PARTS):
            return _named_places(path, about, listing, images, notes)

    def inner(folder: Path) -> Path:
        named = (each for each in folder.iterdir() if each.name.lower() == "images")
        return next((each for each in named if each.is_dir()), folder)

    base, found = inner(images or listing.folder), Places()
    for child in sorted(each for each in base.iterdir() if each.is_dir()):
        if split := files.split_of(child.name):
            found.setdefault(split, []).append(inner(child))
    return found or {WHOLE: [base]}


# --- images and their label files -----------------------------------------------------------------


def _labels(
    split: str, places: list[Path], listing: Listing, notes: list[str]
) -> dict[Path, Path | None]:
    """Return the images of a part, with the label files of those that have one."""
    found: dict[Path, Path | None] = {}
    used: dict[Path, Path] = {}
    for image in (image for place in places for image in _images(place, listing, split, notes)):
        path = found[image] = _label_file(image)
        other = used.setdefault(path, image) if path else image
        if other.parent == image.parent and other != image:
            raise InputError(
                f"images of {image.parent}: expected names that differ by more than their suffix, "
                f"got {other.name} and {image.name}. Rename one of them."
            )
    if not found:
        raise InputError(f"{places[0]}: expected images, got none. Correct the path.")
    bare = [image for image, path in found.items() if path is None]
    if bare and (by_end := _labels_by_end(bare, used, listing, split)):
        found |= by_end
        count, image = counted(len(by_end), "image"), next(iter(by_end))
        notes.append(
            f"{split}: labels of {count} are found by their base names: {image.name} has "
            f"{by_end[image]}"
        )
    if bare := sum(each is None for each in found.values()):
        notes.append(f"{split}: {bare} of {counted(len(found), 'image')} have no label file")
    return found


def _labels_by_end(
    images: list[Path], used: Collection[Path], listing: Listing, split: str
) -> dict[Path, Path]:
    """Return the label files of images that have none where they should be.

    Where others of the part have theirs (`used`), only the name may be spelt otherwise. Where none
    has, the folder of the labels may be another, if it is not that of another part.
    """
    texts = [x for x in _below(listing).of(".txt") if x.name.lower() not in _NAME_FILES]
    parts = ((x, files.split_of_path(x.parent / "-", listing.folder)) for x in texts)
    texts = [files.written(x) for x, part in parts if part in (None, split) or split == WHOLE]
    names = {str(files.written(image.with_suffix(".txt"))): image for image in images}
    found = files.by_names(names, texts, used, split).items()
    pairs = ((names[name], path) for name, path in found)
    return {
        image: path
        for image, path in pairs
        if not used or path.parent in (image.parent, *_label_folders(image))
    }


def _images(place: Path, folder: Listing, split: str, notes: list[str]) -> list[Path]:
    """Return the images of a folder, or those that a text file lists."""
    if place.is_dir():
        listing = files.list_files(files.written(place))
        notes += listing.notes()
        return listing.images()
    lines = [line.strip() for line in files.read_text(place).splitlines()]
    bases = (place.parent, folder.folder)
    found = {
        line: next((x / line for x in bases if files.is_file(x / line)), None) for line in lines
    }
    missing = [line for line, path in found.items() if line and path is None]
    if missing:
        taken = filter(None, found.values())
        found |= files.by_names(missing, _below(folder).images(), taken, split)
        lost = next((line for line in missing if found[line] is None), None)
        if lost is not None:
            number = lines.index(lost) + 1
            raise InputError(f"{place}, line {number}: expected an image file, got {lost}.")
        count = f"{len(missing)} of {len(found)} images"
        notes.append(f"{place.name}: {count} are found by their base names, not as written")
    return [files.written(path) for path in found.values() if path]


def _label_file(image: Path) -> Path | None:
    """Return the label file of an image, whose path is as it is written; None where it has none."""
    places = [each / image.stem for each in _label_folders(image)]
    if not places:
        real = Path(os.path.realpath(image)).with_suffix("")
        places = [image.with_suffix(""), *(x / real.name for x in _label_folders(real)), real]
    paths = (place.with_name(f"{place.name}.txt") for place in places)
    return next((path for path in paths if files.exists(path) or files.is_link(path)), None)


def _label_folders(image: Path) -> list[Path]:
    """Return the folder with "labels" for the last "images" of a path, [] where there is none."""
    parts = image.parts[:-1]
    last = max((i for i, part in enumerate(parts) if part.lower() == "images"), default=None)
    if last is None:
        return []
    names = ("labels", "Labels", "LABELS")
    folders = (Path(*parts[:last], name, *parts[last + 1 :]) for name in names)
    return [each for each in folders if each.is_dir()][:1]


# --- lines of labels ------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[_Line]:
    """Yield the lines of a label file; a line that is none is an InputError with its number."""
    for number, text in enumerate(files.read_text(path).splitlines(), 1):
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
            yield _Line(f"{path}, line {number}", values[0], values[1:])


def _check_for_key_points(names: Path, lines: Iterable[_Line]) -> None:
    """Stop where lines look like boxes with key points, which would be taken for polygons.

    All lines have one length, and the points beyond a box lie inside it. Two corners beyond a box
    may be those of an oriented box, whose corners all turn to one side.
    """
    lines = [line for line in lines if len(line.values) > _BOX]
    counts = {len(line.values) for line in lines}
    count = counts.pop() if len(counts) == 1 else 0
    if count == 2 * _BOX and all(_is_convex(line.values) for line in lines):
        turned = [_is_turned(line.values) for line in lines]
        if sum(each is not None for each in turned) >= 0.9 * len(lines) and any(turned):
            raise InputError(
                f"{lines[0].where}: expected boxes or polygons, got four corners that look like an "
                "oriented box, as in all lines. Only upright boxes are read: write x y width "
                "height; if they are polygons, write `kpt_shape: none` into a data.yaml."
            )
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


def _is_turned(values: list[float]) -> bool | None:
    """Whether four corners are a rectangle that is not upright; None where they are none.

    In parts of the sides of an image a rectangle is a parallelogram.
    """
    points = np.array(values).reshape(-1, 2)
    slack = _SQUARE * np.ptp(points, axis=0)
    if (np.abs(points[0] + points[2] - points[1] - points[3]) > slack).any():
        return None
    at_edge = np.minimum(points - points.min(axis=0), points.max(axis=0) - points) <= slack
    return not at_edge.all()


def _is_convex(values: list[float]) -> bool:
    sides = np.roll(points := np.array(values).reshape(-1, 2), -1, axis=0) - points
    turns = sides[:, 0] * np.roll(sides[:, 1], -1) - sides[:, 1] * np.roll(sides[:, 0], -1)
    return bool((turns > 0).all() or (turns < 0).all())


def _object(line: _Line, names: list[str], size: Size, shape: tuple[int, int]) -> Json:
    """Return what a line means in an image of (height, width) pixels, in COCO's terms.

    A line is `class x y width height` (centre of the box), `class x1 y1 x2 y2 x3 y3 ...` (a
    polygon), or for poses a box and `shape` (key points, numbers of each; (0, 2) for none).
    """
    values, count = line.values, len(line.values)
    expected = got = ""
    if line.label not in range(len(names)):
        expected, got = f"a class number from 0 to {len(names) - 1}", f"{line.label:g}"
    elif shape[0] and count not in (_BOX, _BOX + shape[0] * shape[1]):
        expected = f"a class, a box and {shape[0]} x {shape[1]} numbers, as kpt_shape says"
    elif not shape[0] and count != _BOX and (count < _POLYGON or count % 2):
        expected = "a class and x y width height, or a class and three or more points x y"
        got = f"{count + 1} numbers (a sixth is a score; key points need kpt_shape in a data.yaml)"
    values = values[:_BOX] if shape[0] else values
    outside = [value for value in values if not -_SLACK <= value <= 1 + _SLACK]
    if outside and not expected:
        expected, got = "parts of the image's sides, 0 to 1", f"{outside[0]:g} (pixels?)"
    if expected:
        raise InputError(f"{line.where}: expected {expected}, got {got or f'{count + 1} numbers'}.")
    height, width = size
    found: Json = {"category_id": int(line.label) + 1, "iscrowd": 0}
    if len(values) == _BOX:
        x, y, w, h = values
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return found | {"bbox": [round(v, 3) for v in box]}
    points = np.array(values).reshape(-1, 2).clip(0, 1) * (width, height)
    box = np.concatenate([points.min(axis=0), np.ptp(points, axis=0)])
    polygon = points.ravel().round(3).tolist()
    return found | {"bbox": box.round(3).tolist(), "segmentation": [polygon]}
