"""YOLO's text labels: one file an image, one line an object, in parts of the image's sides.

Names stand in a data.yaml, which also says where the parts are, or in a classes.txt, one a line.
Labels belong to the image of the same path with "labels" for its last "images", as the path is
written: a link is followed only where there are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from vitdet.data.files import Listing, exists, home, is_file, list_files, read_text, written
from vitdet.data.formats.parts import (
    WHOLE,
    Builder,
    Found,
    counted,
    listed,
    only_wanted,
    spellings,
    split_of,
)
from vitdet.data.formats.yolo_labels import (
    check_for_key_points,
    check_names,
    label_file,
    object_of,
    orphans,
    read_lines,
)
from vitdet.utils.checks import InputError

NAME = "YOLO text labels"
LOOKED_FOR = "a data.yaml or classes.txt with images/ and labels/ (YOLO)"
_NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "names.txt", "_darknet.labels")
_YAML_PARTS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_MAX_YAML = 4 << 20  # bytes

Places = dict[str, list[Path]]


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
    files = [path for path in listing.files if path.name.lower() in _NAME_FILES]
    if len(files) == len(listing.of(".txt", ".names", ".labels")):
        files = []  # without any label
    return yamls or sorted(files, key=lambda path: len(path.parts))[:1]


def _names_parts(path: Path) -> bool:
    lines = (line for line in read_text(path, _MAX_YAML).splitlines() if line[:1].strip())
    keys = {line.partition(":")[0].strip("\"' ") for line in lines}
    usual = "names" in keys or path.stem.lower() in ("data", "dataset")
    return usual and bool(keys & _YAML_PARTS.keys())


def read(
    listing: Listing, files: list[Path], images: Path | None, splits: Collection[str]
) -> Found:
    """Read the parts of a data set: see `coco.read`. What is wrong is named with file and line."""
    (path,) = files
    folder, notes = listing.folder, list[str]()
    if path.suffix.lower() in (".yaml", ".yml"):
        about = _read_yaml(path)
        places = _named_places(path, about, images, notes)
    else:
        lines = map(str.strip, read_text(path).splitlines())
        about = {"names": [line for line in lines if line]}
        places = _places(listing, images, notes)
    names = _names(path, about)
    shape = _key_point_shape(path, about)
    wanted = only_wanted(places, splits)
    labels = {
        split: _labels(split, where, folder, images, notes) for split, where in wanted.items()
    }
    lines = {each: read_lines(each) for found in labels.values() for each in found.values()}
    if shape is None:
        check_for_key_points(path, lines.values())
    if len(wanted) == len(places):
        notes += orphans(listing, {k: v for each in labels.values() for k, v in each.items()}, path)
    parts = {}
    for split, found in labels.items():
        builder = Builder(folder, names)
        for image, label in found.items():
            if size := builder.add_image(image):
                objects = (object_of(x, names, size, shape or (0, 2)) for x in lines[label])
                builder.add_objects(size, objects)
        parts[split] = builder.part(split, places[split][0])
    if shape and shape[0]:
        notes.append("key points are left out: boxes alone are read")
    return Found(folder, NAME, parts, tuple(notes))


def _labels(
    split: str, places: list[Path], folder: Path, images: Path | None, notes: list[str]
) -> dict[Path, Path | None]:
    """Return the images of a part, with the label files of those that have one."""
    paths = [image for place in places for image in _images(place, folder, notes)]
    if not paths:
        raise InputError(f"{places[0]}: expected images, got none. Correct the path.")
    found = {image: label_file(image, folder, images) for image in paths}
    check_names(found.items())
    if bare := sum(each is None for each in found.values()):
        notes.append(f"{split}: {bare} of {counted(len(found), 'image')} have no label file")
    return found


# --- names and places -----------------------------------------------------------------------------


class _Loader(yaml.BaseLoader):
    """All scalars are text (a class may be called no, 1e3 or null); references are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds references (*name), which a data set does not need")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_text(path, _MAX_YAML)
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        got = "text nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: expected YAML, got text that is not ({got}).") from error
    return content if isinstance(content, dict) else {}


