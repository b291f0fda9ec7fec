"""The kinds of faults in a data set, and what is worth a note without being one.

A fault stops a training, spoils it, or makes its evaluation wrong. A note is fine for training here
and worth knowing. The names of the first group are those of `vitdet.data.annotations`, which stops
a training by the same rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

Severity = Literal["fault", "note"]


class Kind(NamedTuple):
    """A kind of finding: what it is, how bad, and what a repair makes of it ("" for a note)."""

    text: str
    severity: Severity
    repair: str = ""


class Finding(NamedTuple):
    """One finding.

    Attributes:
        kind: a key of KINDS.
        split: the part of the data set.
        where: image or annotation, for people.
        expected: what would have been right.
        got: what is there.
        image_id: of the image concerned, or None.
        place: of the annotation in the part's list, or None.
    """

    kind: str
    split: str
    where: str
    expected: str
    got: str
    image_id: Any = None
    place: int | None = None


_DROPPED = "left out"
_DROPPED_IMAGE = "left out with its objects"

KINDS: dict[str, Kind] = {
    # labels, by vitdet.data.annotations
    "unknown image id": Kind("of an image that is not in the file", "fault", _DROPPED),
    "unknown category id": Kind("of a class that is not in the file", "fault", _DROPPED),
    "wrong annotation id": Kind("no whole number as id", "fault", "a new id"),
    "repeated annotation id": Kind("two annotations of one id", "fault", "a new id"),
    "wrong iscrowd": Kind("iscrowd other than 0 or 1", "fault", "a crowd region"),
    "ignore flag": Kind('"ignore", which evaluation here does not know', "fault", "a crowd region"),
    "wrong box": Kind("not four finite numbers", "fault", "taken from the mask, else left out"),
    "empty box": Kind("width or height of 0 or less", "fault", "from the mask, else left out"),
    "box outside": Kind("sticks out of the image", "fault", "clipped, or left out"),
    "wrong mask": Kind(
        "fewer than three points, or run lengths of another size", "fault", "its good polygons"
    ),
    "empty mask": Kind("covers no pixel, while others have masks", "fault", _DROPPED),
    # labels
    "mask and box disagree": Kind("their rectangles differ", "fault", "box taken from the mask"),
    "wrong area": Kind("area is not that of the mask or box", "fault", "computed anew"),
    "mask outside": Kind("points outside the image", "fault", "clipped"),
    "repeated annotation": Kind("the same object twice", "fault", "the first stays"),
    "crowd polygon": Kind("a crowd region that is no run lengths", "fault", "encoded"),
    "repeated category name": Kind("two classes of one name", "fault", "joined"),
    # images, by vitdet.data.annotations
    "repeated image id": Kind("two images of one id", "fault", "the first stays"),
    "empty image": Kind("a size of 0 or less", "fault", "taken from the file"),
    "missing image": Kind("no such file", "fault", _DROPPED_IMAGE),
    # images
    "damaged image": Kind("cannot be decoded to its end", "fault", _DROPPED_IMAGE),
    "not an image": Kind("a file that is no image", "fault", _DROPPED_IMAGE),
    "wrong extension": Kind("the file's name says another format", "fault", "renamed"),
    "wrong size": Kind("another size than the labels say", "fault", "taken from the file"),
    "EXIF rotation": Kind(
        "labelled as stored, but shown turned by EXIF", "fault", "stored without the rotation"
    ),
    "more than 8 bits": Kind("would be cut off at 255", "fault", "scaled to 8 bits"),
    "repeated file": Kind("two entries of one file", "fault", "joined"),
    "same image twice": Kind("files of the same bytes", "fault", "the first stays"),
    "image in two parts": Kind("seen in training and in evaluation", "fault", "leaves training"),
    # notes
    "similar images in two parts": Kind("nearly the same picture", "note"),
    "image without annotations": Kind("a background image, or not labelled yet", "note"),
    "crowd region": Kind("no training object, not counted in evaluation", "note"),
    "tiny object": Kind("a side of less than 2 pixels", "note"),
    "unused category": Kind("a class without any object", "note"),
    "grey image": Kind("one channel; read as three equal ones", "note"),
    "CMYK image": Kind("made for print; read as RGB, colours may differ", "note"),
    "transparent image": Kind("an alpha channel, which is not looked at", "note"),
    "turned by EXIF": Kind("labelled as shown; read upright here", "note"),
}


class Example(NamedTuple):
    """What a picture of a finding needs: the file, and boxes XYWH in pixels to draw on it."""

    file: Path
    boxes: list[list[float]]
