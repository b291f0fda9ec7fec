"""One pass's reading of a COCO content: images, classes and annotations, mended where wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitdet.data.files import is_file
from vitdet.data.findings import Cleaned, Json
from vitdet.data.images import Header, ImageError, Size, read_header
from vitdet.data.masks import Mask, as_text, number, read_box, read_mask, shown, whole
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import mask_util

Style = Literal["coco", "lvis"]
Boxes = Literal["ask", "xywh", "corners", "fractions"]
Box = list[int | float]

_LARGEST = 1_000_000  # pixels of a side
_MOST_PIXELS = 2**32  # that run lengths can count
_TOLERANCE = 1.0  # pixels that a box may stick out by: rounding, and boxes that count from 1
_TINY = 2.0  # pixels
_MANY = 100  # objects of an image
# In COCO's own files the box of a mask has an overlap of 0.69 or more with the box, or lies within
# a pixel of it; the area of the pixels differs from that of the polygon by 5 pixels or a fifth.
_OVERLAP, _GAP = 0.6, 2.0
_AREA_SHARE, _AREA_PIXELS = 0.3, 16.0
# Boxes look like corners when so many fit as such, and so many stick out by so much of a side.
_FIT, _STICK_OUT, _BY = 0.95, 0.1, 0.05


@dataclass(frozen=True)
class ImageFile:
    """What the check knows of an image file: its header or its error, a digest of its bytes."""

    header: Header | None = None
    error: ImageError | None = None
    digest: str = ""


def file_name(image: Json, style: Style = "coco") -> str:
    """Return the name of an image's file, or raise an InputError; LVIS has it in a URL only."""
    if style == "lvis" and isinstance(image.get("coco_url"), str):
        return "/".join(image["coco_url"].split("/")[-2:])
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        got = shown(name) if "file_name" in image else "no such key"
        add = ' (or use style="lvis")' if "coco_url" in image else ""
        raise InputError(
            f'image {shown(image.get("id"))}: expected the key "file_name", got {got}. Add it{add}.'
        )
    return name


def where(key: int, name: Any) -> str:
    """Return an image, for people."""
    return f"image {key} ({str(name)[:200]})"


# --- classes and images ---------------------------------------------------------------------------


class Ids:
    """Whole numbers for the ids of entries: `numbers` has one for each."""

    def __init__(self, entries: list[Json]) -> None:
        keys = [key_of(each.get("id")) for each in entries]
        self._known: dict[Any, int] = {key: key for key in keys if isinstance(key, int)}
        free = count(max(self._known.values(), default=0) + 1)
        for key in keys:
            if key is not None and key not in self._known:
                self._known[key] = next(free)
        self.numbers = [next(free) if key is None else self._known[key] for key in keys]

    def find(self, given: Any) -> int | None:
        """Return the number that an annotation means by an id, None for an unknown one."""
        return self._known.get(key_of(given))


def key_of(given: Any) -> Any:
    """Return an id to compare by: 1, 1.0 and "1" are one; None where there is none."""
    found = whole(given)
    if found is not None:
        return found
    return None if given is None or isinstance(given, bool) else ("odd", shown(given))


class Classes(Ids):
    """The classes of a content: `kept` has one entry of each name, sorted by id.

    `first` is {id of a class: id of the first class of that name}.
    """

    def __init__(self, given: list[Json], log: Cleaned) -> None:
        super().__init__(given)
        self.first: dict[int, int] = {}
        names: dict[str, int] = {}
        classes: dict[int, Json] = {}
        for place, (each, key) in enumerate(zip(given, self.numbers, strict=True)):
            entry, name = dict(each), each.get("name")
            log.where = f"class {shown(name)}"
            if isinstance(name, int | float) and not isinstance(name, bool):
                log.say("number in another form", f"the name {shown(name)}", "read as text")
                entry["name"] = str(name)
            elif not isinstance(name, str) or entry.get("id") is None:
                wanted = "id" if isinstance(name, str) else "name"
                got = shown(entry[wanted]) if wanted in entry else "no such key"
                raise InputError(
                    f'category number {place}: expected the key "{wanted}", got {got}. Add it.'
                )
            if key in classes:
                raise InputError(f"categories: expected one id each, got 2 times {key}.")
            log.put(entry, "id", key)
            classes[key] = entry
            self.first[key] = names.setdefault(entry["name"], key)
            if self.first[key] != key:
                got = f"the ids {self.first[key]} and {key}"
                log.say("repeated category name", got, f"joined under {self.first[key]}")
        if not classes:
            raise InputError("categories: expected classes, got no category. Add them to the file.")
        self.kept = [classes[key] for key in sorted(classes) if self.first[key] == key]


