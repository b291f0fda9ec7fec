"""One pass over a COCO content: what tools write otherwise is read, what is wrong is said.

A training, `vitdet data check` and its `--fix` take the same pass. A training stops at the kinds
of `vitdet.data.findings` that have `stops`, or leaves them out; the check prints all; `--fix`
writes the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitdet.data.findings import Finding, Json, Log
from vitdet.data.images import ImageError, read_header
from vitdet.data.labels import Boxes, Labels, Size
from vitdet.data.masks import shown, whole
from vitdet.utils.checks import InputError

Style = Literal["coco", "lvis"]
_LARGEST = 1_000_000  # pixels of a side
_MOST_PIXELS = 2**32  # that run lengths can count


@dataclass(frozen=True)
class ImageFile:
    """What the check knows of an image file: (height, width) stored and upright, or its error."""

    stored: Size = (0, 0)
    upright: Size = (0, 0)
    error: ImageError | None = None


@dataclass
class Cleaned:
    """The result of a pass.

    Attributes:
        content: what was given where nothing had to change, else a copy; the entries in it that
            needed no change are those that were given.
        findings: in the order in which they were found.
        changed: whether the content says something else than what was given.
    """

    content: Json
    findings: list[Finding] = field(default_factory=list)
    changed: bool = False


def clean(
    content: Json,
    images: Path,
    source: Path,
    *,
    style: Style = "coco",
    boxes: Boxes = "ask",
    without_mask: Literal["keep", "drop"] = "keep",
    files: Mapping[str, ImageFile] | None = None,
) -> Cleaned:
    """Read the lists of a COCO content; say and mend what is wrong with them.

    What can be understood is kept. Numbers may be text or floats; ids may be words; boxes and masks
    may be nested or written otherwise; sizes may be missing. An object without a box has that of
    its mask. What has neither, or is of no image or class in the file, is left out.

    Args:
        content: {"images", "annotations", "categories"}, lists of objects; not changed.
        images: the folder that file names are relative to.
        source: where the content comes from, for error messages.
        style: "lvis" where file names are in `coco_url`.
        boxes: how boxes are written; "ask" takes them as x, y, width, height and says when they
            look like corners or fractions.
        without_mask: "drop" leaves out objects without a mask that can be used, where others have
            one.
        files: {file name: what its file is}, for a closer look at everything; None looks for files
            by name, opens only those of images without a size, and leaves alone what a training
            does not stop at.

    Raises:
        InputError: what is no COCO content at all.
    """
    for part in ("images", "annotations", "categories"):
        entries = content.get(part)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            got = "the keys " + ", ".join(map(str, content)) if entries is None else shown(entries)
            raise InputError(
                f'annotation file {source}: expected a list "{part}" of objects (COCO format), got '
                f"{got or 'none'}. Convert the annotations to COCO's format."
            )
    log = Log()
    try:
        classes = _Classes(content["categories"], log)
        found = _Images(content["images"], images, style, files, log)
    except InputError as error:
        raise InputError(f"annotation file {source}, {error}") from error
    labels = Labels(found, classes, log, boxes=boxes, closer=files is not None)
    annotations = labels.read(content["annotations"], without_mask)
    if not log.changed:
        return Cleaned(content, log.found)
    lists = {
        "images": [image for image, _ in found.kept.values()],
        "annotations": annotations,
        "categories": classes.kept,
    }
    return Cleaned({**content, **lists}, log.found, changed=True)


def file_name(image: Json, style: Style = "coco") -> str:
    """Return the name of an image's file, relative to the image folder.

    LVIS has split folder and name in a URL only.

    Raises:
        InputError: there is none.
    """
    if style == "lvis" and isinstance(image.get("coco_url"), str):
        return "/".join(image["coco_url"].split("/")[-2:])
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        got = shown(name) if "file_name" in image else "no such key"
        add = ' (or use style="lvis")' if "coco_url" in image else ""
        raise InputError(
            f'image {shown(image.get("id"))}: expected the key "file_name", got {got}. Add it{add}.'
        )
    return name


class _Ids:
    """Whole numbers for the ids of entries; `of_entries` has one for each."""

    def __init__(self, entries: list[Json]) -> None:
        keys = [_key(each.get("id")) for each in entries]
        self.free = max((key for key in keys if isinstance(key, int)), default=0) + 1
        self._numbers: dict[Any, int] = {}
        self.of_entries = [self._number(key) for key in keys]

    def _number(self, key: Any) -> int:
        if isinstance(key, int):
            return self._numbers.setdefault(key, key)
        if key in self._numbers:
            return self._numbers[key]
        self.free += 1
        if key is not None:
            self._numbers[key] = self.free - 1
        return self.free - 1

    def find(self, given: Any) -> int | None:
        """Return the number that an annotation means by an id, None for an unknown one."""
        return self._numbers.get(_key(given))


def _key(given: Any) -> Any:
    """Return an id to compare by: 1, 1.0 and "1" are one; None where there is none."""
    found = whole(given)
    if found is not None:
        return found
    return None if given is None or isinstance(given, bool) else ("odd", shown(given))


class _Classes:
    """The classes with whole numbers as ids, one of each name, sorted by id."""

    def __init__(self, given: list[Json], log: Log) -> None:
        self._ids = _Ids(given)
        self.first: dict[int, int] = {}  # id of a class: of the first class of that name
        names: dict[str, int] = {}
        classes: dict[int, Json] = {}
        for place, (each, key) in enumerate(zip(given, self._ids.of_entries, strict=True)):
            entry, name = each, each.get("name")
            log.where = f"class {shown(name)}"
            if isinstance(name, int | float) and not isinstance(name, bool):
                log.say("number in another form", f"the name {shown(name)}", "read as text")
                entry = {**entry, "name": str(name)}
            elif not isinstance(name, str) or entry.get("id") is None:
                wanted = "name" if not isinstance(name, str) else "id"
                got = shown(entry[wanted]) if wanted in entry else "no such key"
                raise InputError(
                    f'category number {place}: expected the key "{wanted}", got {got}. Add it.'
                )
            if key in classes:
                raise InputError(
                    f"categories: expected one id each, got 2 times {key}. Correct it."
                )
            classes[key] = log.put(entry, "id", key)
            self.first[key] = names.setdefault(entry["name"], key)
            if self.first[key] != key:
                got = f"the ids {self.first[key]} and {key}"
                log.say("repeated category name", got, f"joined under {self.first[key]}")
        if not classes:
            raise InputError("categories: expected classes, got no category. Add them to the file.")
        self.kept = [classes[key] for key in sorted(classes) if self.first[key] == key]

    def find(self, given: Any) -> int | None:
        """Return the id of a class, None for an unknown one."""
        return self._ids.find(given)


class _Images:
    """The images that stay, in the order of their ids.

    Attributes:
        kept: {id: (image, its (height, width))}.
        left_out: {id: the place of its finding} of those whose file cannot be used.
    """

    def __init__(
        self,
        given: list[Json],
        folder: Path,
        style: Style,
        files: Mapping[str, ImageFile] | None,
        log: Log,
    ) -> None:
        self._ids = _Ids(given)
        self._folder, self._files, self._log = folder, files, log
        self._listed: dict[str, set[str]] = {}
        self.kept: dict[int, tuple[Json, Size]] = {}
        self.left_out: dict[int, int] = {}
        for entry, key in zip(given, self._ids.of_entries, strict=True):
            name = file_name(entry, style)
            log.image_id, log.where = key, f"image {key} ({name[:200]})"
            if key in self.kept or key in self.left_out:
                log.say("repeated image id", shown(entry.get("id")), "the first stays")
                continue
            size = self._size(entry, name)
            if isinstance(size, ImageError):
                self.left_out[key] = len(log.found)
                log.say(size.kind, str(size), "left out with its objects")
                continue
            self.kept[key] = (self._sized(log.put(entry, "id", key), size, name), size)
        self.kept = dict(sorted(self.kept.items()))

    def find(self, given: Any) -> int | None:
        """Return the id of an image, None for an unknown one."""
        return self._ids.find(given)

    def _size(self, entry: Json, name: str) -> Size | ImageError:
        """Return the size that holds: of the file in a closer look, else of the labels."""
        given = _given_size(entry)
        if self._files is not None:
            file = self._files[name]
            if file.error is None:
                return file.stored if given == file.stored else file.upright
            if file.error.kind == "too many pixels" and given is not None:
                self._log.say(file.error.kind, str(file.error))  # sound: nothing is left out
                return given
            return file.error
        if given is not None and self._is_there(name):
            return given
        try:
            found = read_header(self._folder / name).upright  # or says why there is none
        except ImageError as error:
            return error
        return given or found

    def _is_there(self, name: str) -> bool:
        """Whether a file has this name; folders are listed once instead of asking for each."""
        folder, base = os.path.split(name)
        if folder not in self._listed:
            self._listed[folder] = set(_files_in(self._folder / folder))
        return base in self._listed[folder]

    def _sized(self, entry: Json, size: Size, name: str) -> Json:
        """Say where a size is not written as a whole number, or not that of the file."""
        sides = (entry.get("height"), entry.get("width"))
        read, got = _given_size(entry), f"{shown(sides[0])} x {shown(sides[1])} (height x width)"
        file = None if self._files is None else self._files[name]
        if file is not None and read == file.stored != file.upright and file.error is None:
            self._log.say("EXIF rotation", got, "stored without the rotation")
        if read == size and all(type(side) is int for side in sides):
            return entry
        if read == size:
            self._log.say("number in another form", got, "read as numbers")
        else:
            kind = "missing size" if read is None else "wrong size"
            self._log.say(kind, got, f"{size[0]} x {size[1]}, taken from the file")
        return {**entry, "height": size[0], "width": size[1]}


def _given_size(entry: Json) -> Size | None:
    """Return (height, width) of the labels, None where they say none that is possible."""
    height, width = whole(entry.get("height")), whole(entry.get("width"))
    if height is None or width is None or min(height, width) < 1:
        return None
    possible = max(height, width) <= _LARGEST and height * width < _MOST_PIXELS
    return (height, width) if possible else None


def _files_in(folder: Path) -> Iterator[str]:
    """Yield the names of regular files, and of links to such."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if entry.is_file():
                        yield entry.name
                except OSError:  # a link in a circle
                    continue
    except (OSError, ValueError):  # no such folder, or no name of one
        return
