"""What the readers of all formats give: the parts of a data set as COCO dicts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

Json = dict[str, Any]

WHOLE = "all"  # the name of the only part of a data set that is not split
SPLITS = ("train", "val", "test")
_WORDS = {
    "train": "train(?:ing|val)?",
    "val": "val(?:id|idation|idate)?|dev|eval(?:uation)?",
    "test": "test(?:ing|dev)?",
}
_SPLIT = re.compile(
    "(?<![a-z])(?:"
    + "|".join(f"(?P<{split}>(?:{words})(?:set)?)" for split, words in _WORDS.items())
    + ")(?![a-z])"
)


@dataclass(frozen=True)
class Part:
    """One part of a data set, in the terms of COCO's format.

    Attributes:
        split: "train", "val" or "test"; "all" where the data are not split.
        content: {"images": [...], "annotations": [...], "categories": [...]}.
        images: the folder that file names are relative to.
        source: the file or folder that it was read from, for people.
        json_file: an annotation file on the disk that holds exactly `content`, or None.
        problems: what a training stops at, and a check goes on with; a line each.
    """

    split: str
    content: Json = field(repr=False)
    images: Path
    source: Path
    json_file: Path | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A data set as it was found in a folder.

    Attributes:
        folder: where.
        format: its name, for people.
        parts: by their split.
        notes: lines for people: what was found otherwise than written, what was left out.
    """

    folder: Path
    format: str
    parts: dict[str, Part]
    notes: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the categories' ids."""
        categories = next(iter(self.parts.values())).content["categories"]
        ordered = sorted(categories, key=lambda each: (str(type(each.get("id"))), each.get("id")))
        return tuple(str(each.get("name")) for each in ordered)


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" where a file's or folder's name says so, else None."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    found = _SPLIT.search(words)
    return None if found is None else found.lastgroup


def split_of_path(path: Path, folder: Path) -> str | None:
    """Return the part that a file is for: by its own name, else by its folders' below `folder`."""
    inside = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    names = (inside.stem, *reversed(inside.parts[:-1]))
    return next((split for name in names if (split := split_of(name))), None)


def make_content(images: Sequence[Json], annotations: Sequence[Json], names: Sequence[str]) -> Json:
    """Put a content together: annotations and categories get ids from 1 on."""
    return {
        "images": list(images),
        "annotations": [{"id": i + 1, **each} for i, each in enumerate(annotations)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
    }


def real_paths(paths: Iterable[Path]) -> Iterator[str]:
    """Yield paths with the links to their folders followed; each folder is looked at once."""
    real = cache(os.path.realpath)
    for path in paths:
        folder, base = os.path.split(path)
        yield f"{real(folder)}/{base}"


def real_files(part: Part) -> Iterator[str]:
    """Yield the images of a part, as `real_paths`."""
    names = (image.get("file_name") for image in part.content["images"])
    texts = (name for name in names if isinstance(name, str) and "\x00" not in name)
    return real_paths(part.images / name for name in texts)


def listed(items: Sequence[object], most: int = 8) -> str:
    """Return the first items of a list, for people."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def counted(count: int, what: str) -> str:
    """Return a number of things: "1 image", "2 images"."""
    if count != 1:
        what += "es" if what.endswith("s") else "s"
    return f"{count} {what}"
