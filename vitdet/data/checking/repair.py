"""Writes a repaired copy of a data set, in COCO's format; the original is only read.

Labels are repaired and looked at again, until nothing is found or an annotation has been repaired
so often that it is left out. An image file without a fault is the same file (a hard link, or a copy
where the disk has none), so the copy takes little room.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitdet.data.checking.kinds import KINDS, Finding
from vitdet.data.checking.labels import label_findings
from vitdet.data.checking.parts import Checked, layout
from vitdet.data.checking.pictures import Picture
from vitdet.data.formats import Part
from vitdet.data.masks import all_finite, is_polygon, mask_fault
from vitdet.utils.checks import fail
from vitdet.utils.run_lengths import encode_segmentation, mask_util

Json = dict[str, Any]
_ROUNDS = 6  # an annotation that still has a fault then is left out
_DROP_IMAGE = {
    *("missing image", "damaged image", "not an image"),
    *("same image twice", "image in two parts"),
}
_REWRITE = {"wrong extension", "EXIF rotation", "more than 8 bits"}  # changes of the file


@dataclass(frozen=True)
class Repair:
    """One thing that was done.

    Attributes:
        kind: of the fault.
        split: the part of the data set.
        where: image or annotation.
        done: what became of it.
    """

    kind: str
    split: str
    where: str
    done: str


def write_repaired(checked: Checked, output: Path) -> list[Repair]:
    """Write a repaired copy: annotations/instances_SPLIT.json and the images in SPLIT/.

    The folder appears when it is complete.

    Args:
        checked: a data set and its findings.
        output: a folder that is not there yet, or is empty, outside the data set.

    Returns:
        What was done, also written to repairs.json.

    Raises:
        InputError: a folder that cannot be used.
    """
    check_output(checked.data.folder, [part.images for part in checked.data.parts.values()], output)
    repairs: list[Repair] = []
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    (partial / "annotations").mkdir(parents=True)
    try:
        for split, part in checked.data.parts.items():
            findings = [each for each in checked.findings if each.split == split]
            content = _repaired(part, findings, checked.pictures[split], repairs)
            changed = {each.image_id for each in findings if each.kind in _REWRITE}
            for image in content["images"]:
                picture = checked.pictures[split][image["id"]]
                image["file_name"] = _store(
                    part.images, image, picture, partial / split, changed=image["id"] in changed
                )
            path = partial / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(content), encoding="utf-8")
        listed = json.dumps([vars(each) for each in repairs], indent=1)
        (partial / "repairs.json").write_text(listed + "\n", encoding="utf-8")
        if output.is_dir():
            output.rmdir()  # it is empty
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return repairs


def check_output(folder: Path, images: Iterable[Path], output: Path) -> None:
    """Stop where writing to `output` could touch the data.

    Raises:
        InputError: it holds something, or lies in the data, or the data lie in it.
    """
    target = output.resolve()
    for place in (folder.resolve(), *(each.resolve() for each in images)):
        if target == place or place in target.parents or target in place.parents:
            fail(
                f"--fix {output}",
                expected="a folder apart from the data",
                got=f"one that {'is' if target == place else 'shares files with'} {place}",
                remedy="The original is never changed: choose a folder outside of it.",
            )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        remedy = "Choose another one, or remove it."
        fail(f"--fix {output}", expected="a new folder", got="one with content", remedy=remedy)
    output.parent.mkdir(parents=True, exist_ok=True)


# --- content --------------------------------------------------------------------------------------


def _repaired(
    part: Part, findings: list[Finding], pictures: dict[Any, Picture], repairs: list[Repair]
) -> Json:
    """Return the part's content without faults; add what was done to `repairs`."""
    content = copy.deepcopy({key: part.content[key] for key in part.content})
    for each in findings:
        if each.place is None and KINDS[each.kind].severity == "fault":
            repairs.append(Repair(each.kind, part.split, each.where, KINDS[each.kind].repair))
    _join_categories(content)
    _repair_images(content, findings, pictures)
    for turn in range(_ROUNDS):
        found = list(label_findings(*_as_part(part, content)))
        faults = [each for each in found if KINDS[each.kind].severity == "fault"]
        if not faults:
            break
        _repair_labels(content, faults, repairs, last=turn == _ROUNDS - 1)
    return content


def _as_part(part: Part, content: Json) -> tuple[Part, Any]:
    changed = replace(part, content=content)
    return changed, layout(changed)


def _join_categories(content: Json) -> None:
    """Give all classes of one name the id of the first."""
    first: dict[str, int] = {}
    ids = {each["id"]: first.setdefault(each["name"], each["id"]) for each in content["categories"]}
    content["categories"] = [
        each for each in content["categories"] if ids[each["id"]] == each["id"]
    ]
    for annotation in content["annotations"]:
        category = annotation.get("category_id")
        if isinstance(category, int):
            annotation["category_id"] = ids.get(category, category)


def _repair_images(content: Json, findings: list[Finding], pictures: dict[Any, Picture]) -> None:
    """Leave images out, join entries of one file, take sizes from the files."""
    dropped = {each.image_id for each in findings if each.kind in _DROP_IMAGE}
    dropped |= {image["id"] for image in content["images"]} - set(pictures)  # no file
    stored = {each.image_id for each in findings if each.kind == "EXIF rotation"}
    first: dict[str, Any] = {}
    images: dict[Any, Json] = {}
    joined: dict[Any, Any] = {}
    for image in sorted(content["images"], key=lambda each: each["id"]):
        number = image["id"]
        if number in dropped or number in images or number in joined:
            continue
        joined[number] = first.setdefault(image["file_name"], number)
        if joined[number] == number:
            picture = pictures[number]
            size = picture.stored if number in stored else picture.upright
            images[number] = {**image, "height": size[0], "width": size[1]}
    content["images"] = list(images.values())
    kept = []
    for annotation in content["annotations"]:
        number = annotation.get("image_id")
        if isinstance(number, int) and number in dropped:
            continue
        annotation["image_id"] = joined.get(number, number) if isinstance(number, int) else number
        kept.append(annotation)
    content["annotations"] = kept


