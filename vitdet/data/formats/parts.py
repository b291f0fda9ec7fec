"""What the readers of all formats share: parts as COCO dicts, and names as other machines write."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from vitdet.data.files import written
from vitdet.data.images import ImageError, read_header

T = TypeVar("T")
Json = dict[str, Any]

WHOLE = "all"  # the name of the only part of a data set that is not split
SPLITS = ("train", "val", "test")
_SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing|val)?)|(?P<test>test(?:ing|dev)?)|"
    r"(?P<val>val(?:id|idation|idate)?|dev|eval(?:uation)?))(?:set)?(?![a-z])"
)


@dataclass(frozen=True)
class Part:
    """One part of a data set, as a COCO dict."""

    split: str  # "train", "val" or "test"; WHOLE where the data are not split
    content: Json = field(repr=False)  # COCO's three lists
    images: Path  # the folder that file names are relative to
    source: Path  # the file or folder that it was read from, for people
    json_file: Path | None = None  # on the disk, with exactly this content
    problems: tuple[str, ...] = ()  # what a training stops at, and a check goes on with

    def real_files(self) -> set[str]:
        """Return the paths of the images, with the links to their folders followed."""
        names = (image.get("file_name") for image in self.content["images"])
        texts = (name for name in names if isinstance(name, str) and "\x00" not in name)
        return set(real_paths(self.images / name for name in texts))


@dataclass(frozen=True)
class Found:
    """A data set. Notes say what was found otherwise than it is written, and what was left out."""

    folder: Path
    format: str  # its name, for people
    parts: dict[str, Part]  # by split
    notes: tuple[str, ...] = ()


class Builder:
    """Puts a part together, image by image, from labels that are not in COCO's format."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = written(folder)
        categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
        self.content: Json = {"images": [], "annotations": [], "categories": categories}
        self.problems: list[str] = []

    def add_image(self, path: Path) -> tuple[int, int] | None:
        """Add an image; return its (height, width), None where the file cannot be read."""
        path = written(path)
        inside = path.is_relative_to(self.folder)
        name = path.relative_to(self.folder).as_posix() if inside else str(path)
        self.content["images"].append({"id": len(self.content["images"]) + 1, "file_name": name})
        try:
            return read_header(path).upright
        except ImageError as error:
            self.problems.append(str(error))
            return None

    def add_objects(self, size: tuple[int, int], objects: Iterable[Json]) -> None:
        """Give the last image its size and its objects."""
        image, annotations = self.content["images"][-1], self.content["annotations"]
        image["height"], image["width"] = size
        for each in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **each})

    def part(self, split: str, source: Path) -> Part:
        """Return the part."""
        return Part(split, self.content, self.folder, source, problems=tuple(self.problems))


# --- names of parts and of files ------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" where a file's or folder's name says so, else None."""
    found = _SPLIT.search(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return None if found is None else found.lastgroup


def split_of_path(path: Path, folder: Path) -> str | None:
    """Return the part that a file is for: by its own name, else by its folders' below `folder`."""
    names = (path.stem, *reversed(path.relative_to(folder).parts[:-1]))
    return next((split for name in names if (split := split_of(name))), None)


def only_wanted(parts: dict[str, T], splits: Iterable[str]) -> dict[str, T]:
    """Return the parts that are asked for, or all where there is none of these."""
    wanted = {split: value for split, value in parts.items() if split in (WHOLE, *splits)}
    return wanted or parts


def spellings(name: str) -> list[tuple[str, ...]]:
    """Return the parts of a path as they may be meant, the likeliest first.

    Backslashes, drive letters, `file://` and what Label Studio puts before the name are understood,
    and percent signs are decoded where the name as it stands is not there.
    """
    found = []
    for text in (name, unquote(name)):
        path = text.rpartition("?d=")[2].rpartition("://")[2].replace("\\", "/")
        parts = tuple(each for each in path.split("/") if each not in ("", ".", ".."))
        parts = parts[1:] if parts and parts[0].endswith(":") else parts
        if parts and parts not in found:
            found.append(parts)
    return found


def plain(name: str) -> str:
    """A name to compare by: one form of Unicode (NFC), no difference of case."""
    return unicodedata.normalize("NFC", name).casefold()


class Index:
    """Files by their base names; the longest common end of two paths tells which is meant."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths: dict[str, list[Path]] = defaultdict(list)
        for path in paths:
            self._paths[plain(path.name)].append(path)

    def find(self, name: str, split: str | None = None) -> list[Path]:
        """Return the files that a name may mean: none, one, or several that are as good."""
        for parts in spellings(name):
            if hits := self._paths.get(plain(parts[-1]), []):
                break
        else:
            return []

        def rank(path: Path) -> tuple[int, bool, bool]:
            common = in_common(reversed(path.parts), reversed(parts))
            return common, path.name == parts[-1], split in map(split_of, path.parts[:-1])

        return best(hits, rank)


def in_common(first: Iterable[str], second: Iterable[str]) -> int:
    """Return how many names at the begin of two paths are the same."""
    pairs = zip(map(plain, first), map(plain, second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def best(items: list[T], rank: Callable[[T], Any]) -> list[T]:
    """Return the items of the highest rank."""
    if len(items) <= 1:
        return items
    ranks = [rank(each) for each in items]
    highest = max(ranks)
    return [each for each, its in zip(items, ranks, strict=True) if its == highest]


def real_paths(paths: Iterable[Path]) -> list[str]:
    """Return paths with the links to their folders followed; each folder is looked at once."""
    real = cache(os.path.realpath)
    return [f"{real(folder)}/{base}" for folder, base in map(os.path.split, paths)]


def listed(items: Sequence[object], most: int = 8) -> str:
    """Return the first items of a list, for people."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def counted(count: int, what: str) -> str:
    """Return a number of things: "1 image", "2 images"."""
    return f"{count} {what}" + ("" if count == 1 else "es" if what.endswith("s") else "s")
