"""Annotation files in COCO's format, and the records that detectron2 takes."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, get_args

from detectron2.structures import BoxMode

from vitdet.data.clean import Cleaned, Style, clean, file_name
from vitdet.data.files import read_json
from vitdet.data.findings import notes_on, stop_at_faults
from vitdet.data.masks import is_polygon
from vitdet.utils.checks import InputError, fail
from vitdet.utils.run_lengths import compressed

logger = logging.getLogger(__name__)
Check = Literal["error", "drop", "keep"]
Json = dict[str, Any]


def read_annotations(json_file: Path, images: Path, style: Style, check: Check) -> Cleaned:
    """Read an annotation file: see `vitdet.data.datasets.coco_dataset`.

    Returns:
        Its content, images and categories sorted by id.

    Raises:
        InputError: no such file, not json, not COCO's format, with check="error" the first fault.
    """
    if check not in get_args(Check):
        raise InputError(f'check: expected "error", "drop" or "keep", got {check!r}.')
    content, _ = read_json(json_file)
    if not isinstance(content, dict):
        raise InputError(
            f'annotation file {json_file}: expected an object with "images", "annotations" and '
            f'"categories", got a {type(content).__name__}. A list is often a file of results; '
            "give the annotations."
        )
    if check == "keep":
        found = Cleaned({**content, "annotations": content.get("annotations", [])})
        _check_layout(json_file, found.content)
    else:
        without_mask = "drop" if check == "drop" else "keep"
        found = clean(content, images, json_file, style=style, without_mask=without_mask)
        if check == "error":
            stop_at_faults(json_file, found.findings)
        for line in notes_on(found.findings):
            logger.warning("%s: %s", json_file, line)
    for part in ("images", "categories"):
        found.content[part] = sorted(found.content[part], key=lambda each: each["id"])
    return found


def make_records(found: Cleaned, image_root: Path, style: Style, json_file: Path) -> list[Json]:
    """Turn annotations into detectron2 dataset dicts, ordered by image id.

    Where some objects have no mask, none has one in the records: only boxes can be trained.

    Raises:
        InputError: an unknown category, an image without a name.
    """
    content = found.content
    mixed = any(each.kind == "object without mask" and not each.done for each in found.findings)
    class_index = {category["id"]: index for index, category in enumerate(content["categories"])}
    by_image: dict[int, list[Json]] = defaultdict(list)
    for annotation in content["annotations"]:
        converted = _convert(annotation, class_index, json_file)
        if mixed and converted is not None:
            converted.pop("segmentation", None)
        if converted is not None:
            by_image[annotation["image_id"]].append(converted)
    records = []
    for image in content["images"]:
        record = {
            "file_name": str(image_root / file_name(image, style)),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": by_image[image["id"]],
        }
        if style == "lvis":
            record["neg_category_ids"] = image.get("neg_category_ids", [])
            record["not_exhaustive_category_ids"] = image.get("not_exhaustive_category_ids", [])
        records.append(record)
    return records


def _check_layout(json_file: Path, content: Json) -> None:
    """Check that the lists have the keys that detectron2 looks at."""
    keys = {
        "images": {"id": int, "height": int, "width": int},
        "annotations": {"image_id": int, "category_id": int, "bbox": list},
        "categories": {"id": int, "name": str},
    }
    for part, wanted in keys.items():
        if not isinstance(content.get(part), list):
            fail(
                f"annotation file {json_file}",
                expected=f'a list "{part}" (COCO format)',
                got=f"only the keys {', '.join(map(str, content)) or '(none)'}",
                remedy="Convert the annotations to COCO's format.",
            )
        _check_keys(json_file, part, content[part], wanted)


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
