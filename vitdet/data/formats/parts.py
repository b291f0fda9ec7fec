"""What the readers of all formats share: a part of a data set, and how image files are found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from vitdet.utils.checks import InputError, fail

Json = dict[str, Any]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
WHOLE = "all"  # the name of the only part of a data set that is not split
SPLITS = ("train", "val", "test")
_SPLIT = re.compile(r"(?<![a-z])(train|valid|val|test)")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclass(frozen=True)
class Part:
    """One part of a data set, in the terms of COCO's format.

    Attributes:
        split: "train", "val" or "test"; "all" where the data are not split.
        content: {"images": [...], "annotations": [...], "categories": [...]}.
        images: the folder that file names are relative to.
        source: the file or folder that it was read from, for people.
        json_file: an annotation file on the disk that holds exactly `content`, or None.
    """

    split: str
    content: Json = field(repr=False)
    images: Path
    source: Path
    json_file: Path | None = None


@dataclass(frozen=True)
class Found:
    """A data set as it was found in a folder.

    Attributes:
        folder: where.
        format: its name, for people.
        parts: by their split.
    """

    folder: Path
    format: str
    parts: dict[str, Part]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the categories' ids."""
        categories = next(iter(self.parts.values())).content["categories"]
        return tuple(each["name"] for each in sorted(categories, key=lambda each: each["id"]))


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" where a file's or folder's name says so, else None."""
    found = _SPLIT.search(name.lower())
    return None if found is None else {"valid": "val"}.get(found[1], found[1])


def list_images(folder: Path) -> list[Path]:
    """Return the image files of a folder and the folders in it, in the order of their names."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def has_images(folder: Path) -> bool:
    """Whether image files lie directly in the folder."""
    return folder.is_dir() and any(
        path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir()
    )


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) in pixels, turned upright, from the file's header alone.

    Raises:
        InputError: no image, or a damaged header.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"image {path}: expected an image file, got {type(error).__name__} ({error}). "
            "Replace or remove it, with what labels it has."
        ) from error
    return (width, height) if turned else (height, width)


def images_by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Return {file name without suffix: path}.

    Raises:
        InputError: two images of one name, so that labels cannot tell which is meant.
    """
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(path.stem, path)
        if other != path:
            fail(
                f"images of {path.parent}",
                expected="names that differ by more than their suffix, as labels go by them",
                got=f"{other.name} and {path.name}",
                remedy="Rename one of them, with its labels.",
            )
    return found


def make_content(images: Sequence[Json], annotations: Sequence[Json], names: Sequence[str]) -> Json:
    """Put a content together: annotations and categories get ids from 1 on."""
    return {
        "images": list(images),
        "annotations": [{"id": i + 1, **each} for i, each in enumerate(annotations)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
    }


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        InputError: it cannot be read as text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: expected a text file, got {type(error).__name__} ({error}). Check the file."
        ) from error