class Images(Ids):
    """The images of a content: `kept` is {id: (image, its (height, width))}, sorted by id.

    `left_out` is {id: the place of its finding} of those whose file cannot be used.
    """

    def __init__(
        self,
        given: list[Json],
        folder: Path,
        style: Style,
        files: Mapping[str, ImageFile] | None,
        log: Cleaned,
    ) -> None:
        super().__init__(given)
        kept: dict[int, tuple[Json, Size]] = {}
        self.left_out: dict[int, int] = {}
        for entry, key in zip(given, self.numbers, strict=True):
            name = file_name(entry, style)
            log.image_id, log.where = key, where(key, name)
            if key in kept or key in self.left_out:
                log.say("repeated image id", shown(entry.get("id")), "the first stays")
                continue
            try:
                size = _size(entry, folder / name, None if files is None else files[name], log)
            except ImageError as error:
                self.left_out[key] = len(log.findings)
                log.say(error.kind, str(error).rstrip("."), "left out with its objects")
            else:
                read = {**entry, "height": size[0], "width": size[1]}
                log.put(read, "id", key)
                kept[key] = (read, size)
        self.kept = dict(sorted(kept.items()))


def _size(entry: Json, path: Path, file: ImageFile | None, log: Cleaned) -> Size:
    """Return the size that holds, of the file in a closer look, else of the labels.

    Raises:
        ImageError: the file cannot be used.
    """
    sides = (entry.get("height"), entry.get("width"))
    given, got = _given(sides), f"{shown(sides[0])} x {shown(sides[1])} (height x width)"
    if file is None:
        size = given if given and is_file(path) else read_header(path).upright
    elif file.header is not None:
        stored, upright = file.header.stored, file.header.upright
        size = stored if given == stored else upright
        if given == stored != upright:
            log.say("EXIF rotation", got, "stored without the rotation")
    elif file.error and file.error.kind == "too many pixels" and given is not None:
        log.say(file.error.kind, str(file.error).rstrip("."))  # sound: nothing is left out
        size = given
    else:
        assert file.error is not None
        raise file.error
    if given != size:
        kind = "wrong size" if given else "missing size"
        log.say(kind, got, f"{size[0]} x {size[1]}, taken from the file")
    elif any(type(side) is not int for side in sides):
        log.say("number in another form", got, "read as numbers")
    return size


def _given(sides: tuple[Any, Any]) -> Size | None:
    """Return the size that the labels say, None where it is none that is possible."""
    height, width = map(whole, sides)
    if height is None or width is None or min(height, width) < 1:
        return None
    possible = max(height, width) <= _LARGEST and height * width < _MOST_PIXELS
    return (height, width) if possible else None


# --- annotations ----------------------------------------------------------------------------------


