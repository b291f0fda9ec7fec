"""The images and classes of a COCO content, under whole numbers as ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitdet.data.files import is_file
from vitdet.data.findings import Json, Log
from vitdet.data.images import Header, ImageError, Size, read_header
from vitdet.data.masks import shown, whole
from vitdet.utils.checks import InputError

Style = Literal["coco", "lvis"]
_LARGEST = 1_000_000  # pixels of a side
_MOST_PIXELS = 2**32  # that run lengths can count


@dataclass(frozen=True)
class ImageFile:
    """What the check knows of an image file: its header or its error, a digest of its bytes."""

    header: Header | None = None
    error: ImageError | None = None
    digest: str = ""


def file_name(image: Json, style: Style = "coco") -> str:
    """Return the name of an image's file; LVIS has split folder and name in a URL only.

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


def where(key: int, name: Any) -> str:
    """Return an image, for people."""
    return f"image {key} ({str(name)[:200]})"


class Ids:
    """Whole numbers for the ids of entries: `numbers` has one for each."""

    def __init__(self, entries: list[Json]) -> None:
        keys = [_key(each.get("id")) for each in entries]
        self._free = max((key for key in keys if isinstance(key, int)), default=0)
        self._known: dict[Any, int] = {key: key for key in keys if isinstance(key, int)}
        self.numbers = [self._number(key) for key in keys]

    def _number(self, key: Any) -> int:
        if key not in self._known:
            self._free += 1
            if key is None:
                return self._free
        return self._known.setdefault(key, self._free)

    def find(self, given: Any) -> int | None:
        """Return the number that an annotation means by an id, None for an unknown one."""
        return self._known.get(_key(given))


def _key(given: Any) -> Any:
    """Return an id to compare by: 1, 1.0 and "1" are one; None where there is none."""
    found = whole(given)
    if found is not None:
        return found
    return None if given is None or isinstance(given, bool) else ("odd", shown(given))


class Classes(Ids):
    """The classes of a content: `kept` has one entry of each name, sorted by id.

    `first` is {id of a class: id of the first class of that name}.
    """

    def __init__(self, given: list[Json], log: Log) -> None:
        super().__init__(given)
        self.first: dict[int, int] = {}
        names: dict[str, int] = {}
        classes: dict[int, Json] = {}
        for place, (each, key) in enumerate(zip(given, self.numbers, strict=True)):
            entry, name = dict(each), each.get("name")
            log.where = f"class {shown(name)}"
            if isinstance(name, int | float) and not isinstance(name, bool):
                log.say("number in another form", f"the name {shown(name)}", "read as text")
                entry["name"] = str(name)
            elif not isinstance(name, str) or entry.get("id") is None:
                wanted = "name" if not isinstance(name, str) else "id"
                got = shown(entry[wanted]) if wanted in entry else "no such key"
                raise InputError(
                    f'category number {place}: expected the key "{wanted}", got {got}. Add it.'
                )
            if key in classes:
                raise InputError(f"categories: expected one id each, got 2 times {key}.")
            log.put(entry, "id", key)
            classes[key] = entry
            self.first[key] = names.setdefault(entry["name"], key)
            if self.first[key] != key:
                got = f"the ids {self.first[key]} and {key}"
                log.say("repeated category name", got, f"joined under {self.first[key]}")
        if not classes:
            raise InputError("categories: expected classes, got no category. Add them to the file.")
        self.kept = [classes[key] for key in sorted(classes) if self.first[key] == key]


class Images(Ids):
    """The images of a content: `kept` is {id: (image, its (height, width))}, sorted by id.

    `left_out` is {id: the place of its finding} of those whose file cannot be used.
    """

    def __init__(
        self,
        given: list[Json],
        folder: Path,
        style: Style,
        files: Mapping[str, ImageFile] | None,
        log: Log,
    ) -> None:
        super().__init__(given)
        kept: dict[int, tuple[Json, Size]] = {}
        self.left_out: dict[int, int] = {}
        for entry, key in zip(given, self.numbers, strict=True):
            name = file_name(entry, style)
            log.image_id, log.where = key, where(key, name)
            if key in kept or key in self.left_out:
                log.say("repeated image id", shown(entry.get("id")), "the first stays")
                continue
            try:
                size = _size(entry, folder / name, None if files is None else files[name], log)
            except ImageError as error:
                self.left_out[key] = len(log.found)
                log.say(error.kind, str(error), "left out with its objects")
            else:
                read = {**entry, "height": size[0], "width": size[1]}
                log.put(read, "id", key)
                kept[key] = (read, size)
        self.kept = dict(sorted(kept.items()))


def _size(entry: Json, path: Path, file: ImageFile | None, log: Log) -> Size:
    """Return the size that holds; say where the labels have another, or write it otherwise.

    In a closer look it is that of the file, else that of the labels.

    Raises:
        ImageError: the file cannot be used.
    """
    sides = (entry.get("height"), entry.get("width"))
    given, got = _given(sides), f"{shown(sides[0])} x {shown(sides[1])} (height x width)"
    if file is None:
        size = given if given and is_file(path) else read_header(path).upright
    elif file.header is not None:
        stored, upright = file.header.stored, file.header.upright
        size = stored if given == stored else upright
        if given == stored != upright:
            log.say("EXIF rotation", got, "stored without the rotation")
    elif file.error and file.error.kind == "too many pixels" and given is not None:
        log.say(file.error.kind, str(file.error))  # sound: nothing is left out
        size = given
    else:
        assert file.error is not None
        raise file.error
    if given != size:
        kind = "wrong size" if given else "missing size"
        log.say(kind, got, f"{size[0]} x {size[1]}, taken from the file")
    elif any(type(side) is not int for side in sides):
        log.say("number in another form", got, "read as numbers")
    return size


def _given(sides: tuple[Any, Any]) -> Size | None:
    """Return the size that the labels say, None where it is none that is possible."""
    height, width = map(whole, sides)
    if height is None or width is None or min(height, width) < 1:
        return None
    possible = max(height, width) <= _LARGEST and height * width < _MOST_PIXELS
    return (height, width) if possible else None
