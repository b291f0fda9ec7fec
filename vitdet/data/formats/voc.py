"""Pascal VOC: one xml an image, boxes in pixels that count from 1 and include the last one.

So <xmin>1</xmin><xmax>10</xmax> are ten pixels, x = 0 and width 10. Some tools count from 0: where
any box of a data set begins at 0, none is moved, and the width is xmax - xmin.

An object that is `difficult` is neither trained on nor counted in evaluation, as in VOC's own; in
COCO's terms it is a crowd region. Masks are taken from SegmentationObject/ (pixel value i belongs
to the i-th object, 255 to none) where every image with objects has one there, or from a <polygon>.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
from PIL import Image

from vitdet.data.files import Listing, list_files, read_text, written
from vitdet.data.formats.names import FileIndex, plain
from vitdet.data.formats.parts import (
    WHOLE,
    Found,
    Json,
    Part,
    counted,
    make_content,
    split_of,
    split_of_path,
)
from vitdet.data.formats.xml import child, is_voc, number, read_xml, word
from vitdet.data.images import IMAGE_SUFFIXES, ImageError, read_header
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import encode

NAME = "Pascal VOC xml"
LOOKED_FOR = "xml files (Annotations/*.xml with JPEGImages/, or beside the images) (Pascal VOC)"
_XML_FOLDERS = ("annotation", "xml", "label", "ann")  # how their names begin
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_MASKS = ("SegmentationObject", "SegmentationClass")


@dataclass(frozen=True)
class _Document:
    """An xml file that was read, and its image."""

    path: Path
    root: Element
    image: Path

    @property
    def objects(self) -> list[Element]:
        return self.root.findall("object")


def find(listing: Listing) -> list[Path]:
    """Return the xml files of a folder, [] where there is none of this format."""
    files = listing.of(".xml")
    return files if any(map(is_voc, files[:3])) else []


def read(
    listing: Listing, files: list[Path], images: Path | None, splits: Collection[str]
) -> Found:
    """Read the parts of a data set; the arguments are those of `coco.read`.

    Raises:
        InputError: xml that is broken or incomplete, images that are missing, with the file.
    """
    folder, notes = listing.folder, list(listing.notes())
    by_split = _lists(folder, files, notes)
    wanted = {split: paths for split, paths in by_split.items() if split in (WHOLE, *splits)}
    pictures = listing if images is None else list_files(images)
    by_name = _Images(
        [path for path in pictures.images() if path.parent.name not in _MASKS], folder
    )
    documents = {
        split: [by_name.document(path) for path in paths]
        for split, paths in (wanted or by_split).items()
    }
    everything = [document for part in documents.values() for document in part]
    names = sorted({_label(each, item) for each in everything for item in each.objects})
    if not names:
        got = f"none in {counted(len(everything), 'xml file')}"
        raise InputError(f"data folder {folder}: expected objects, got {got}. Check the xml files.")
    first = 0 if _counts_from_0(everything) else 1
    if first == 0:
        notes.append("a box begins at 0, so all are read as counted from 0")
    masks = _have_masks(everything, notes)
    parts = {}
    for split, part in documents.items():
        content, problems = _content(folder, part, names, first, masks)
        parts[split] = Part(split, content, folder, part[0].path.parent, problems=tuple(problems))
    if len(wanted) == len(by_split) and (bare := by_name.unused()):
        notes.append(f"left out: {counted(len(bare), 'image')} without xml (first: {bare[0].name})")
    return Found(folder, NAME, parts, tuple(notes))


# --- parts, and the images of xml files -----------------------------------------------------------


def _root(path: Path, folder: Path) -> Path:
    """Return the folder of a data set's xml files: Annotations/ or the like above the file."""
    for place in path.parents:
        if place.name.lower().startswith(_XML_FOLDERS):
            return place
        if place == folder:
            break
    return path.parent


def _lists(folder: Path, files: list[Path], notes: list[str]) -> dict[str, list[Path]]:
    """Return the xml files of each part: as ImageSets/Main says, else as their folders say."""
    by_split: dict[str, list[Path]] = defaultdict(list)
    roots: dict[str, set[Path]] = defaultdict(set)
    for path in files:
        root = _root(path, folder)
        split = split_of_path(path.parent / "-", folder)
        by_split[split or WHOLE].append(path)
        roots[split or WHOLE].add(root.parent)
    if len(roots[WHOLE]) > 1:
        places = sorted({_root(path, folder) for path in by_split[WHOLE]})
        raise InputError(
            f"data folder {folder}: expected xml files of one data set, got "
            f"{' and '.join(str(place.relative_to(folder)) for place in places[:3])}. "
            "Name the folder of one of them."
        )
    if set(by_split) != {WHOLE}:
        return dict(by_split)
    (base,) = roots[WHOLE]
    lists = next(
        (each for name in ("Main", ".") if (each := base / "ImageSets" / name).is_dir()), None
    )
    if lists is None:
        return dict(by_split)
    listed: dict[str, list[Path]] = {}
    for name in ("train", "val", "test", "trainval"):
        if (lists / f"{name}.txt").exists():
            listed[name] = list(_listed(lists / f"{name}.txt", files))
    whole = listed.pop("trainval", None)
    if whole and "train" not in listed:
        listed["train" if listed else WHOLE] = whole
    rest = set(files) - {path for part in (*listed.values(), whole or ()) for path in part}
    if listed and rest:
        notes.append(f"left out: {counted(len(rest), 'xml file')} that no list of ImageSets names")
    return listed or dict(by_split)


