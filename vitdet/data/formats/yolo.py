"""YOLO's text labels: one file an image, one line an object, in parts of the image's sides.

Names stand in a data.yaml, which also says where the parts are, or in a classes.txt, one a line.
Labels belong to the image of the same path with "labels" for its last "images", as the path is
written: a link is followed only where there are none.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from vitdet.data.files import Listing, exists, home, is_file, list_files, read_text, written
from vitdet.data.formats.names import spellings
from vitdet.data.formats.parts import (
    WHOLE,
    Found,
    Json,
    Part,
    counted,
    listed,
    make_content,
    split_of,
)
from vitdet.data.formats.yolo_labels import Labels, annotation, check_for_key_points, read_labels
from vitdet.data.images import IMAGE_SUFFIXES, ImageError, read_header
from vitdet.utils.checks import InputError

NAME = "YOLO text labels"
LOOKED_FOR = "a data.yaml or classes.txt with images/ and labels/ (YOLO)"
_NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "names.txt", "_darknet.labels")
_YAML_PARTS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_MAX_YAML = 4 << 20  # bytes

Places = dict[str, list[Path]]


def find(listing: Listing) -> list[Path]:
    """Return the file with the names of the classes, [] where there is none of this format."""
    inside = [path for path in listing.files if path.parent == listing.folder]
    yamls = [path for path in inside if path.suffix.lower() in (".yaml", ".yml")]
    yamls = [path for path in yamls if _names_parts(path)]
    yamls = [path for path in yamls if path.stem.lower() == "data"] or yamls
    if len(yamls) > 1:
        raise InputError(
            f"data folder {listing.folder}: expected one yaml of a data set, got "
            f"{listed([path.name for path in yamls])}. Name the one to use instead of the folder."
        )
    if yamls:
        return yamls
    files = [path for path in listing.files if path.name.lower() in _NAME_FILES]
    files = sorted(files, key=lambda path: len(path.parts))[: 2 * len(_YAML_PARTS)]
    if len(files) == len(listing.of(".txt", ".names", ".labels")):
        return []  # without any label
    texts = {path: read_text(path).split() for path in files}
    others = [path for path in files if texts[path] != texts[files[0]]]
    if others and len(others[0].parts) == len(files[0].parts):
        raise InputError(
            f"data folder {listing.folder}: expected one list of classes, got "
            f"{files[0]} and {others[0]} with other names. Write a data.yaml."
        )
    return files[:1]


def _names_parts(path: Path) -> bool:
    lines = (line for line in read_text(path, _MAX_YAML).splitlines() if line[:1].strip())
    keys = {line.partition(":")[0].strip("\"' ") for line in lines}
    return bool(keys & set(_YAML_PARTS)) and (
        "names" in keys or path.stem.lower() in ("data", "dataset")
    )


def read(
    listing: Listing, files: list[Path], images: Path | None, splits: Collection[str]
) -> Found:
    """Read the parts of a data set; the arguments are those of `coco.read`.

    Raises:
        InputError: names, images or labels that are missing or wrong, with file and line.
    """
    (path,) = files
    folder, notes = listing.folder, []
    about: dict[str, Any] = {}
    if path.suffix.lower() in (".yaml", ".yml"):
        about = _read_yaml(path)
        names = _names(path, about)
        places = _named_places(path, about, images, notes)
    else:
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        places = _darknet_places(listing, notes) or _places(images or folder)
    if not names:
        raise InputError(f"{path}: expected names of classes, got none. Write one a line.")
    _check_names(path, names)
    labels = Labels(folder, images)
    wanted = {split: where for split, where in places.items() if split in (WHOLE, *splits)}
    parts: dict[str, tuple[list[Path], list[Any]]] = {}
    for split, where in (wanted or places).items():
        paths = list(
            dict.fromkeys(image for place in where for image in _images(place, folder, notes))
        )
        if not paths:
            raise InputError(f"{where[0]}: expected images, got none. Correct the path.")
        parts[split] = (paths, [read_labels(labels.of(image)) for image in paths])
    shape = _key_point_shape(path, about)
    if shape is None:
        check_for_key_points(folder, [lines for _, found in parts.values() for lines in found])
    elif shape[0]:
        notes.append("key points are left out: boxes alone are read")
    found = {}
    for split, (paths, lines) in parts.items():
        content, problems = _content(folder, paths, lines, names, shape or (0, 2))
        source = places[split][0]
        found[split] = Part(split, content, folder, source, problems=tuple(problems))
        bare = sum(labels.of(image) is None for image in paths)
        if bare:
            notes.append(f"{split}: {bare} of {counted(len(paths), 'image')} have no label file")
    if len(wanted) == len(places):
        notes += labels.orphans(listing, path)
    return Found(folder, NAME, found, tuple(notes))


# --- names and places -----------------------------------------------------------------------------


class _Loader(yaml.BaseLoader):
    """All scalars are text (a class may be called no, 1e3 or null); references are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds references (*name), which a data set does not need")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(read_text(path, _MAX_YAML), _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        got = "text nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: expected YAML, got text that is not ({got}).") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected the keys names, train and val, got {str(content)[:40]!r}. Add them."
        )
    return content


