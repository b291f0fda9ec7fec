"""Pascal VOC: one xml an image, boxes in pixels that count from 1 and include the last one.

So <xmin>1</xmin><xmax>10</xmax> are ten pixels, x = 0 and width 10. Some tools count from 0: where
any box of a data set begins at 0, none is moved, and the width is xmax - xmin.

An object that is `difficult` is neither trained on nor counted in evaluation, as in VOC's own; in
COCO's terms it is a crowd region. Masks are taken from SegmentationObject/ (pixel value i belongs
to the i-th object, 255 to none) where every image with objects has one there, or from a <polygon>.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitdet.data.formats.parts import (
    WHOLE,
    Found,
    Json,
    Part,
    image_size,
    images_by_stem,
    list_images,
    make_content,
    read_lines,
    split_of,
)
from vitdet.data.formats.xml_nodes import Node, read_xml
from vitdet.utils.checks import InputError, fail
from vitdet.utils.run_lengths import encode

logger = logging.getLogger(__name__)

NAME = "Pascal VOC xml"
LOOKED_FOR = "xml files (Annotations/*.xml with JPEGImages/, or beside the images) (Pascal VOC)"
_XML_FOLDERS = ("Annotations", "annotations")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def find(folder: Path) -> list[Path]:
    """Return the folders of xml files: one, or one a part, [] where there is none."""
    years = (folder, *sorted(folder.glob("VOC*")), *sorted(folder.glob("VOCdevkit/VOC*")))
    places = [base / name for base in years for name in _XML_FOLDERS if _has_xml(base / name)]
    if len({place.parent for place in places}) > 1:
        fail(
            f"data folder {folder}",
            expected="xml files of one data set",
            got=" and ".join(str(place.relative_to(folder)) for place in places),
            remedy="Name the folder of one of them.",
        )
    if places:
        return places[:1]
    if _has_xml(folder):
        return [folder]
    children = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    return [child for child in children if split_of(child.name) and _has_xml(child)]


def _has_xml(folder: Path) -> bool:
    return folder.is_dir() and next(folder.glob("*.xml"), None) is not None


def read(folder: Path, files: list[Path], images: Path | None = None) -> Found:
    """Read the parts of a data set.

    Raises:
        InputError: xml that is broken or incomplete, with file and line; images that are missing.
    """
    documents: dict[str, list[Node]] = {}
    for place in files:
        split = split_of(place.name) if place != folder else None
        for each, paths in _lists(place, split or WHOLE).items():
            documents.setdefault(each, []).extend(read_xml(path) for path in paths)
    everything = [document for part in documents.values() for document in part]
    names = sorted({_label(item) for document in everything for item in document.all("object")})
    if not names:
        got = f"none in {len(everything)} xml files"
        fail(f"data folder {folder}", expected="objects", got=got, remedy="Check the xml files.")
    first = 0 if _counts_from_0(everything) else 1
    if first == 0:
        logger.warning("%s: a box begins at 0, so boxes are read as counted from 0", folder)
    stems = images_by_stem(list_images(images or _image_folder(files[0])))
    if len(files) > 1:
        stems = images_by_stem(path for place in files for path in list_images(place))
    masks = _mask_folder(files[0], everything)
    parts = {}
    for split, part in documents.items():
        content = _content(folder, part, names, stems, first, masks)
        parts[split] = Part(split, content, folder, files[0])
    return Found(folder, NAME, parts)


def _lists(place: Path, split: str) -> dict[str, list[Path]]:
    """Return the xml files of each part: as ImageSets/Main says, else those of the folder."""
    lists = place.parent / "ImageSets" / "Main"
    by_split = {}
    for name in ("train", "val", "test"):
        path = lists / f"{name}.txt"
        if path.is_file():
            by_split[name] = list(_listed(path, place))
    whole = lists / "trainval.txt"
    if "train" not in by_split and whole.is_file():
        by_split = {**by_split, ("train" if by_split else WHOLE): list(_listed(whole, place))}
    return by_split or {split: sorted(place.glob("*.xml"))}


def _listed(path: Path, place: Path) -> Iterator[Path]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            found = place / f"{line.split()[0]}.xml"
            if not found.is_file():
                remedy = "Correct the list, or add the file."
                fail(f"{path}, line {number}", expected=str(found), got="no such file",
                     remedy=remedy)  # fmt: skip
            yield found


def _image_folder(place: Path) -> Path:
    candidates = [place.parent / name for name in _IMAGE_FOLDERS]
    return next((each for each in candidates if each.is_dir()), place)


def _label(item: Node) -> str:
    name = item.word("name")
    if name is None:
        fail(item.where, expected="<name> in <object>", got="none", remedy="Add the class.")
    return name


def _counts_from_0(documents: list[Node]) -> bool:
    boxes = (item.find("bndbox") for each in documents for item in each.all("object"))
    return any(box.number("xmin") < 1 or box.number("ymin") < 1 for box in boxes if box is not None)


def _mask_folder(place: Path, documents: list[Node]) -> Path | None:
    """Return the folder of masks, if it has one for every image with objects."""
    folder = place.parent / "SegmentationObject"
    with_objects = [each.path.stem for each in documents if next(each.all("object"), None)]
    found = sum((folder / f"{stem}.png").is_file() for stem in with_objects)
    if found == len(with_objects):
        return folder
    if found:
        logger.warning(
            "%s has masks of %d of %d images with objects: masks are not used",
            folder, found, len(with_objects),
        )  # fmt: skip
    return None


def _content(
    folder: Path,
    documents: list[Node],
    names: list[str],
    stems: dict[str, Path],
    first: int,
    masks: Path | None,
) -> Json:
    images: list[Json] = []
    annotations: list[Json] = []
    for document in documents:
        path = _image_of(document, stems)
        size = _size(document, path)
        number = len(images) + 1
        name = path.resolve().relative_to(folder.resolve()).as_posix()
        images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        items = list(document.all("object"))
        found = [_annotation(item, names, first) for item in items]
        if masks is not None and items:
            for each, mask in zip(found, _masks(document, masks, size, len(items)), strict=True):
                each["segmentation"] = mask
        annotations += [{"image_id": number, **each} for each in found]
    return make_content(images, annotations, names)


def _image_of(document: Node, stems: dict[str, Path]) -> Path:
    """Return the image that an xml file describes: of its own name, else as <filename> says."""
    given = document.word("filename") or document.path.stem
    path = stems.get(document.path.stem) or stems.get(Path(given).stem)
    if path is None:
        fail(
            str(document.path),
            expected=f"an image {document.path.stem}.* (or {given}, as <filename> says)",
            got="none in the data folder",
            remedy="Add the image, or remove the xml file.",
        )
    return path


def _size(document: Node, path: Path) -> tuple[int, int]:
    """Return (height, width): as the file says, from the image's header where it does not."""
    node = document.find("size")
    if node is None:
        return image_size(path)
    height, width = int(node.number("height")), int(node.number("width"))
    return (height, width) if height > 0 and width > 0 else image_size(path)