class Labels:
    """One pass over annotations; with `closer` also what a training does not stop at is mended."""

    def __init__(
        self, images: Images, classes: Classes, log: Cleaned, *, boxes: Boxes, closer: bool
    ) -> None:
        self.images, self.classes, self.log = images, classes, log
        self.boxes, self.closer = boxes, closer
        self.counts: Counter[int] = Counter()  # objects of each image
        self.ids: set[int] = set()
        self.seen: set[str] = set()
        self.lie: list[tuple[Box, Size]] = []  # the boxes that were read, in images of these sizes

    def read(self, given: list[Json]) -> list[Json]:
        """Return the annotations that stay."""
        self.free = count(max((whole(each.get("id")) or 0 for each in given), default=0) + 1)
        found = list(self._read(given))
        self.log.place = self.log.image_id = None
        objects = [each for each in found if not each.get("iscrowd")]
        bare = sum(not each.get("segmentation") for each in objects)
        if 0 < bare < len(objects):
            self.log.where = f"{bare} of {len(objects)} objects"
            self.log.say("object without mask", "no segmentation")
        self._fit_of_boxes()
        for key, objects_of in self.counts.items() if self.closer else ():
            if objects_of > _MANY:
                self.log.image_id = key
                self.log.where = where(key, self.images.kept[key][0].get("file_name"))
                self.log.say("many objects", f"{objects_of} objects")
        return found

    def _read(self, given: list[Json]) -> Iterator[Json]:
        log, images = self.log, self.images
        for place, entry in enumerate(given):
            given_id = entry.get("id")
            log.place, log.image_id = place, None
            log.where = f"annotation {f'number {place}' if given_id is None else shown(given_id)}"
            key = images.find(entry.get("image_id"))
            if key in images.left_out:
                at = images.left_out[key]
                log.findings[at] = log.findings[at]._replace(lost=log.findings[at].lost + 1)
            elif key is None or key not in images.kept:
                log.say("unknown image id", shown(entry.get("image_id")), "left out", lost=1)
            else:
                image, size = images.kept[key]
                log.image_id = key
                log.where += f" of {where(key, image.get('file_name'))}"
                read = dict(entry)
                log.put(read, "image_id", key)
                if self._label(read) and self._shape(read, size):
                    self.counts[key] += not read.get("iscrowd")
                    yield read

    def _label(self, entry: Json) -> bool:
        """Read class, id, iscrowd and ignore; return whether the class is one of the file."""
        log, given = self.log, entry.get("category_id")
        category = self.classes.find(given)
        if category is None:
            log.say("unknown category id", shown(given), "left out", lost=1)
            return False
        log.put(entry, "category_id", category)
        entry["category_id"] = self.classes.first[category]
        given = entry.get("iscrowd", 0)
        crowd = _flag(given)
        if crowd not in (0, 1):
            log.say("wrong iscrowd", shown(given), "a crowd region")
            entry["iscrowd"] = 1
        elif type(given) is not int:
            log.say("number in another form", f"iscrowd {shown(given)}", f"read as {crowd}")
            entry["iscrowd"] = crowd
        if _flag(entry.get("ignore")) != 0:
            log.say("ignore flag", f"ignore {shown(entry.pop('ignore'))}", "a crowd region")
            entry["iscrowd"] = 1
        key = whole(entry.get("id"))
        if key is not None and key not in self.ids:
            log.put(entry, "id", key)
            self.ids.add(key)
        else:
            kind = "missing annotation id" if key is None else "repeated annotation id"
            log.say(kind, shown(entry.get("id")), "a new id")
            entry["id"] = next(self.free)
        return True

    def _shape(self, entry: Json, size: Size) -> bool:
        """Read mask, box and area; return whether the object has a place."""
        given = entry.get("segmentation")
        mask = read_mask(given, size)
        if mask.problem:
            self.log.say(mask.problem, mask.got, "left out, the box stays", lost=1)
        if mask.value is not given and given not in (None, [], {}, ""):
            if not mask.problem:
                done = "no mask" if mask.value is None else "read"
                self.log.say("mask in another form", shown(given), done)
            del entry["segmentation"]
            if mask.value is not None:
                entry["segmentation"] = mask.value
        box = self._box(entry, mask, size)
        if box is None:
            return False
        if box is not entry.get("bbox"):
            before, area = read_box(entry.get("bbox")), number(entry.get("area"))
            if mask.encoded is None and before and area and abs(before[2] * before[3] - area) < 1:
                entry["area"] = box[2] * box[3]  # as that of the former box was
            entry["bbox"] = box
        if self.closer and mask.encoded is not None:
            self._against_mask(entry, mask, size)
        self._area(entry, mask)
        return not self.closer or self._noted(entry)

    def _box(self, entry: Json, mask: Mask, size: Size) -> Box | None:
        """Return x, y, width, height; from the mask where there is no other."""
        given = entry.get("bbox")
        read = read_box(given)
        box = None if read is None else self._in_pixels(read, size)
        if read is not None and read is not given:
            self.log.say("box in another form", shown(given), f"read as {shown(read)}")
        kind = _box_fault(box, size)
        if box is not None and not kind:
            return self._clipped(box, size)
        if mask.encoded is not None and given in (None, []):
            kind = "missing box"
        done = "left out" if mask.encoded is None else "taken from the mask"
        got = shown(given) + (f" in an image of {size[1]} x {size[0]}" if box else "")
        self.log.say(kind, got, done, lost=int(mask.encoded is None))
        return None if mask.encoded is None else mask_util.toBbox(mask.encoded).tolist()

    def _in_pixels(self, box: Box, size: Size) -> Box:
        self.lie.append((box, size))
        self.log.changed |= self.boxes in ("corners", "fractions")
        x, y, a, b = box
        if self.boxes == "corners":
            return [x, y, a - x, b - y]
        fractions = self.boxes == "fractions"
        return [x * size[1], y * size[0], a * size[1], b * size[0]] if fractions else box

    def _clipped(self, box: Box, size: Size) -> Box:
        """Clip in a closer look; a training clips each time that it shows the image."""
        x, y, width, height = box
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, size[1]), min(y + height, size[0])
        if max(left - x, top - y, x + width - right, y + height - bottom) <= _TOLERANCE:
            return box
        got = f"{shown(box)} in an image of {size[1]} x {size[0]}"
        self.log.say("box over the edge", got, "clipped", same=not self.closer)
        return [left, top, right - left, bottom - top] if self.closer else box

    def _area(self, entry: Json, mask: Mask) -> None:
        """Compute an area that cannot be one, in a closer look also one that is far off."""
        if "area" not in entry:  # the evaluation computes it
            return
        given, (width, height) = entry["area"], entry["bbox"][2:]
        read, text = number(given) or 0, isinstance(given, str)
        if read > 0 and not self.closer and not text:
            return
        area = width * height if mask.encoded is None else float(mask_util.area(mask.encoded))
        off = abs(read - area) > max(_AREA_PIXELS, _AREA_SHARE * max(read, area))
        if read <= 0 or (off and not entry.get("iscrowd")):
            of_what = "box" if mask.encoded is None else "mask"
            self.log.say("wrong area", f"area {shown(given)}", f"{area:g}, that of the {of_what}")
            entry["area"] = area
        elif text:
            self.log.say("number in another form", f"area {shown(given)}", f"read as {read}")
            entry["area"] = read

    def _against_mask(self, entry: Json, mask: Mask, size: Size) -> None:
        """Mend what disagrees with a mask."""
        if isinstance(mask.value, list):
            points = np.concatenate(mask.value).reshape(-1, 2)
            out = max(-points.min(), (points - size[::-1]).max())
            if out > _TOLERANCE:
                got = f"points {out:.1f} pixels outside the image"
                self.log.say("mask outside", got, "clipped")
            if entry.get("iscrowd"):
                self.log.say("crowd polygon", "polygons", "run lengths")
            if out > _TOLERANCE or entry.get("iscrowd"):
                entry["segmentation"] = as_text(mask.encoded)
        box, drawn = entry["bbox"], mask_util.toBbox(mask.encoded).tolist()
        overlap = float(mask_util.iou([drawn], [box], [0])[0, 0])
        corners = ((x, y, x + width, y + height) for x, y, width, height in (drawn, box))
        gap = max(abs(a - b) for a, b in zip(*corners, strict=True))
        if overlap < _OVERLAP and gap > _GAP:
            got = f"{shown(box)}, that of the mask is {shown(drawn)} (IoU {overlap:.2f})"
            self.log.say("mask and box disagree", got, "box taken from the mask")
            entry["bbox"] = drawn

    def _noted(self, entry: Json) -> bool:
        """Note what is worth knowing; return whether there is no equal object before."""
        same = same_object(entry)
        if same in self.seen:
            self.log.say("repeated annotation", "an equal one before", "the first stays")
            return False
        self.seen.add(same)
        if entry.get("iscrowd"):
            self.log.say("crowd region", "iscrowd 1")
        elif min(entry["bbox"][2:]) < _TINY:
            self.log.say("tiny object", f"a box of {entry['bbox'][2]:g} x {entry['bbox'][3]:g}")
        return True

    def _fit_of_boxes(self) -> None:
        """Say when the boxes are likely not x, y, width, height in pixels."""
        total = len(self.lie)
        if self.boxes != "ask" or not total:
            return
        boxes, sizes = (np.array(each, dtype=float) for each in zip(*self.lie, strict=True))
        start, end, sides = boxes[:, :2], boxes[:, 2:], sizes[:, ::-1]
        inside = (start >= -_TOLERANCE) & (end <= sides + _TOLERANCE) & (start < end)
        far = (start + end > sides * (1 + _BY) + 1).any(axis=1).sum()
        fit = inside.all(axis=1).sum()
        self.log.where = f"{total} boxes"
        if boxes.min() >= 0 and boxes.max() <= 1 and sizes.min() > 4:
            self.log.say("fraction boxes", "no value above 1")
        if (total >= 4 or far == total) and fit >= _FIT * total and far >= _STICK_OUT * total:
            got = f"{fit} that fit as corners, and {far} that stick far out"
            self.log.say("corner boxes", f"{got} of their images as x, y, width, height")


def same_object(entry: Json) -> str:
    """Return what tells an object from others."""
    keys = ("image_id", "category_id", "bbox", "segmentation", "iscrowd")
    return json.dumps([entry.get(key) or 0 for key in keys])


def _flag(given: Any) -> int | None:
    """Return 0 or 1 for what stands for it, null and "" for 0; else a number or None."""
    if isinstance(given, str):
        given = {"true": 1, "false": 0, "": 0}.get(given.strip().lower(), given)
    return int(bool(given)) if given is None or isinstance(given, bool) else whole(given)


def _box_fault(box: Box | None, size: Size) -> str:
    if box is None:
        return "wrong box"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "empty box"
    outside = x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0
    return "box outside" if outside else ""