def _names(path: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and {str(i) for i in range(len(names))} == set(names):
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        got = repr(names)[:80] if "names" in content else "no such key"
        raise InputError(
            f"{path}: names: expected a list of class names, or {{0: name, 1: name, ...}}, got "
            f"{got}. Add names: [first, second, ...] in the order of the class numbers."
        )
    count = content.get("nc", "")
    if count not in ("", str(len(names))):
        raise InputError(
            f"{path}: names: expected {count} names, as nc says, got {len(names)}. "
            "Correct one of the two."
        )
    return names


def _check_names(path: Path, names: list[str]) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count > 1 or "" in names:
        got = f"{name!r} {count} times" if count > 1 else "an empty one"
        raise InputError(f"{path}: expected names that differ, got {got}. Correct the names.")


def _key_point_shape(path: Path, content: dict[str, Any]) -> tuple[int, int] | None:
    """Return (key points, numbers of each) of poses, (0, 2) where there are none, None unsaid."""
    shape = content.get("kpt_shape")
    if shape is None:
        return None
    if shape in ("", "none", "None", "null", "~", []):
        return 0, 2
    good = isinstance(shape, list) and len(shape) == 2 and all(str(n).isdecimal() for n in shape)
    if not good or shape[1] not in ("2", "3"):
        raise InputError(
            f"{path}: kpt_shape: expected [number of key points, 2 or 3], got {shape!r}. "
            "Correct it; none means that there are no key points."
        )
    return int(shape[0]), int(shape[1])


def _named_places(
    path: Path, content: dict[str, Any], images: Path | None, notes: list[str]
) -> Places:
    """Return the folders or lists of images that a data.yaml names.

    They are relative to its `path`, or to itself. What another machine wrote is found by its end,
    as long as the name of the part stands in it; Roboflow writes ../train/images for what lies
    beside it, and names parts that an export does not have.
    """
    root = content.get("path")
    bases = [images] if images is not None else []
    if isinstance(root, str) and root:
        bases += [path.parent / each for each in (home(root), *_ends(root, None))]
    bases = [base for base in dict.fromkeys((*bases, path.parent)) if base.is_dir()]
    places: Places = {}
    for key, split in _YAML_PARTS.items():
        values = content.get(key) or []
        for value in map(str, values if isinstance(values, list) else [values]):
            place = _resolved(bases, value, split)
            if place is not None:
                places.setdefault(split, []).append(place)
                roundabout = not any(exists(base / home(value)) for base in bases)
                if roundabout and not value.startswith("../"):
                    notes.append(f"{path.name}: {value} is found as {place}")
            elif isinstance(values, list):
                raise InputError(f"{path}: {key}: nothing at {value}. Correct or remove it.")
            else:
                notes.append(f"{path.name}: nothing at {value}, which it names as {key}")
    ours, theirs = (set(map(os.path.realpath, places.get(s, []))) for s in ("train", "val"))
    if ours & theirs:
        notes.append("val is the same as train: its AP is of images that are trained on")
    if not places:
        raise InputError(
            f"{path}: train: expected a folder of images, or a text file that lists them, got "
            f"{'; '.join(notes) or 'no part'}. Correct it; it is relative to the file, or to its "
            "path: if there is one."
        )
    return places


def _ends(value: str, split: str | None) -> list[Path]:
    """Return ways to read a path, the longest first; its end alone only with the part's name."""
    found = []
    for parts in spellings(value):
        for first in range(len(parts)):
            lost, kept = parts[:first], parts[first:]
            if split and split in map(split_of, lost) and split not in map(split_of, kept):
                break
            found.append(Path(*kept))
    return found


def _resolved(bases: list[Path], value: str, split: str) -> Path | None:
    for base in bases:
        if exists(base / home(value)):
            return written(base / home(value))
    tried = (base / end for end in _ends(value, split) for base in bases)
    return next((written(each) for each in tried if exists(each)), None)


def _darknet_places(listing: Listing, notes: list[str]) -> Places:
    """Return the lists that an obj.data names, or that lie there as train.txt, val.txt, ..."""
    folder = listing.folder
    inside = [path for path in listing.files if path.parent == folder]
    for path in inside:
        if path.suffix.lower() == ".data":
            lines = (line.partition("=") for line in read_text(path).splitlines())
            about = {key.strip(): value.strip() for key, _, value in lines if value}
            if set(about) & set(_YAML_PARTS):
                return _named_places(path, about, None, notes)
    lists = {split_of(path.stem): [path] for path in inside if path.suffix.lower() == ".txt"}
    return {split: where for split, where in lists.items() if split and _is_list(where[0])}


def _is_list(path: Path) -> bool:
    first = next((line.strip() for line in read_text(path).splitlines() if line.strip()), "")
    is_image = Path(first).suffix.lower() in IMAGE_SUFFIXES
    return is_image and any(is_file(path.parent / end) for end in _ends(first, None))


def _places(folder: Path) -> Places:
    """Return the folders of images of each part, where no file says so."""
    named = [each for each in folder.iterdir() if each.is_dir() and each.name.lower() == "images"]
    base = named[0] if named else folder
    found: Places = {}
    for child in sorted(base.iterdir()):
        split = split_of(child.name) if child.is_dir() else None
        if split is not None:
            inside = [each for each in child.iterdir() if each.name.lower() == "images"]
            found.setdefault(split, []).append(inside[0] if inside else child)
    return found or {WHOLE: [base]}


def _images(place: Path, folder: Path, notes: list[str]) -> list[Path]:
    if not place.is_dir():
        return _line_paths(place, folder, notes)
    listing = list_files(place)
    notes += [note for note in listing.notes() if note not in notes]
    return listing.images()


def _line_paths(path: Path, folder: Path, notes: list[str]) -> list[Path]:
    """Return the images that a text file lists, relative to it or to the folder of the data.

    What is not there as written is found by the end of its path; a line without an image is wrong.
    """
    found: list[Path] = []
    moved, cut = 0, 0  # lines found by their ends, leading parts that the last one went without
    for number, line in enumerate(read_text(path).splitlines(), 1):
        text = line.strip()
        if not text:
            continue
        ends = _ends(text, None)
        tried = [Path(text), *ends[cut : cut + 1], *ends]
        there = (
            (each, base)
            for each in tried
            for base in dict.fromkeys((path.parent, folder))
            if is_file(base / each)
        )
        end, base = next(there, (None, folder))
        if end is None:
            raise InputError(
                f"{path}, line {number}: expected an image file, got {text}. "
                "Correct the path: one image a line."
            )
        if end != Path(text):
            moved, cut = moved + 1, ends.index(end)
        found.append(written(base / end))
    if moved:
        notes.append(f"{path.name}: {moved} of {len(found)} images are found by their paths' ends")
    return found


# --- contents -------------------------------------------------------------------------------------


def _content(
    folder: Path, paths: list[Path], lines: list[Any], names: list[str], shape: tuple[int, int]
) -> tuple[Json, list[str]]:
    """Return a part in COCO's terms, and what is wrong with its images."""
    images: list[Json] = []
    annotations: list[Json] = []
    problems: list[str] = []
    above = written(folder)
    for number, (path, found) in enumerate(zip(paths, lines, strict=True), 1):
        inside = path.absolute().is_relative_to(above)
        name = path.absolute().relative_to(above).as_posix() if inside else str(path.absolute())
        images.append({"id": number, "file_name": name})
        try:
            size = read_header(path).upright
        except ImageError as error:
            problems.append(str(error))
            continue
        images[-1] |= {"height": size[0], "width": size[1]}
        for line in found:
            annotations.append({"image_id": number, **annotation(line, names, size, shape)})
    return make_content(images, annotations, names), problems