def _repair_labels(
    content: Json, faults: list[Finding], repairs: list[Repair], *, last: bool
) -> None:
    """Repair each faulty annotation once, or leave it out."""
    images = {image["id"]: image for image in content["images"]}
    annotations: list[Any] = content["annotations"]
    numbers = (each.get("id") for each in annotations)
    free = max((each for each in numbers if isinstance(each, int)), default=0) + 1
    for each in faults:
        assert each.place is not None  # it is a label's
        annotation, done = annotations[each.place], KINDS[each.kind].repair
        if each.kind in ("wrong annotation id", "repeated annotation id"):
            annotation["id"], free = free, free + 1
        else:
            mend = None if last else _MENDERS.get(each.kind)
            mended = mend(annotation, images[each.image_id]) if mend else None
            annotations[each.place] = mended
            if mended is None:
                done = "left out"
        repairs.append(Repair(each.kind, each.split, each.where, done))
    content["annotations"] = [each for each in annotations if each is not None]


def _size(image: Json) -> tuple[int, int]:
    return image["height"], image["width"]


def _box_of_mask(annotation: Json, image: Json) -> Json | None:
    """Take the box from the mask; None without a mask to take it from."""
    segmentation = annotation.get("segmentation")
    if not segmentation or mask_fault(segmentation, image) is not None:
        return None
    box = mask_util.toBbox(encode_segmentation(segmentation, _size(image)))
    return {**annotation, "bbox": [float(value) for value in box]} if min(box[2:]) > 0 else None


def _clipped_box(annotation: Json, image: Json) -> Json | None:
    x, y, width, height = annotation["bbox"]
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
    if right <= left or bottom <= top:
        return None
    box = [left, top, right - left, bottom - top]
    changed = {**annotation, "bbox": box}
    if not annotation.get("segmentation"):
        changed["area"] = box[2] * box[3]
    return changed


def _good_polygons(annotation: Json, image: Json) -> Json | None:
    segmentation = annotation.get("segmentation")
    parts = segmentation if isinstance(segmentation, list) else []
    good = [part for part in parts if is_polygon(part) and all_finite(part)]
    changed = {**annotation, "segmentation": good}
    return changed if good and mask_fault(good, image) is None else None


def _encoded(annotation: Json, image: Json) -> Json:
    """Write the mask as run lengths, which hold what lies in the image."""
    encoded = encode_segmentation(annotation["segmentation"], _size(image))
    lengths = {"size": list(_size(image)), "counts": encoded["counts"].decode("ascii")}
    return {**annotation, "segmentation": lengths}


def _right_area(annotation: Json, image: Json) -> Json:
    if annotation.get("segmentation"):
        area = float(mask_util.area(encode_segmentation(annotation["segmentation"], _size(image))))
    else:
        area = annotation["bbox"][2] * annotation["bbox"][3]
    return {**annotation, "area": area}


def _crowd(annotation: Json, _: Json) -> Json:
    return {**{key: value for key, value in annotation.items() if key != "ignore"}, "iscrowd": 1}


# What is not here is left out.
_MENDERS: dict[str, Callable[[Json, Json], Json | None]] = {
    "wrong iscrowd": _crowd,
    "ignore flag": _crowd,
    "wrong box": _box_of_mask,
    "empty box": _box_of_mask,
    "box outside": _clipped_box,
    "wrong mask": _good_polygons,
    "mask and box disagree": _box_of_mask,
    "wrong area": _right_area,
    "mask outside": _encoded,
    "crowd polygon": _encoded,
}


# --- image files ----------------------------------------------------------------------------------


def _store(root: Path, image: Json, picture: Picture, folder: Path, *, changed: bool) -> str:
    """Put an image file into the copy; return its name there, relative to `folder`."""
    name = Path(image["file_name"])
    if name.is_absolute() or ".." in name.parts:
        name = Path(f"{image['id']}_{name.name}")
    source = root / image["file_name"]
    rotated = picture.turned and _size(image) == picture.stored != picture.upright
    if picture.suffixes and name.suffix.lower() not in picture.suffixes:
        usual = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}
        name = name.with_name(
            f"{name.stem}_{image['id']}{usual.get(picture.format, min(picture.suffixes))}"
        )
    if changed and picture.deep:
        name = name.with_name(f"{name.stem}_{image['id']}.png")
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if changed and picture.deep:
        _as_8_bits(source).save(target)
    elif changed and rotated:
        target.write_bytes(_without_rotation(source))
    else:
        _link(source, target)
    return name.as_posix()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def _without_rotation(path: Path) -> bytes:
    """Return the file with the pixels as they are stored, and nothing that asks to turn them."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        # with the file's own quantisation, so that nearly nothing is lost
        options = {"JPEG": {"quality": "keep"}, "MPO": {"quality": 95}}.get(image.format or "", {})
        kind = "JPEG" if image.format == "MPO" else image.format
        image.info.pop("exif", None)
        image.save(buffer, format=kind, exif=b"", **options)
    return buffer.getvalue()


def _as_8_bits(path: Path) -> Image.Image:
    """Scale grey values so that the image's own range fills 0 to 255."""
    with Image.open(path) as image:
        values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255 / (high - low) if high > low else 0)
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))
