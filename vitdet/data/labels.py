"""The annotations of a COCO content: read in every form, and mended or left out where wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, Protocol

from vitdet.data.findings import Json, Log
from vitdet.data.masks import Mask, number, read_box, read_mask, shown, whole, written
from vitdet.utils.run_lengths import mask_util

Boxes = Literal["ask", "xywh", "corners", "fractions"]
Size = tuple[int, int]  # (height, width)
Box = list[int | float]

_TOLERANCE = 1.0  # pixels that a box may stick out by: rounding, and boxes that count from 1
_TINY = 2.0  # pixels
_MANY = 100  # objects of an image
# In COCO's own files the box of a mask has an overlap of 0.69 or more with the box, or lies within
# a pixel of it; the area of the pixels differs from that of the polygon by 5 pixels or a fifth.
_OVERLAP, _GAP = 0.6, 2.0
_AREA_SHARE, _AREA_PIXELS = 0.3, 16.0
# Boxes look like corners when so many fit as such, and so many stick out by so much of a side.
_FIT, _STICK_OUT, _BY = 0.95, 0.1, 0.05


class Known(Protocol):
    """Ids that annotations may name."""

    def find(self, given: Any) -> int | None:
        """Return the whole number of an id, None for an unknown one."""
        ...


class KnownImages(Known, Protocol):
    """The images: see `vitdet.data.clean`."""

    kept: dict[int, tuple[Json, Size]]
    left_out: dict[int, int]


class KnownClasses(Known, Protocol):
    """The classes: `first` has the id under which classes of one name are joined."""

    first: dict[int, int]


class Labels:
    """One pass over annotations.

    Args:
        images: of the content, read before.
        classes: likewise.
        log: takes the findings.
        boxes: how boxes are written.
        closer: whether to mend what a training does not stop at.
    """

    def __init__(
        self, images: KnownImages, classes: KnownClasses, log: Log, *, boxes: Boxes, closer: bool
    ) -> None:
        self.images, self.classes, self.log = images, classes, log
        self.boxes, self.closer = boxes, closer
        self.counts: Counter[int] = Counter()  # objects of each image
        self.seen_ids: set[int] = set()
        self.seen: set[str] = set()
        self.fits: Counter[str] = Counter()  # how boxes lie in their images

    def read(self, given: list[Json], without_mask: Literal["keep", "drop"]) -> list[Json]:
        """Return the annotations that stay."""
        numbers = (whole(each.get("id")) for each in given)
        self.free = max((each for each in numbers if each is not None), default=0) + 1
        found = list(self._read(given))
        self.log.place = self.log.image_id = None
        objects = [each for each in found if not each.get("iscrowd")]
        bare = sum(not each.get("segmentation") for each in objects)
        if 0 < bare < len(objects):
            self.log.where, got = f"{bare} of {len(objects)} objects", "no segmentation"
            done = "left out" if without_mask == "drop" else ""
            self.log.say("object without mask", got, done, lost=bare if done else 0)
            if done:
                found = [each for each in found if each.get("segmentation") or each.get("iscrowd")]
        self._fit_of_boxes()
        for key, count in self.counts.items() if self.closer else ():
            if count > _MANY:
                self.log.image_id = key
                self.log.where = _where(key, self.images.kept[key][0])
                self.log.say("many objects", f"{count} objects")
        return found

    def _read(self, given: list[Json]) -> Iterator[Json]:
        log = self.log
        for place, entry in enumerate(given):
            number_ = entry.get("id")
            log.place, log.image_id = place, None
            log.where = f"annotation {f'number {place}' if number_ is None else shown(number_)}"
            key = self.images.find(entry.get("image_id"))
            if key in self.images.left_out:
                finding = log.found[at := self.images.left_out[key]]
                log.found[at] = finding._replace(lost=finding.lost + 1)
                continue
            if key is None or key not in self.images.kept:
                log.say("unknown image id", shown(entry.get("image_id")), "left out", lost=1)
                continue
            image, size = self.images.kept[key]
            log.image_id, log.where = key, f"{log.where} of {_where(key, image)}"
            read = self._label(log.put(entry, "image_id", key))
            read = read and self._shape(self._own_id(read), size)
            if read is not None:
                self.counts[key] += not read.get("iscrowd")
                yield read

    def _own_id(self, entry: Json) -> Json:
        given = whole(entry.get("id"))
        if given is not None and given not in self.seen_ids:
            self.seen_ids.add(given)
            return self.log.put(entry, "id", given)
        kind = "missing annotation id" if given is None else "repeated annotation id"
        self.log.say(kind, shown(entry.get("id")), "a new id")
        self.free += 1
        return {**entry, "id": self.free - 1}

    def _label(self, entry: Json) -> Json | None:
        """Return the entry with a class of the file, iscrowd and ignore read; None without."""
        category = self.classes.find(entry.get("category_id"))
        if category is None:
            got = shown(entry.get("category_id"))
            self.log.say("unknown category id", got, "left out", lost=1)
            return None
        entry = self.log.put(entry, "category_id", category)
        if self.classes.first[category] != category:
            entry = {**entry, "category_id": self.classes.first[category]}
        given = entry.get("iscrowd", 0)
        crowd = _flag(given)
        if crowd not in (0, 1):
            self.log.say("wrong iscrowd", shown(given), "a crowd region")
            entry = {**entry, "iscrowd": 1}
        elif type(given) is not int:
            got = f"iscrowd {shown(given)}"
            self.log.say("number in another form", got, f"read as {crowd}")
            entry = {**entry, "iscrowd": crowd}
        if _flag(entry.get("ignore")) != 0:
            self.log.say("ignore flag", f"ignore {shown(entry['ignore'])}", "a crowd region")
            entry = {key: value for key, value in entry.items() if key != "ignore"}
            entry["iscrowd"] = 1
        return entry

    def _shape(self, entry: Json, size: Size) -> Json | None:
        """Return the entry with box, mask and area read; None where it has no place."""
        given = entry.get("segmentation")
        mask = read_mask(given, size)
        if mask.problem:
            self.log.say(mask.problem, mask.got, "left out, the box stays", lost=1)
        plain = mask.value is given or given is None or given in ([], {}, "")
        if not mask.problem and not plain:
            done = "no mask" if mask.value is None else "read"
            self.log.say("mask in another form", shown(given), done)
        if not plain:
            entry = {key: value for key, value in entry.items() if key != "segmentation"}
            if mask.value is not None:
                entry["segmentation"] = mask.value
        box = self._box(entry, mask, size)
        if box is None:
            return None
        if box is not entry.get("bbox"):
            entry = _boxed(entry, box, mask)
        if self.closer and mask.encoded is not None:
            entry = self._closer(entry, mask, size)
        entry = self._area(entry, mask)
        return self._told(entry) if self.closer else entry

    def _box(self, entry: Json, mask: Mask, size: Size) -> Box | None:
        """Return x, y, width, height; from the mask where there is no other."""
        given = entry.get("bbox")
        box = read_box(given)
        if box is not None:
            read, box = box, self._measured(box, size)
            if read is not given:
                self.log.say("box in another form", shown(given), f"read as {shown(read)}")
        kind = _box_fault(box, size)
        if kind is None and box is not None:
            return self._clipped(box, size)
        of_mask = mask.encoded is not None
        if of_mask and (given is None or given == []):
            kind = "missing box"
        done = "taken from the mask" if of_mask else "left out"
        got = shown(given) + (f" in an image of {size[1]} x {size[0]}" if box else "")
        self.log.say(kind or "", got, done, lost=0 if of_mask else 1)
        return [float(value) for value in mask_util.toBbox(mask.encoded)] if of_mask else None

    def _measured(self, box: Box, size: Size) -> Box:
        """Return a box as x, y, width, height in pixels; count how boxes lie in images."""
        x, y, a, b = box
        height, width = size
        inside = x >= -_TOLERANCE and y >= -_TOLERANCE
        inside = inside and a <= width + _TOLERANCE and b <= height + _TOLERANCE
        far = x + a > width * (1 + _BY) + 1 or y + b > height * (1 + _BY) + 1
        self.fits["boxes"] += 1
        self.fits["corners"] += inside and x < a and y < b
        self.fits["far out"] += far
        self.fits["fractions"] += min(box) >= 0 and max(box) <= 1 and min(size) > 4
        if self.boxes in ("corners", "fractions"):
            self.log.changed = True
            corners = self.boxes == "corners"
            return (
                [x, y, a - x, b - y] if corners else [x * width, y * height, a * width, b * height]
            )
        return box

    def _clipped(self, box: Box, size: Size) -> Box:
        """Clip in a closer look; a training clips each time that it shows the image."""
        x, y, width, height = box
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, size[1]), min(y + height, size[0])
        out = max(left - x, top - y, x + width - right, y + height - bottom)
        if out <= _TOLERANCE:
            return box
        got = f"{shown(box)} in an image of {size[1]} x {size[0]}"
        self.log.say("box over the edge", got, "clipped", same=not self.closer)
        return [left, top, right - left, bottom - top] if self.closer else box

    def _area(self, entry: Json, mask: Mask) -> Json:
        """Compute an area that cannot be one, in a closer look also one that is far off."""
        if "area" not in entry:  # the evaluation computes it
            return entry
        given = entry["area"]
        read = number(given)
        right = read is not None and read > 0
        if read is not None and right and (self.closer or isinstance(given, str)):
            area = _area_of(entry, mask)
            off = abs(read - area) > max(_AREA_PIXELS, _AREA_SHARE * max(read, area))
            right = not off or bool(entry.get("iscrowd"))
        if right and isinstance(given, str):
            self.log.say("number in another form", f"area {shown(given)}", f"read as {read}")
            return {**entry, "area": read}
        if right:
            return entry
        of_what, area = "box" if mask.encoded is None else "mask", _area_of(entry, mask)
        self.log.say("wrong area", f"area {shown(given)}", f"{area:g}, that of the {of_what}")
        return {**entry, "area": area}

    def _closer(self, entry: Json, mask: Mask, size: Size) -> Json:
        """Mend what disagrees with a mask."""
        polygons = isinstance(mask.value, list)
        out = _farthest_outside(mask.value, size) if polygons else 0.0
        if out > _TOLERANCE:
            self.log.say("mask outside", f"points {out:.1f} pixels outside the image", "clipped")
        if polygons and entry.get("iscrowd"):
            self.log.say("crowd polygon", "polygons", "run lengths")
        if out > _TOLERANCE or (polygons and entry.get("iscrowd")):
            entry = {**entry, "segmentation": written(mask.encoded)}
        box, drawn = entry["bbox"], [float(value) for value in mask_util.toBbox(mask.encoded)]
        overlap = float(mask_util.iou([drawn], [box], [0])[0, 0])
        if overlap < _OVERLAP and _gap(drawn, box) > _GAP:
            got = f"{shown(box)}, that of the mask is {shown(drawn)} (IoU {overlap:.2f})"
            self.log.say("mask and box disagree", got, "box taken from the mask")
            entry = {**entry, "bbox": drawn}
        return entry

    def _told(self, entry: Json) -> Json | None:
        """Leave out what was there before, and note what is worth knowing."""
        keys = ("image_id", "category_id", "bbox", "segmentation", "iscrowd")
        same = json.dumps([entry.get(key) or 0 for key in keys])
        if same in self.seen:
            self.log.say("repeated annotation", "an equal one before", "the first stays")
            return None
        self.seen.add(same)
        if entry.get("iscrowd"):
            self.log.say("crowd region", "iscrowd 1")
        elif min(entry["bbox"][2:]) < _TINY:
            self.log.say("tiny object", f"a box of {entry['bbox'][2]:g} x {entry['bbox'][3]:g}")
        return entry

    def _fit_of_boxes(self) -> None:
        """Say when the boxes are likely not x, y, width, height in pixels."""
        fits, count = self.fits, self.fits["boxes"]
        if self.boxes != "ask" or not count:
            return
        self.log.where = f"{count} boxes"
        if fits["fractions"] == count:
            self.log.say("fraction boxes", "no value above 1")
        enough = count >= 4 or fits["far out"] == count
        if enough and fits["corners"] >= _FIT * count and fits["far out"] >= _STICK_OUT * count:
            got = (
                f"{fits['corners']} that fit as corners, and {fits['far out']} that stick far out "
            )
            self.log.say("corner boxes", got + "of their images as x, y, width, height")


def _where(key: int, image: Json) -> str:
    return f"image {key} ({str(image.get('file_name'))[:200]})"


def _flag(given: Any) -> int | None:
    """Return 0 or 1 for what stands for it, null and "" for 0; else a number or None."""
    if isinstance(given, str):
        given = {"true": 1, "false": 0, "": 0}.get(given.strip().lower(), given)
    if given is None or isinstance(given, bool):
        return int(bool(given))
    return whole(given)


def _box_fault(box: Box | None, size: Size) -> str | None:
    if box is None:
        return "wrong box"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "empty box"
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        return "box outside"
    return None


def _boxed(entry: Json, box: Box, mask: Mask) -> Json:
    """Return the entry with another box, and with its area where that was the former box's."""
    before, area = read_box(entry.get("bbox")), number(entry.get("area"))
    if mask.encoded is None and before and area and abs(before[2] * before[3] - area) < 1:
        return {**entry, "bbox": box, "area": box[2] * box[3]}
    return {**entry, "bbox": box}


def _area_of(entry: Json, mask: Mask) -> float:
    width, height = entry["bbox"][2:]
    return width * height if mask.encoded is None else float(mask_util.area(mask.encoded))


def _farthest_outside(polygons: list[list[float]], size: Size) -> float:
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return max(-min(xs), -min(ys), max(xs) - size[1], max(ys) - size[0])


def _gap(first: Box, second: Box) -> float:
    """Return the largest distance between equal sides of two boxes XYWH."""
    corners = ((x, y, x + width, y + height) for x, y, width, height in (first, second))
    return max(abs(a - b) for a, b in zip(*corners, strict=True))
