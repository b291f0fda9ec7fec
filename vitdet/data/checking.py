"""Checks a whole data set: labels, image files, and one part against another."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from vitdet.data.clean import Cleaned, clean
from vitdet.data.findings import KINDS, Finding, Json
from vitdet.data.formats import Found
from vitdet.data.images import ImageError, header_of, open_file, opened
from vitdet.data.labels import Boxes, ImageFile, file_name, where

_LONG = 32  # times as long as high, or higher
_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}


@dataclass(frozen=True)
class Checked:
    """A data set and what was found in it."""

    data: Found
    findings: list[tuple[str, Finding]]  # each with its part
    cleaned: dict[str, Cleaned] = field(repr=False)  # {part: the result of the pass}
    files: dict[str, dict[str, ImageFile]] = field(repr=False)  # {part: {file name: what it is}}

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
    cleaned: dict[str, Cleaned] = {}
    files: dict[str, dict[str, ImageFile]] = defaultdict(dict)
    total = sum(len(part.content["images"]) for part in data.parts.values())
    seen = 0
    for split, part in data.parts.items():
        for image in part.content["images"]:
            name = file_name(image)
            files[split][name] = files[split].get(name) or look_at(part.images / name)
            seen += 1
            if progress is not None:
                progress(seen, total)
        found = clean(part.content, part.images, part.source, boxes=boxes, files=files[split])
        cleaned[split] = found
        known = {each.got for each in found.findings}
        unreadable = (text for text in part.problems if text not in known)
        others = [
            Finding("unreadable labels", split, text, "left out", lost=1) for text in unreadable
        ]
        for each in (*found.findings, *others, *_of_images(found.content, files[split])):
            findings.append((split, each))
    findings += _across(cleaned, files)
    return Checked(data, findings, cleaned, files)


def look_at(path: Path) -> ImageFile:
    """Decode a file to its end and say what it is."""
    digest = ""
    try:
        with open_file(path, f"image {path}") as file:
            data = file.read()
        digest = hashlib.sha256(data).hexdigest()
        with opened(data, str(path), deep=True) as image:
            header = header_of(image)
            if header.format in ("JPEG", "MPO"):
                image.draft("L", (64, 64))  # every byte is read, and far fewer pixels are computed
            image.load()
        return ImageFile(header, digest=digest)
    except ImageError as error:
        return ImageFile(error=error, digest=digest)
    except OSError as error:  # the disk's
        text = f"image {path}: {error.strerror}."
        return ImageFile(error=ImageError(text, "unreadable file"))


def _of_images(content: Json, files: dict[str, ImageFile]) -> Iterator[Finding]:
    """Yield what is to be said of the images of a part."""
    with_objects = {each["image_id"] for each in content["annotations"]}
    names: dict[str, int] = {}
    digests: dict[str, str] = {}
    for image in content["images"]:
        number, name = image["id"], image["file_name"]
        place, file = where(number, name), files[name]
        if number not in with_objects:
            yield Finding("image without annotations", place, "none", image_id=number)
        if (other := names.setdefault(name, number)) != number:
            got, done = f"also image {other}", f"joined with image {other}"
            yield Finding("repeated file", place, got, done, number)
            continue
        for kind, got, done in _of_file(image, file):
            yield Finding(kind, place, got, done, number)
        if (twin := digests.setdefault(file.digest, name)) != name:
            got = f"the bytes of {twin}"
            yield Finding("same image twice", place, got, f"joined with {twin}", number)


def _of_file(image: Json, file: ImageFile) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, what is there, what a repair makes of it) of one file."""
    sides, header = (image["height"], image["width"]), file.header
    if max(sides) > _LONG * min(sides):
        yield "elongated image", f"{sides[0]} x {sides[1]} (height x width)", ""
    if header is None:
        return
    if Path(image["file_name"]).suffix.lower() not in header.suffixes:
        done = f"renamed to {' or '.join(header.suffixes[:2])}"
        yield "wrong extension", f"a {header.format} file", done
    if header.orientation != 1 and (sides == header.upright or sides != header.stored):
        yield "turned by EXIF", f"stored {header.stored[0]} x {header.stored[1]}", ""
    if header.deep:
        yield "more than 8 bits", f"Pillow's mode {header.mode}", "scaled to 8 bits"
    grey = dict.fromkeys(("L", "1"), "grey image")
    kinds = grey | {"CMYK": "CMYK image"} | dict.fromkeys(_ALPHA, "transparent image")
    if header.mode in kinds:
        yield kinds[header.mode], f"mode {header.mode}", ""


def _across(
    cleaned: dict[str, Cleaned], files: dict[str, dict[str, ImageFile]]
) -> Iterator[tuple[str, Finding]]:
    """Yield images that are in two parts, told at the one that training sees."""
    for first, second in combinations(cleaned, 2):
        objects = Counter(each["image_id"] for each in cleaned[first].content["annotations"])
        names = [each["file_name"] for each in cleaned[second].content["images"]]
        theirs = {files[second][name].digest: name for name in names}
        for image in cleaned[first].content["images"]:
            number, name = image["id"], image["file_name"]
            if other := theirs.get(files[first][name].digest):
                got, done = f"the bytes of {other} of {second}", f"leaves {first} with its objects"
                kind, lost = "image in two parts", objects[number]
                yield first, Finding(kind, where(number, name), got, done, number, lost=lost)
