"""What can be wrong with, or worth knowing of, a data set, and how it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitdet.data.masks import shown, whole
from vitdet.utils.checks import InputError

Json = dict[str, Any]


class Kind(NamedTuple):
    """A kind of finding."""

    text: str  # what it is
    severity: Literal["fault", "note"] = "fault"
    stops: bool = False  # a training


class Finding(NamedTuple):
    """One finding."""

    kind: str  # a key of KINDS
    where: str  # image or annotation, for people
    got: str
    done: str = ""  # what the cleaned content has instead; "" where it has the same
    image_id: Any = None  # in the cleaned content
    place: int | None = None  # of the annotation in the list that was given
    lost: int = 0  # objects, or for masks masks, that are not in the cleaned content
    split: str = ""  # the part of the data set


KINDS: dict[str, Kind] = {
    # what is read all the same
    "number in another form": Kind("in quotes, 1.0 for 1, false for 0"),
    "id that is no number": Kind("images or classes are numbered by words"),
    "box in another form": Kind("not a list x, y, width, height"),
    "mask in another form": Kind("not [[x1, y1, x2, y2, ...], ...] or run lengths"),
    "missing box": Kind("an object with a mask alone"),
    "missing annotation id": Kind("no whole number as id"),
    "missing size": Kind("an image without height and width"),
    "box over the edge": Kind("sticks out of the image"),
    "wrong area": Kind("area is not that of the mask or box"),
    # labels that a training stops at
    "corner boxes": Kind("boxes that look like x1, y1, x2, y2", stops=True),
    "fraction boxes": Kind("boxes that look like fractions of the image's sides", stops=True),
    "unknown image id": Kind("of an image that is not in the file", stops=True),
    "unknown category id": Kind("of a class that is not in the file", stops=True),
    "repeated annotation id": Kind("two annotations of one id", stops=True),
    "wrong iscrowd": Kind("iscrowd other than 0 or 1", stops=True),
    "ignore flag": Kind('"ignore", which evaluation here does not know', stops=True),
    "wrong box": Kind("not four finite numbers", stops=True),
    "empty box": Kind("width or height of 0 or less", stops=True),
    "box outside": Kind("nothing of it is in the image", stops=True),
    "wrong mask": Kind("fewer than three points, or run lengths of another size", stops=True),
    "empty mask": Kind("a mask that covers no pixel", stops=True),
    "repeated category name": Kind("two classes of one name", stops=True),
    "repeated image id": Kind("two images of one id", stops=True),
    # labels that only a closer look finds
    "mask and box disagree": Kind("their rectangles differ"),
    "mask outside": Kind("points outside the image"),
    "repeated annotation": Kind("the same object twice"),
    "crowd polygon": Kind("a crowd region that is no run lengths"),
    "unreadable labels": Kind("a training stops at them"),
    # image files, by vitdet.data.images
    "missing image": Kind("no such file", stops=True),
    "not a file": Kind("a folder, pipe or device in the place of an image", stops=True),
    "unreadable file": Kind("the disk or its rights do not let it be read", stops=True),
    "unknown format": Kind("a file that is no image that is read", stops=True),
    "damaged image": Kind("cannot be decoded to its end", stops=True),
    "too many pixels": Kind("more than the limit of what is read", stops=True),
    "too many scans": Kind("a progressive JPEG that takes minutes to decode", stops=True),
    # image files
    "more than 8 bits": Kind("would be cut off at 255"),
    "wrong size": Kind("another size than the labels say"),
    "EXIF rotation": Kind("labelled as stored, but shown turned by EXIF"),
    "same image twice": Kind("two entries of one file, or files of the same bytes"),
    "image in two parts": Kind("seen in training and in evaluation"),
    # notes
    "object without mask": Kind("others have one: only boxes are trained", "note"),
    "image without annotations": Kind("a background image, or not labelled yet", "note"),
    "many objects": Kind("more than the 100 of an image that evaluation counts", "note"),
    "elongated image": Kind("scaled down, its shorter side nearly vanishes", "note"),
    "crowd region": Kind("no training object, not counted in evaluation", "note"),
    "tiny object": Kind("a side of less than 2 pixels", "note"),
    "turned by EXIF": Kind("read as it is shown, as labels should be", "note"),
}
_SAMPLE = 1000  # annotations that are looked at
_TASKS: dict[str, Callable[[Json], bool]] = {  # others than detection, by what all annotations have
    "captions": lambda each: "caption" in each,
    "panoptic segments": lambda each: "segments_info" in each,
    "oriented boxes (5 or 8 numbers)": lambda each: (
        isinstance(box := each.get("bbox"), list) and len(box) in (5, 8)
    ),
    "key points without boxes": lambda each: (
        "keypoints" in each and not each.get("bbox") and not each.get("segmentation")
    ),
    "predictions (each has a score; if they are labels, remove it)": lambda each: (
        type(each.get("score")) is float and each["score"] < 1
    ),
}
BOXES = {"corner boxes": "corners", "fraction boxes": "fractions"}  # kind: answer of --boxes


@dataclass
class Cleaned:
    """A pass and its result; where, image_id and place (as of `Finding`) are what it looks at."""

    content: Json  # what was given where nothing had to change, else a copy
    findings: list[Finding] = field(default_factory=list)
    changed: bool = False  # whether the content says something else than what was given
    where: str = ""
    image_id: Any = None
    place: int | None = None

    def say(
        self, kind: str, got: str, done: str = "", *, lost: int = 0, same: bool = False
    ) -> None:
        """Note a finding; `done` is a change of the content, unless it is the `same`."""
        self.changed |= bool(done) and not same
        self.findings.append(Finding(kind, self.where, got, done, self.image_id, self.place, lost))

    def put(self, entry: Json, key: str, value: int) -> None:
        """Set a number of an entry; say so where it was written otherwise."""
        given = entry.get(key)
        if type(given) is not int or given != value:
            kind = "id that is no number" if whole(given) is None else "number in another form"
            self.say(kind, f"{key} {shown(given)}", f"read as {value}")
            entry[key] = value


def by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Return the findings of each kind."""
    found: dict[str, list[Finding]] = {}
    for each in findings:
        found.setdefault(each.kind, []).append(each)
    return found