def _listed(path: Path, files: list[Path]) -> Iterator[Path]:
    """Yield the xml files that a list names, by lines such as `a`, `a 1`, `a.jpg` or a path."""
    by_stem = {plain(each.stem): each for each in files}
    for count, line in enumerate(read_text(path).splitlines(), 1):
        text = line.strip()
        if not text:
            continue
        for name in (text, text.rpartition(" ")[0].strip()):
            base = name.replace("\\", "/").rpartition("/")[2]
            bare = (
                Path(base).stem if Path(base).suffix.lower() in (*IMAGE_SUFFIXES, ".xml") else base
            )
            found = by_stem.get(plain(base)) or by_stem.get(plain(bare))
            if found is not None:
                yield found
                break
        else:
            raise InputError(
                f"{path}, line {count}: expected the name of an xml file, got {text!r} and no such "
                "file. Correct the list, or add the file."
            )


class _Images:
    """The images of a data set, by the names of their xml files."""

    def __init__(self, paths: list[Path], folder: Path) -> None:
        self._stems: dict[str, list[Path]] = defaultdict(list)
        for path in paths:
            self._stems[plain(path.stem)].append(path)
        self._index = FileIndex(paths)
        self._folder = folder
        self._left = dict.fromkeys(paths)
        self._of: dict[Path, Path] = {}

    def document(self, path: Path) -> _Document:
        """Read an xml file and find its image: of its own name, else as <filename> says."""
        root = read_xml(path)
        given = word(root, "filename") or path.stem
        hits = self._stems.get(plain(path.stem), []) or self._index.find(given)
        hits = hits or self._stems.get(plain(Path(given).stem), [])
        base = _root(path, self._folder)
        inside = path.parent.relative_to(base).parts
        split = split_of_path(path.parent / "-", self._folder)
        for score in (
            lambda each: each.parent == path.parent,
            lambda each: not inside or each.parent.parts[-len(inside) :] == inside,
            lambda each: each.is_relative_to(base.parent),
            lambda each: split is not None and split in map(split_of, each.parent.parts),
            lambda each: each.stem == path.stem,
            lambda each: each.name == given,
        ):
            best = [each for each in hits if score(each)]
            hits = best or hits
        if len(hits) != 1:
            got = " and ".join(map(str, hits[:2])) or "none in the data folder"
            raise InputError(
                f"{path}: expected an image {path.stem}.* (or {given}, as <filename> says), got "
                f"{got}. Add the image, name its folder by --images, or remove the xml file."
            )
        self._left.pop(hits[0], None)
        other = self._of.setdefault(hits[0], path)
        if other != path:
            raise InputError(
                f"{path}: expected an image of its own, got {hits[0]}, which {other} describes. "
                "Correct <filename>, or remove one of the two xml files."
            )
        return _Document(path, root, hits[0])

    def unused(self) -> list[Path]:
        """Return the images that no xml file was for."""
        return list(self._left)


# --- contents -------------------------------------------------------------------------------------


def _label(document: _Document, item: Element) -> str:
    name = word(item, "name")
    if not name:
        raise InputError(f"{document.path}: expected <name> in <object>, got none. Add the class.")
    return name


def _box(path: Path, item: Element) -> list[float]:
    box = item.find("bndbox")
    if box is None:
        got = "oriented boxes (<robndbox>)" if item.find("robndbox") is not None else "none"
        raise InputError(f"{path}: expected <bndbox> in <object>, got {got}. Add the box.")
    return [number(path, child(path, box, side)) for side in _SIDES]


def _counts_from_0(documents: list[_Document]) -> bool:
    boxes = (_box(each.path, item) for each in documents for item in each.objects)
    return any(min(box[:2]) < 1 for box in boxes)


