"""Checks a whole data set: labels, image files, and one part against another."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from vitdet.data.annotations import Annotations, check_layout, file_name, find_faults
from vitdet.data.checking.kinds import KINDS, Finding
from vitdet.data.checking.labels import category_findings, label_findings
from vitdet.data.checking.pictures import Picture, look_at, similar
from vitdet.data.formats import Found, Part

Look = Callable[[Path], Picture]


@dataclass(frozen=True)
class Checked:
    """A data set and what was found in it.

    Attributes:
        data: as it was read.
        findings: in the order in which they were found.
        pictures: {split: {image id: what its file is}} of the files that are there.
    """

    data: Found
    findings: list[Finding]
    pictures: dict[str, dict[Any, Picture]] = field(repr=False)

    @property
    def faults(self) -> list[Finding]:
        """The findings that are faults."""
        return [each for each in self.findings if KINDS[each.kind].severity == "fault"]

    def counts(self) -> Counter[str]:
        """Return {kind: how many}."""
        return Counter(each.kind for each in self.findings)


def check_data(data: Found, progress: Callable[[int, int], None] | None = None) -> Checked:
    """Look at every label and every image file of a data set.

    Args:
        data: what `find_data` returned.
        progress: called with (files seen, files) from time to time.

    Raises:
        InputError: labels that are not in COCO's layout at all.
    """
    findings, pictures = [], {}
    total = sum(len(part.content["images"]) for part in data.parts.values())
    seen = 0
    for split, part in data.parts.items():
        content = layout(part)
        findings += label_findings(part, content)
        pictures[split] = {}
        for image in content.images:
            path = part.images / image["file_name"]
            if path.is_file():
                pictures[split][image["id"]] = look_at(path)
            seen += 1
            if progress is not None:
                progress(seen, total)
        findings += image_findings(part, content, pictures[split])
    findings += category_findings(data.parts)
    findings += _across(data, pictures)
    return Checked(data, findings, pictures)


def layout(part: Part) -> Annotations:
    """Return a part's content, its lists sorted by id except that of annotations.

    Raises:
        InputError: it has not the keys of COCO's format.
    """
    content = {key: list(part.content[key]) for key in ("images", "annotations", "categories")}
    found = check_layout(part.source, content, "error", one_name_each=False)
    for image in found.images:
        file_name(image, "coco", part.source)
    return found


def image_findings(
    part: Part, content: Annotations, pictures: dict[Any, Picture]
) -> Iterator[Finding]:
    """Yield what is to be said of the images of a part."""
    faults, _ = find_faults(content, part.images)
    for number, fault in faults.items():
        yield Finding(fault.kind, part.split, *fault[1:], number)
    named = (annotation.get("image_id") for annotation in content.annotations)
    with_objects = {number for number in named if isinstance(number, int)}
    files: dict[str, Any] = {}
    digests: dict[str, Any] = {}
    told: set[Any] = set()
    for image in content.images:
        number, name = image["id"], image["file_name"]
        if number in told:
            continue  # of a repeated id
        told.add(number)
        where = f"image {number} ({name})"
        if number not in with_objects:
            yield Finding("image without annotations", part.split, where, "", "none", number)
        other = files.setdefault(name, number)
        picture = pictures.get(number)
        if other != number:
            got = f"also image {other}"
            yield Finding("repeated file", part.split, where, "a file of its own", got, number)
        elif picture is not None:
            for kind, expected, got in _of_picture(image, picture):
                yield Finding(kind, part.split, where, expected, got, number)
            other = digests.setdefault(picture.digest, name)
            if other != name:
                got = f"the bytes of {other}"
                yield Finding("same image twice", part.split, where, "its own", got, number)


def _of_picture(image: dict[str, Any], picture: Picture) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, expected, got) of one file."""
    if picture.problem:
        yield picture.problem, "an image that can be decoded", picture.detail
        return
    given = (image["height"], image["width"])
    suffix = Path(image["file_name"]).suffix.lower()
    if picture.suffixes and suffix not in picture.suffixes:
        yield "wrong extension", f"{' or '.join(sorted(picture.suffixes))}", suffix or "none"
    if given != picture.upright and min(given) > 0:
        got = f"{given[0]} x {given[1]} in the labels"
        expected = f"{picture.upright[0]} x {picture.upright[1]} (height x width)"
        yield ("EXIF rotation" if given == picture.stored else "wrong size"), expected, got
    elif picture.turned:
        yield "turned by EXIF", "", f"stored {picture.stored[0]} x {picture.stored[1]}"
    if picture.deep:
        yield "more than 8 bits", "values up to 255", f"Pillow's mode {picture.mode}"
    elif picture.mode in ("L", "1"):
        yield "grey image", "", f"mode {picture.mode}"
    elif picture.mode == "CMYK":
        yield "CMYK image", "", "mode CMYK"
    elif picture.transparent:
        yield "transparent image", "", f"mode {picture.mode}"


def _across(data: Found, pictures: dict[str, dict[Any, Picture]]) -> Iterator[Finding]:
    """Yield images that are in two parts, told at the one that training sees."""
    for first, second in combinations(data.parts, 2):
        names = {
            split: {
                image["id"]: image["file_name"] for image in data.parts[split].content["images"]
            }
            for split in (first, second)
        }
        digests = {each.digest: number for number, each in pictures[second].items()}
        equal = set()
        for number, picture in pictures[first].items():
            if picture.digest in digests:
                equal.add(number)
                got = f"{names[second][digests[picture.digest]]} of {second} has the same bytes"
                where = f"image {number} ({names[first][number]})"
                expected = "an image of one part"
                yield Finding("image in two parts", first, where, expected, got, number)
        looks: list[dict[int, list[Any]]] = []
        for split in (first, second):
            by_look: dict[int, list[Any]] = defaultdict(list)
            for number, picture in pictures[split].items():
                if picture.look is not None and not (split == first and number in equal):
                    by_look[picture.look].append(number)
            looks.append(by_look)
        for ours, theirs in similar(looks[0], looks[1]):
            for number in looks[0][ours]:
                where = f"image {number} ({names[first][number]})"
                got = f"looks like {names[second][looks[1][theirs][0]]} of {second}"
                yield Finding("similar images in two parts", first, where, "", got, number)