def notes_on(findings: Iterable[Finding]) -> list[str]:
    """Return a line for each kind of finding, with the first of it."""
    return [
        f"{len(found)} x {kind} ({KINDS[kind].text}), the first: {found[0].where}: {found[0].got}"
        + (f"; {found[0].done}" if found[0].done else "")
        for kind, found in by_kind(findings).items()
    ]


def stop_at_faults(source: Path, findings: Iterable[Finding]) -> None:
    """Raise an InputError where a training stops: how many faults of each kind, and the first."""
    faults = [each for each in findings if KINDS[each.kind].stops]
    if not faults:
        return
    first = min(faults, key=lambda each: each.kind not in BOXES)  # what explains all others
    counts = Counter(each.kind for each in faults).most_common()
    boxes = f" --boxes {BOXES[first.kind]}" if first.kind in BOXES else ""
    raise InputError(
        f"annotation file {source} has {len(faults)} faults "
        f"({', '.join(f'{count} x {kind}' for kind, count in counts)}); the first: {first.where}: "
        f"{first.kind} ({KINDS[first.kind].text}), got {first.got}. Correct the file, or train on "
        f"the copy that `vitdet data check FOLDER --fix NEW{boxes}` writes."
    )


def check_lists(content: Any, source: Path) -> None:
    """Raise an InputError where one of COCO's three lists is not there, or is of another task."""
    if not isinstance(content, dict):
        got = f"a {type(content).__name__}. Results of a detector are a list: give annotations."
        raise InputError(
            f"annotation file {source}: expected an object in COCO's format, got {got}"
        )
    labels = content.get("annotations")
    labels = labels[:: max(1, len(labels) // _SAMPLE)] if isinstance(labels, list) else []
    for task, is_of in _TASKS.items():
        if labels and all(isinstance(each, dict) and is_of(each) for each in labels):
            raise InputError(
                f"annotation file {source}: expected labels of objects, got {task}. Give those of "
                "the objects, each with its class and box."
            )
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            got = "the keys " + ", ".join(map(str, content)) if entries is None else shown(entries)
            raise InputError(
                f'annotation file {source}: expected a list "{key}" of objects (COCO format), got '
                f"{got or 'none'}. Convert the annotations to COCO's format."
            )