def _have_masks(documents: list[_Document], notes: list[str]) -> bool:
    """Whether every image with objects has its masks in SegmentationObject/."""
    with_objects = [each for each in documents if each.objects]
    found = sum(_mask_file(each).is_file() for each in with_objects)
    if 0 < found < len(with_objects):
        notes.append(
            f"{_MASKS[0]} has masks of {found} of {len(with_objects)} images with objects: "
            "masks are not used"
        )
    return found == len(with_objects)


def _mask_file(document: _Document) -> Path:
    return document.path.parent.parent / _MASKS[0] / f"{document.path.stem}.png"


def _content(
    folder: Path, documents: list[_Document], names: list[str], first: int, masks: bool
) -> tuple[Json, list[str]]:
    images: list[Json] = []
    annotations: list[Json] = []
    problems: list[str] = []
    above = written(folder)
    for count, document in enumerate(documents, 1):
        path = written(document.image)
        inside = path.is_relative_to(above)
        name = path.relative_to(above).as_posix() if inside else str(path)
        images.append({"id": count, "file_name": name})
        try:
            size = read_header(path).upright
        except ImageError as error:
            problems.append(str(error))
            size = None
        given = _size(document)
        if given and size and given != size:
            problems.append(
                f"{document.path}: expected the size of {path.name}, {size[1]} x {size[0]} pixels "
                f"(width x height), got {given[1]} x {given[0]}. Correct <size>, or let `vitdet "
                "data check --fix` look at the images."
            )
        size = given or size
        if size is None:
            continue
        images[-1] |= {"height": size[0], "width": size[1]}
        items = document.objects
        found = []
        for item in items:
            box = _box(document.path, item)
            if box[0] > box[2] or box[1] > box[3]:
                sides = zip(_SIDES, box, strict=True)
                corners = ", ".join(f"{side} {value:g}" for side, value in sides)
                problems.append(
                    f"{document.path}: expected xmin below xmax and ymin below ymax, got "
                    f"{corners}. Correct the box."
                )
            found.append(_annotation(document, item, box, names, first))
        if masks and items:
            for each, mask in zip(found, _masks(document, size, len(items)), strict=True):
                each["segmentation"] = mask
        annotations += [{"image_id": count, **each} for each in found]
    return make_content(images, annotations, names), problems


def _size(document: _Document) -> tuple[int, int] | None:
    """Return (height, width) as the file says, None where it does not."""
    node = document.root.find("size")
    if node is None:
        return None
    sides = (number(document.path, child(document.path, node, tag)) for tag in ("height", "width"))
    height, width = (int(side) for side in sides)
    return (height, width) if height > 0 and width > 0 else None


def _annotation(
    document: _Document, item: Element, box: list[float], names: list[str], first: int
) -> Json:
    left, top, right, bottom = box
    width, height = right - left + first, bottom - top + first
    found: Json = {
        "category_id": names.index(_label(document, item)) + 1,
        "bbox": [left - first, top - first, width, height],
        "area": width * height,
        "iscrowd": int(_is_true(word(item, "difficult"))),
    }
    polygon = item.find("polygon")
    if polygon is not None and len(polygon):
        found["segmentation"] = [_polygon(document.path, polygon, first)]
    return found


def _is_true(text: str) -> bool:
    """Whether a flag is set; "Unspecified" and the like are not."""
    try:
        return abs(float(text)) > 0
    except ValueError:
        return text.lower() in ("true", "yes")


def _polygon(path: Path, node: Element, first: int) -> list[float]:
    """Return x1, y1, x2, y2, ... of <x1>, <y1>, <x2>, ... in pixels from 0."""
    wanted = [f"{axis}{place}" for place in range(1, len(node) // 2 + 1) for axis in "xy"]
    points = {each.tag: each for each in node}
    if len(node) % 2 or len(wanted) < 6 or any(tag not in points for tag in wanted):
        raise InputError(
            f"{path}: expected <x1>, <y1>, <x2>, <y2> and so on of three or more points, got "
            f"{', '.join(map(str, points))}. Correct the polygon."
        )
    return [number(path, points[tag]) - first for tag in wanted]


def _masks(document: _Document, size: tuple[int, int], count: int) -> list[Any]:
    """Return the run lengths of each object's mask."""
    path = _mask_file(document)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            indexes = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{path}: expected an image of object numbers, got {type(error).__name__} ({error}). "
            "Replace the file."
        ) from error
    last = max((int(i) for i in np.unique(indexes) if i != 255), default=0)
    if indexes.shape != size or last > count:
        raise InputError(
            f"{path}: expected {size[0]} x {size[1]} pixels with the numbers of {count} objects, "
            f"got {' x '.join(map(str, indexes.shape))} with numbers up to {last}. "
            "Replace the file, or remove the folder to use boxes only."
        )
    return encode(np.stack([indexes == place for place in range(1, count + 1)]))