def _names(path: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and {str(i) for i in range(len(names))} == set(names):
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        got = repr(names)[:80] if "names" in content else "no such key"
        raise InputError(
            f"{path}: names: expected [name, name, ...] or {{0: name, 1: name, ...}}, got {got}."
        )
    twice = [name for name, count in Counter(names).items() if count > 1 or not name]
    if twice:
        got = f"{twice[0]!r} {names.count(twice[0])} times"
        raise InputError(f"{path}: names: expected names that differ, got {got}.")
    if content.get("nc", "") not in ("", str(len(names))):
        expected = f"{content['nc']} names, as nc says"
        raise InputError(f"{path}: names: expected {expected}, got {len(names)}.")
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
            raise InputError(
                f"{path}: kpt_shape: expected [number of key points, 2 or 3] or none, got {got!r}."
            )


def _named_places(
    path: Path, content: dict[str, Any], images: Path | None, notes: list[str]
) -> Places:
    """Return the folders or lists of images that a data.yaml names.

    They are relative to its `path`, or to itself. What another machine wrote is found by its end,
    as long as the name of the part stands in it; Roboflow writes ../train/images for what lies
    beside it, and names parts that an export does not have.
    """
    root = content.get("path")
    bases = [] if images is None else [images]
    if isinstance(root, str) and root:
        bases += [path.parent / each for each in (home(root), *_ends(root))]
    bases = [base for base in dict.fromkeys((*bases, path.parent)) if base.is_dir()]
    places = Places()
    for key, split in _YAML_PARTS.items():
        values = content.get(key) or []
        for value in map(str, values if isinstance(values, list) else [values]):
            place = _resolved(bases, value, exists, split)
            if place is None and isinstance(values, list):
                raise InputError(f"{path}: {key}: nothing at {value}. Correct or remove it.")
            if place is None:
                notes.append(f"{path.name}: nothing at {value}, which it names as {key}")
                continue
            places.setdefault(split, []).append(place)
            as_written = [written(base / home(value)) for base in bases]
            if place not in as_written and not value.startswith("../"):
                notes.append(f"{path.name}: {value} is found as {place}")
    if not places:
        raise InputError(
            f"{path}: train: expected a folder of images, or a text file that lists them, got "
            f"{'; '.join(notes) or 'no part'}. It is relative to the file, or to its path: key."
        )
    return places


def _ends(value: str, split: str | None = None) -> list[Path]:
    """Return ways to read a path, the longest first; its end alone only with the part's name."""
    found = []
    for parts in spellings(value):
        for first in range(len(parts)):
            lost, kept = map(split_of, parts[:first]), map(split_of, parts[first:])
            if split and split in lost and split not in kept:
                break
            found.append(Path(*parts[first:]))
    return found


def _resolved(
    bases: list[Path], value: str, test: Callable[[Path], bool], split: str | None = None
) -> Path | None:
    """Return what a path written elsewhere means below one of the folders, None for nothing."""
    ends = (base / end for end in _ends(value, split) for base in bases)
    tried = (*(base / home(value) for base in bases), *ends)
    return next((written(each) for each in tried if test(each)), None)


def _places(listing: Listing, images: Path | None, notes: list[str]) -> Places:
    """Return the images of each part where no yaml says so: by obj.data, or by names of folders."""
    for path in listing.of(".data"):
        lines = (line.partition("=") for line in read_text(path).splitlines())
        about = {key.strip(): value.strip() for key, _, value in lines if value}
        if about.keys() & _YAML_PARTS:
            return _named_places(path, about, images, notes)

    def inner(folder: Path) -> Path:
        named = (each for each in folder.iterdir() if each.name.lower() == "images")
        return next((each for each in named if each.is_dir()), folder)

    base, found = inner(images or listing.folder), Places()
    for child in sorted(each for each in base.iterdir() if each.is_dir()):
        if split := split_of(child.name):
            found.setdefault(split, []).append(inner(child))
    return found or {WHOLE: [base]}


def _images(place: Path, folder: Path, notes: list[str]) -> list[Path]:
    """Return the images of a folder, or those that a text file lists."""
    if place.is_dir():
        listing = list_files(written(place))
        notes += listing.notes()
        return listing.images()
    found, moved = [], 0
    for number, line in enumerate(read_text(place).splitlines(), 1):
        text = line.strip()
        path = _resolved([place.parent, folder], text, is_file) if text else None
        if path is not None:
            found.append(path)
            moved += path not in (written(place.parent / text), written(folder / text))
        elif text:
            raise InputError(f"{place}, line {number}: expected an image file, got {text}.")
    if moved:
        notes.append(f"{place.name}: {moved} of {len(found)} images are found by their paths' ends")
    return found
