"""Checks a whole data set: labels, image files, and one part against another."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from vitdet.data.clean import Cleaned, ImageFile, clean, file_name
from vitdet.data.findings import KINDS, Finding, Json
from vitdet.data.formats import Found
from vitdet.data.images import ImageError, header_of, is_deep, open_file, opened, suffixes_of
from vitdet.data.labels import Boxes

_CHUNK = 1 << 22  # bytes
_LONG = 32  # times as long as high, or higher
_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}


@dataclass(frozen=True)
class Picture(ImageFile):
    """An image file, decoded to its end.

    Attributes:
        format: Pillow's name of it.
        mode: Pillow's name of its channels.
        orientation: EXIF's, 1 for upright.
        digest: of the file's bytes.
    """

    format: str = ""
    mode: str = ""
    orientation: int = 1
    digest: str = ""

    @property
    def deep(self) -> bool:
        """Whether it has more than 8 bits a channel."""
        return is_deep(self.mode)

    def has_suffix(self, name: str) -> bool:
        """Whether a file name has a suffix of the format."""
        return Path(name).suffix.lower() in suffixes_of(self.format)


@dataclass(frozen=True)
class Checked:
    """A data set and what was found in it.

    Attributes:
        data: as it was read.
        findings: (part, finding), in the order in which they were found.
        cleaned: {part: the result of the pass over its labels}.
        pictures: {part: {file name: what it is}}.
    """

    data: Found
    findings: list[tuple[str, Finding]]
    cleaned: dict[str, Cleaned] = field(repr=False)
    pictures: dict[str, dict[str, Picture]] = field(repr=False)

    @property
    def faults(self) -> list[tuple[str, Finding]]:
        """The findings that are faults."""
        return [each for each in self.findings if KINDS[each[1].kind].severity == "fault"]

    def by_kind(self) -> dict[str, list[tuple[str, Finding]]]:
        """Return the findings of each kind, faults first, then the most frequent."""
        found: dict[str, list[tuple[str, Finding]]] = defaultdict(list)
        for each in self.findings:
            found[each[1].kind].append(each)
        order = sorted(found, key=lambda kind: (KINDS[kind].severity != "fault", -len(found[kind])))
        return {kind: found[kind] for kind in order}


def check_data(
    data: Found, progress: Callable[[int, int], None] | None = None, *, boxes: Boxes = "ask"
) -> Checked:
    """Look at every label and every image file of a data set.

    Args:
        data: what `find_data` returned.
        progress: called with (files seen, files) from time to time.
        boxes: how boxes are written, see `vitdet.data.clean.clean`.

    Raises:
        InputError: labels that are not in COCO's layout at all.
    """
    findings: list[tuple[str, Finding]] = []
    cleaned, pictures = {}, {}
    total = sum(len(part.content["images"]) for part in data.parts.values())
    seen = 0
    for split, part in data.parts.items():
        files = pictures[split] = {}
        for image in part.content["images"]:
            name = file_name(image)
            if name not in files:
                files[name] = look_at(part.images / name)
            seen += 1
            if progress is not None:
                progress(seen, total)
        found = cleaned[split] = clean(
            part.content, part.images, part.source, boxes=boxes, files=files
        )
        findings += [(split, each) for each in found.findings]
        told = {each.got for each in found.findings}
        others = [each for each in part.problems if each not in told]
        findings += [
            (split, Finding("unreadable labels", split, each, "left out", lost=1))
            for each in others
        ]
        findings += [(split, each) for each in _of_images(found.content, files)]
    findings += _across(cleaned, pictures)
    return Checked(data, findings, cleaned, pictures)


def look_at(path: Path) -> Picture:
    """Decode a file to its end and say what it is."""
    name = f"image {path}"
    digest = hashlib.sha256()
    try:
        with open_file(path, name) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except ImageError as error:
        return Picture(error=error)
    except OSError as error:  # the disk's
        return Picture(error=ImageError(f"{name}: {error.strerror}.", "unreadable file"))
    try:
        with opened(path, deep=True) as image:
            header = header_of(image)
            if header.format in ("JPEG", "MPO"):
                image.draft("L", (64, 64))  # every byte is read, and far fewer pixels are computed
            image.load()
    except ImageError as error:
        return Picture(error=error, digest=digest.hexdigest())
    return Picture(
        stored=header.stored,
        upright=header.upright,
        format=header.format,
        mode=header.mode,
        orientation=header.orientation,
        digest=digest.hexdigest(),
    )


def _of_images(content: Json, files: dict[str, Picture]) -> Iterator[Finding]:
    """Yield what is to be said of the images of a part."""
    with_objects = {each["image_id"] for each in content["annotations"]}
    names: dict[str, Any] = {}
    digests: dict[str, str] = {}
    for image in content["images"]:
        number, name = image["id"], image["file_name"]
        where = f"image {number} ({name[:200]})"
        if number not in with_objects:
            yield Finding("image without annotations", where, "none", image_id=number)
        picture, other = files[name], names.setdefault(name, number)
        if other != number:
            got = f"also image {other}"
            yield Finding("repeated file", where, got, f"joined with image {other}", number)
            continue
        for kind, got, done in _of_picture(image, picture):
            yield Finding(kind, where, got, done, number)
        twin = digests.setdefault(picture.digest, name)
        if twin != name:
            joined = f"joined with {twin}"
            yield Finding("same image twice", where, f"the bytes of {twin}", joined, number)


def _of_picture(image: Json, picture: Picture) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, what is there, what a repair makes of it) of one file."""
    sides = (image["height"], image["width"])
    if max(sides) > _LONG * min(sides):
        yield "elongated image", f"{sides[0]} x {sides[1]} (height x width)", ""
    if picture.error is not None:
        return
    if not picture.has_suffix(image["file_name"]):
        right = " or ".join(suffixes_of(picture.format)[:2])
        yield "wrong extension", f"a {picture.format} file", f"renamed to {right}"
    if picture.orientation != 1 and (sides == picture.upright or sides != picture.stored):
        yield "turned by EXIF", f"stored {picture.stored[0]} x {picture.stored[1]}", ""
    if picture.deep:
        yield "more than 8 bits", f"Pillow's mode {picture.mode}", "scaled to 8 bits"
    elif picture.mode in ("L", "1"):
        yield "grey image", f"mode {picture.mode}", ""
    elif picture.mode == "CMYK":
        yield "CMYK image", "mode CMYK", ""
    elif picture.mode in _ALPHA:
        yield "transparent image", f"mode {picture.mode}", ""


def _across(
    cleaned: dict[str, Cleaned], pictures: dict[str, dict[str, Picture]]
) -> Iterator[tuple[str, Finding]]:
    """Yield images that are in two parts, told at the one that training sees."""
    objects = {
        split: Counter(each["image_id"] for each in found.content["annotations"])
        for split, found in cleaned.items()
    }
    for first, second in combinations(cleaned, 2):
        theirs = {
            pictures[second][each["file_name"]].digest: each["file_name"]
            for each in cleaned[second].content["images"]
        }
        for image in cleaned[first].content["images"]:
            number, name = image["id"], image["file_name"]
            other = theirs.get(pictures[first][name].digest)
            if other is not None:
                where = f"image {number} ({name[:200]})"
                got, lost = f"the bytes of {other} of {second}", objects[first][number]
                done = f"leaves {first} with its objects"
                yield first, Finding("image in two parts", where, got, done, number, lost=lost)
