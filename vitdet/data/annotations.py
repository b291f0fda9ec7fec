"""Reading and checking annotation files in COCO's format, and turning them into records."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from detectron2.structures import BoxMode

from vitdet.data.masks import all_finite, is_polygon, mask_fault
from vitdet.utils.checks import fail
from vitdet.utils.run_lengths import compressed

logger = logging.getLogger(__name__)
Style = Literal["coco", "lvis"]
Check = Literal["error", "drop", "keep"]

_TOLERANCE = 1.0  # pixels that a box may stick out by: rounding, and boxes that count from 1
_LARGEST = 1_000_000  # pixels of a side


@dataclass(frozen=True)
class Annotations:
    """Content of an annotation file: categories sorted by id, images sorted by id, annotations."""

    json_file: Path
    categories: list[dict[str, Any]]
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


class Fault(NamedTuple):
    """Something wrong with an image or an annotation: its kind, where, what was expected, got."""

    kind: str
    where: str
    expected: str
    got: str


def read_annotations(json_file: Path, check: Check) -> Annotations:
    """Read an annotation file and check its layout.

    Raises:
        InputError: no such file, not json, a missing part or key, a repeated category.
    """
    if check not in ("error", "drop", "keep"):
        fail(
            "check",
            expected='"error", "drop" or "keep"',
            got=repr(check),
            remedy="Choose one of the three.",
        )
    return check_layout(json_file, read_json(json_file), check)


def check_layout(
    json_file: Path, content: dict[str, Any], check: Check, *, one_name_each: bool = True
) -> Annotations:
    """Check that a content has the lists and keys of COCO's format.

    Args:
        json_file: where it comes from, for error messages.
        content: what a json file held.
        check: as in `read_annotations`.
        one_name_each: whether two categories of one name are an error (never with "keep").

    Raises:
        InputError: a missing part or key, a repeated category.
    """
    optional = {"annotations"} if check == "keep" else set()  # test sets have no annotations
    for part in ("images", "annotations", "categories"):
        if not isinstance(content.get(part, [] if part in optional else None), list):
            fail(
                f"annotation file {json_file}",
                expected=f'a list "{part}" (COCO format)',
                got=f"only the keys {', '.join(map(str, content)) or '(none)'}",
                remedy="Convert the annotations to COCO's format.",
            )
    found = Annotations(
        json_file,
        content["categories"],
        content["images"],
        content.get("annotations", []),
    )
    _check_keys(json_file, "category", found.categories, {"id": int, "name": str})
    sizes = {"id": int, "height": int, "width": int}
    _check_keys(json_file, "image", found.images, sizes)
    _check_sizes(found)
    # the other checks look into each annotation themselves
    keys = {"image_id": int, "category_id": int, "bbox": list} if check == "keep" else {}
    _check_keys(json_file, "annotation", found.annotations, keys)
    _check_categories(found, names=one_name_each and check != "keep")
    found.categories.sort(key=lambda category: category["id"])
    found.images.sort(key=lambda image: image["id"])
    return found


def make_records(
    content: Annotations, image_root: Path, style: Style, check: Check
) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """Turn annotations into detectron2 dataset dicts, ordered by image id.

    Returns:
        The records, and the places in `content.annotations` of what check="drop" left out.

    Raises:
        InputError: the first fault, with check="error"; unknown categories always.
    """
    missing: set[int] = set()
    dropped: frozenset[int] = frozenset()
    if check != "keep":
        missing, dropped = _look_for_faults(content, image_root, style, check)
    class_index = {category["id"]: index for index, category in enumerate(content.categories)}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for place, annotation in enumerate(content.annotations):
        if place not in dropped:
            converted = _convert(annotation, class_index, content.json_file)
            if converted is not None:
                by_image[annotation["image_id"]].append(converted)
    records = []
    for image in content.images:
        if image["id"] in missing:
            continue
        record = {
            "file_name": str(image_root / file_name(image, style, content.json_file)),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": by_image[image["id"]],
        }
        if style == "lvis":
            record["neg_category_ids"] = image.get("neg_category_ids", [])
            record["not_exhaustive_category_ids"] = image.get("not_exhaustive_category_ids", [])
        records.append(record)
    return records, dropped


def read_json(json_file: Path) -> dict[str, Any]:
    """Return the object that a json file holds.

    Raises:
        InputError: no such file, not json, no object.
    """
    try:
        with json_file.open(encoding="utf-8") as file:
            content = json.load(file)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        fail(
            f"annotation file {json_file}",
            expected="a file that can be read",
            got=error.strerror,
            remedy="Check the path.",
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        fail(
            f"annotation file {json_file}",
            expected="json",
            got=f"text that is not ({error})",
            remedy="Check that the file was written completely.",
        )
    if not isinstance(content, dict):
        fail(
            f"annotation file {json_file}",
            expected='an object with "images", "annotations" and "categories"',
            got=f"a {type(content).__name__}",
            remedy="A list is often a file of results; give the annotations.",
        )
    return content


def _check_keys(json_file: Path, what: str, entries: list[Any], keys: dict[str, type]) -> None:
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            fail(
                f"annotation file {json_file}, {what} number {place}",
                expected="an object",
                got=repr(entry),
                remedy="Convert the annotations to COCO's format.",
            )
        for key, kind in keys.items():
            value = entry.get(key)
            if not isinstance(value, kind) or isinstance(value, bool):
                fail(
                    f"annotation file {json_file}, {what} number {place}",
                    expected=f'the key "{key}" with a value of type {kind.__name__}',
                    got=repr(value) if key in entry else "no such key",
                    remedy="Convert the annotations to COCO's format.",
                )


def _check_sizes(content: Annotations) -> None:
    """Stop at sizes of no image: masks of such would take all memory."""
    for image in content.images:
        if max(image["height"], image["width"]) > _LARGEST:
            fail(
                f"annotation file {content.json_file}, image {image['id']}",
                expected=f"a height and width of at most {_LARGEST} pixels",
                got=f"{image['height']} x {image['width']}"[:80],
                remedy="Correct the file.",
            )


def _check_categories(content: Annotations, names: bool) -> None:
    for key in ("id", "name") if names else ("id",):
        counts = Counter(category[key] for category in content.categories)
        value, count = counts.most_common(1)[0] if counts else ("none at all", 0)
        if count != 1:
            fail(
                f"annotation file {content.json_file}",
                expected=f"categories with one {key} each",
                got=f"{count} times {value!r}" if count else "no category",
                remedy="Correct its categories.",
            )


def file_name(image: dict[str, Any], style: Style, json_file: Path) -> str:
    """File name relative to the image folder; LVIS has split folder and name in a URL only."""
    if style == "lvis" and "coco_url" in image:
        return "/".join(image["coco_url"].split("/")[-2:])
    name = image.get("file_name")
    if not isinstance(name, str):
        fail(
            f"annotation file {json_file}, image {image['id']}",
            expected='the key "file_name"',
            got=repr(name) if "file_name" in image else "no such key",
            remedy="Add it" + (' (or use style="lvis").' if "coco_url" in image else "."),
        )
    return name


def _convert(
    annotation: dict[str, Any], class_index: dict[int, int], json_file: Path
) -> dict[str, Any] | None:
    """Return the annotation as detectron2 wants it, None where its polygons have no area.

    As facebookresearch/detectron2 data/datasets/coco.py does: polygons with fewer than three
    points are left out, and an annotation that had only such.
    """
    if annotation.get("category_id") not in class_index:
        fail(
            f"annotation file {json_file}, annotation {annotation.get('id')}",
            expected="a category_id of its categories",
            got=repr(annotation.get("category_id")),
            remedy='Correct it, or leave such annotations out with check="drop".',
        )
    result: dict[str, Any] = {
        "category_id": class_index[annotation["category_id"]],
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "iscrowd": annotation.get("iscrowd", 0),
    }
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        segmentation = [part for part in segmentation if is_polygon(part)]
        if not segmentation:
            return None
    if segmentation:
        result["segmentation"] = compressed(segmentation)
    return result


def find_faults(
    content: Annotations, image_root: Path, style: Style = "coco"
) -> tuple[dict[int, Fault], dict[int, Fault]]:
    """Return the faults by image id, and those by place in the list of annotations.

    One fault an image or annotation. Image files are looked for, not opened.
    """
    names = {image["id"]: file_name(image, style, content.json_file) for image in content.images}
    return (
        dict(_image_faults(content, names, image_root)),
        dict(_annotation_faults(content, names)),
    )


def _look_for_faults(
    content: Annotations, image_root: Path, style: Style, check: Check
) -> tuple[set[int], frozenset[int]]:
    """Return ids of images to leave out and places of annotations to leave out, or stop."""
    image_faults, annotation_faults = find_faults(content, image_root, style)
    faults = [*image_faults.values(), *annotation_faults.values()]
    if faults:
        kinds = Counter(fault.kind for fault in faults)
        summary = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        first = faults[0]
        if check == "error":
            fail(
                f"annotation file {content.json_file} has {len(faults)} faults ({summary}); "
                f"the first: {first.where}",
                expected=first.expected,
                got=first.got,
                remedy="Correct the file (`vitdet data check` shows all of them and repairs a "
                'copy), or leave them out with check="drop".',
            )
        logger.warning(
            "%s: left out %d faulty entries (%s); the first: %s: expected %s, got %s",
            content.json_file,
            len(faults),
            summary,
            *first[1:],
        )
    missing = set(image_faults)
    orphans = {
        place
        for place, annotation in enumerate(content.annotations)
        if annotation.get("image_id") in missing
    }
    return missing, frozenset(orphans | set(annotation_faults))


def _image_faults(
    content: Annotations, names: dict[int, str], image_root: Path
) -> Iterator[tuple[int, Fault]]:
    """Yield (image id, fault). Folders are listed once instead of asking for every file."""
    files: dict[str, set[str]] = {}
    seen: set[int] = set()
    for image in content.images:
        number, name = image["id"], names[image["id"]]
        where = f"image {number} ({name})"
        folder, base = os.path.split(name)
        if folder not in files:
            path = image_root / folder
            files[folder] = {entry.name for entry in os.scandir(path)} if path.is_dir() else set()
        if number in seen:
            yield number, Fault("repeated image id", where, "an id of its own", str(number))
        elif min(image["height"], image["width"]) < 1:
            got = f"{image['height']} x {image['width']}"
            yield number, Fault("empty image", where, "a height and width of at least 1 pixel", got)
        elif base not in files[folder]:
            got = "no such file"
            yield number, Fault("missing image", where, f"the file {image_root / name}", got)
        seen.add(number)


def _annotation_faults(content: Annotations, names: dict[int, str]) -> Iterator[tuple[int, Fault]]:
    """Yield (place in the list, fault)."""
    images = {image["id"]: image for image in content.images}
    categories = {category["id"] for category in content.categories}
    # a file without any mask is a data set of boxes; a single empty mask among others is a fault
    with_masks = any(annotation.get("segmentation") for annotation in content.annotations)
    seen: set[int] = set()
    for place, annotation in enumerate(content.annotations):
        number, image_id = annotation.get("id"), annotation.get("image_id")
        where = f"annotation {number if number is not None else f'number {place}'}"
        image = images.get(image_id) if isinstance(image_id, int) else None
        if image is None:
            fault = ("unknown image id", "the id of an image in the file", repr(image_id))
        elif not isinstance(number, int) or number in seen:
            kind = "repeated" if isinstance(number, int) else "wrong"
            fault = (f"{kind} annotation id", "a whole number of its own as id", repr(number))
        else:
            where += f" of image {image_id} ({names[image['id']]})"
            fault = (
                _label_fault(annotation, categories)
                or _box_fault(annotation.get("bbox"), image)
                or (mask_fault(annotation.get("segmentation"), image) if with_masks else None)
            )
        if isinstance(number, int):
            seen.add(number)
        if fault is not None:
            yield place, Fault(fault[0], where, *fault[1:])


def _label_fault(annotation: dict[str, Any], categories: set[int]) -> tuple[str, str, str] | None:
    category = annotation.get("category_id")
    if not isinstance(category, int) or category not in categories:
        expected = f"a category_id among the file's {len(categories)} categories"
        return "unknown category id", expected, repr(category)
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "wrong iscrowd", "iscrowd 0 or 1", repr(annotation["iscrowd"])
    if annotation.get("ignore", 0):
        return "ignore flag", 'no "ignore" (mark crowd regions by iscrowd)', "ignore set"
    return None


def _box_fault(box: Any, image: dict[str, Any]) -> tuple[str, str, str] | None:
    if not isinstance(box, list) or len(box) != 4 or not all_finite(box):
        return "wrong box", "bbox as four numbers x, y, width, height in pixels", repr(box)
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "empty box", "a box with width and height above 0", repr(box)
    right, bottom = image["width"] + _TOLERANCE, image["height"] + _TOLERANCE
    if x < -_TOLERANCE or y < -_TOLERANCE or x + width > right or y + height > bottom:
        size = f"{image['width']} x {image['height']}"
        return "box outside", f"a box x, y, width, height inside the image of {size}", repr(box)
    return None
