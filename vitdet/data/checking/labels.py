"""Faults of labels: those that stop a training, and those that only a closer look finds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from vitdet.data.annotations import Annotations, Fault, find_faults
from vitdet.data.checking.kinds import Finding
from vitdet.data.formats import Part
from vitdet.utils.run_lengths import encode_segmentation, mask_util

# In COCO's own files the box of a mask has an overlap of 0.69 or more with the box, or lies within
# a pixel of it; the area of the pixels differs from that of the polygon by 5 pixels or a fifth.
_OVERLAP, _GAP = 0.6, 2.0
_AREA_SHARE, _AREA_PIXELS = 0.3, 16.0
_OUTSIDE = 1.0  # pixels that a polygon may stick out by, as a box may
_TINY = 2.0  # pixels


def label_findings(part: Part, content: Annotations) -> Iterator[Finding]:
    """Yield what is wrong with, or to be told of, the annotations of a part."""
    _, faults = find_faults(content, part.images)
    images = {image["id"]: image for image in content.images}
    seen: set[str] = set()
    for place, annotation in enumerate(content.annotations):
        fault = faults.get(place)
        image = images.get(_key(annotation.get("image_id")))
        number = annotation.get("image_id") if image else None
        if fault is not None:
            yield Finding(fault.kind, part.split, *fault[1:], number, place)
            continue
        assert image is not None  # else it had a fault
        where = f"annotation {annotation['id']} of image {image['id']} ({image['file_name']})"
        # an annotation may have one fault only: a repair looks again after each
        found = next(_closer(annotation, image, where), None)
        key = _identity(annotation)
        if found is None and key in seen:
            found = Fault("repeated annotation", where, "each object once", "an equal one before")
        seen.add(key)
        if found is not None:
            yield Finding(found.kind, part.split, *found[1:], number, place)
        for kind, got in _notes(annotation):
            yield Finding(kind, part.split, where, "", got, number, place)


def category_findings(parts: dict[str, Part]) -> Iterator[Finding]:
    """Yield class names that occur twice, and classes without any object in any part."""
    split, first = next(iter(parts.items()))
    categories = first.content["categories"]
    counts = Counter(each["name"] for each in categories)
    for name, count in counts.items():
        if count > 1:
            ids = ", ".join(str(each["id"]) for each in categories if each["name"] == name)
            got = f"the ids {ids}"
            yield Finding("repeated category name", split, f"class {name}", "one id", got)
    used = {
        _key(annotation.get("category_id"))
        for part in parts.values()
        for annotation in part.content["annotations"]
    }
    for each in categories:
        if each["id"] not in used:
            yield Finding("unused category", split, f"class {each['name']}", "", "no object")


def _key(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _identity(annotation: dict[str, Any]) -> str:
    """What two annotations of one object have in common."""
    keys = ("image_id", "category_id", "bbox", "segmentation", "iscrowd")
    return json.dumps([annotation.get(key) for key in keys], default=str)


def _closer(annotation: dict[str, Any], image: dict[str, Any], where: str) -> Iterator[Fault]:
    """Yield the faults of an annotation that does not stop a training."""
    size = (image["height"], image["width"])
    segmentation, box = annotation.get("segmentation"), annotation["bbox"]
    if not segmentation:
        yield from _area_fault(annotation, box[2] * box[3], "box", where)
        return
    crowd = annotation.get("iscrowd", 0)
    polygons = isinstance(segmentation, list)
    if polygons and crowd:
        yield Fault("crowd polygon", where, "run lengths (COCO's format)", "polygons")
    if polygons and (out := _farthest_outside(segmentation, size)) > _OUTSIDE:
        expected = f"points inside the image of {size[1]} x {size[0]}"
        yield Fault("mask outside", where, expected, f"one {out:.1f} pixels outside")
    encoded = encode_segmentation(segmentation, size)
    drawn = [float(value) for value in mask_util.toBbox(encoded)]
    overlap = float(mask_util.iou([drawn], [box], [0])[0, 0])
    if overlap < _OVERLAP and _gap(drawn, box) > _GAP:
        expected = f"a box near {[round(value, 1) for value in drawn]}, that of the mask"
        yield Fault("mask and box disagree", where, expected, f"{box} (IoU {overlap:.2f})")
    if not crowd:
        yield from _area_fault(annotation, float(mask_util.area(encoded)), "mask", where)


def _area_fault(
    annotation: dict[str, Any], area: float, of_what: str, where: str
) -> Iterator[Fault]:
    given = annotation.get("area")
    if given is None:  # the evaluation computes it
        return
    number = isinstance(given, int | float) and math.isfinite(given)
    if number and abs(given - area) <= max(_AREA_PIXELS, _AREA_SHARE * max(given, area)):
        return
    yield Fault("wrong area", where, f"an area near {area:.0f}, that of the {of_what}", repr(given))


def _farthest_outside(polygons: list[list[float]], size: tuple[int, int]) -> float:
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return max(-min(xs), -min(ys), max(xs) - size[1], max(ys) - size[0])


def _gap(first: list[float], second: list[float]) -> float:
    """Return the largest distance between equal sides of two boxes XYWH."""
    ends = zip(_corners(first), _corners(second), strict=True)
    return max(abs(a - b) for a, b in ends)


def _corners(box: list[float]) -> tuple[float, ...]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _notes(annotation: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if annotation.get("iscrowd", 0):
        yield "crowd region", "iscrowd 1"
    elif min(annotation["bbox"][2:]) < _TINY:
        yield "tiny object", f"a box of {annotation['bbox'][2]:g} x {annotation['bbox'][3]:g}"