def _annotation(item: Node, names: list[str], first: int) -> Json:
    box = item.find("bndbox")
    if box is None:
        fail(item.where, expected="<bndbox> in <object>", got="none", remedy="Add the box.")
    left, top, right, bottom = (box.number(side) for side in _SIDES)
    x, y, width, height = left - first, top - first, right - left + first, bottom - top + first
    found: Json = {
        "category_id": names.index(_label(item)) + 1,
        "bbox": [x, y, width, height],
        "area": width * height,
        "iscrowd": int(item.find("difficult") is not None and item.number("difficult") != 0),
    }
    polygon = item.find("polygon")
    if polygon is not None and polygon.children:
        found["segmentation"] = [_polygon(polygon, first)]
    return found


def _polygon(node: Node, first: int) -> list[float]:
    """Return x1, y1, x2, y2, ... of <x1>, <y1>, <x2>, ... in pixels from 0."""
    points = {child.tag: child.as_number() - first for child in node.children}
    count = len(points) // 2
    wanted = [f"{axis}{place}" for place in range(1, count + 1) for axis in "xy"]
    if len(points) % 2 or count < 3 or any(tag not in points for tag in wanted):
        fail(
            node.where,
            expected="<x1>, <y1>, <x2>, <y2> and so on of three or more points",
            got=", ".join(points),
            remedy="Correct the polygon.",
        )
    return [points[tag] for tag in wanted]


def _masks(document: Node, folder: Path, size: tuple[int, int], count: int) -> list[Any]:
    """Return the run lengths of each object's mask."""
    path = folder / f"{document.path.stem}.png"
    try:
        with Image.open(path) as image:
            indexes = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{path}: expected an image of object numbers, got {type(error).__name__} ({error}). "
            "Replace the file."
        ) from error
    last = max((int(i) for i in np.unique(indexes) if i != 255), default=0)
    if indexes.shape != size or last > count:
        fail(
            str(path),
            expected=f"{size[0]} x {size[1]} pixels with the numbers of {count} objects",
            got=f"{' x '.join(map(str, indexes.shape))} with numbers up to {last}",
            remedy="Replace the file, or remove the folder to use boxes only.",
        )
    return encode(np.stack([indexes == place for place in range(1, count + 1)]))
