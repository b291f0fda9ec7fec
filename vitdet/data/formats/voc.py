"""Pascal VOC: one xml an image, boxes in pixels that count from 1 and include the last one.

So <xmin>1</xmin><xmax>10</xmax> are ten pixels, x = 0 and width 10. Some tools count from 0: where
any box of a data set begins at 0, none is moved, and the width is xmax - xmin.

An object that is `difficult` is neither trained on nor counted in evaluation, as in VOC's own; in
COCO's terms it is a crowd region. Masks are taken from SegmentationObject/ (pixel value i belongs
to the i-th object, 255 to none) where every image with objects has one there, or from a <polygon>.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from vitdet.data import files
from vitdet.data.files import WHOLE, Builder, Found, Listing, counted
from vitdet.data.findings import Json
from vitdet.data.images import IMAGE_SUFFIXES, Size, opened
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import encode

NAME = "Pascal VOC xml"
LOOKED_FOR = "xml files (Annotations/*.xml with JPEGImages/, or beside the images) (Pascal VOC)"
_XML_FOLDERS = ("annotation", "xml", "label", "ann")  # how their names begin
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_SUFFIXES = (*IMAGE_SUFFIXES, ".xml")
_LISTS = ("train", "val", "test", "trainval")
_LIST_FOLDERS = ("imagesets/main", "imagesets", "", "imagesets/segmentation")  # the first counts
_MASKS = ("SegmentationObject", "SegmentationClass")
_DECLARED = re.compile(rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
_ENCODINGS = {"utf-8": "utf-8-sig", "utf8": "utf-8-sig", "gb2312": "gb18030", "gbk": "gb18030"}


class _Document(NamedTuple):
    path: Path
    root: Element
    image: Path

    @property
    def objects(self) -> list[Element]:
        return self.root.findall("object")

    @property
    def masks(self) -> Path:
        return self.path.parent.parent / _MASKS[0] / f"{self.path.stem}.png"


def find(listing: Listing) -> list[Path]:
    """Return the xml files of a folder, [] where there is none of this format."""
    return list(filter(_is_voc, listing.of(".xml")))


def _is_voc(path: Path) -> bool:
    """Whether the file may be of Pascal VOC: it has such a root, or is broken."""
    head = files.read_bytes(path, files.MAX_TEXT)[:2000].replace(b"\x00", b"")
    return re.search(rb"<annotation[\s/>]", head) is not None or files.kind_of(head) is not None


def read(
    listing: Listing, paths: list[Path], images: Path | None, splits: Collection[str]
) -> Found:
    """Read the parts of a data set: see `coco.read`. A file that is wrong is named."""
    folder, notes = listing.folder, listing.notes()
    others = set(listing.of(".xml")).difference(paths)
    notes += files.left_out("xml file", "of other kinds", others, folder)
    by_split = _lists(listing, paths, notes)
    wanted = files.only_wanted(by_split, splits)
    pictures = listing if images is None else files.list_files(images)
    photos = [path for path in pictures.images() if path.parent.name not in _MASKS]
    documents = _documents(folder, wanted, photos)
    everything = [document for part in documents.values() for document in part]
    items = [(each.path, item) for each in everything for item in each.objects]
    if not items:
        raise InputError(f"data folder {folder}: expected objects, got none in its xml files.")
    names = sorted({_name(*each) for each in items})
    first = int(all(min(_box(*each)[:2]) >= 1 for each in items))
    if not first:
        notes.append("a box begins at 0, so all are read as counted from 0")
    with_objects = [each.masks.is_file() for each in everything if each.objects]
    if any(with_objects) and not all(with_objects):
        count = f"{sum(with_objects)} of {len(with_objects)} images with objects"
        notes.append(f"{_MASKS[0]} has masks of {count}: masks are not used")
    parts, hidden = {}, 0
    for split, part in documents.items():
        builder = Builder(folder, names)
        for each in part:
            objects = [_object(each.path, item, names, first, builder) for item in each.objects]
            if size := _size(each, builder):
                if objects and all(with_objects):
                    hidden += len(objects)
                    objects = _with_masks(each.masks, size, objects)
                    hidden -= len(objects)
                builder.add_objects(size, objects)
        parts[split] = builder.part(split, part[0].path.parent)
    if hidden:
        notes.append(f"left out: {counted(hidden, 'object')} hidden by others in {_MASKS[0]}")
    if len(wanted) == len(by_split):
        rest = set(photos).difference(each.image for each in everything)
        notes += files.left_out("image", "without xml", rest, folder)
    return Found(folder, NAME, parts, tuple(notes))


# --- parts, and the images of xml files -----------------------------------------------------------


def _lists(listing: Listing, paths: list[Path], notes: list[str]) -> dict[str, list[Path]]:
    """Return the xml files of each part: as lists in text files say, else as their folders say."""
    folder = listing.folder
    by_split: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_split[files.split_of_path(path.parent / "-", folder) or WHOLE].append(path)
    bases = {_base(path, folder) for path in by_split.get(WHOLE, [])}
    if len(bases) > 1:
        got = " and ".join(os.path.relpath(base, folder) for base in sorted(bases)[:3])
        raise InputError(f"data folder {folder}: expected one data set, got {got}. Name one.")
    if set(by_split) != {WHOLE}:
        return dict(by_split)
    base = bases.pop()
    texts: dict[str, list[Path]] = defaultdict(list)
    for path in listing.of(".txt"):
        if path.stem in _LISTS and path.is_relative_to(base):
            texts[path.parent.relative_to(base).as_posix().lower().strip(".")].append(path)
    used, *others = [texts[each] for each in _LIST_FOLDERS if each in texts] or [[]]
    for rest in others:
        why = f"of a part, since {os.path.relpath(used[0].parent, folder)} has such"
        notes += files.left_out("list", why, rest, folder)
    lists = {path.stem: list(_listed(path, paths, notes)) for path in used}
    lists = {name: lists[name] for name in _LISTS if lists.get(name)}
    rest = set(paths).difference(*lists.values()) if lists else set()
    both = lists.pop("trainval", None)
    if both and {"train", "val"} - set(lists):
        other = [path for path in both if path not in lists.get("train", lists.get("val", []))]
        lists["val" if "train" in lists else "train" if lists else WHOLE] = other
    notes += files.left_out("xml file", "that no list of a part names", rest, folder)
    return {name: part for name, part in lists.items() if part} or dict(by_split)


def _base(path: Path, folder: Path) -> Path:
    """Return the folder of a data set: that of Annotations/ or the like, else that of its xml."""
    inside = [each for each in path.parents if each.is_relative_to(folder)]
    named = (each.parent for each in inside if each.name.lower().startswith(_XML_FOLDERS))
    return next(named, path.parent.parent)


def _listed(path: Path, paths: list[Path], notes: list[str]) -> Iterator[Path]:
    """Yield the xml files that a list names, by lines such as `a`, `a 1`, `a.jpg` or a path.

    Images of a test often have none.
    """
    lost, by_stem = 0, {files.plain(each.stem): each for each in paths}
    for count, line in enumerate(files.read_text(path).splitlines(), 1):
        text = line.strip().replace("\\", "/")
        names = [each.rpartition("/")[2].strip() for each in (text, text.rpartition(" ")[0])]
        names += [Path(name).stem for name in names if Path(name).suffix.lower() in _SUFFIXES]
        found = [by_stem[files.plain(name)] for name in names if files.plain(name) in by_stem]
        yield from found[:1]
        if text and not found and path.stem != "test":
            raise InputError(f"{path}, line {count}: expected the name of an xml, got {text!r}.")
        lost += bool(text and not found)
    if lost:
        notes.append(f"{path.name}: {counted(lost, 'name')} without xml left out")


def _documents(
    folder: Path, parts: dict[str, list[Path]], images: list[Path]
) -> dict[str, list[_Document]]:
    """Read the xml files, and find the image of each: of its own name, else as <filename> says."""
    roots = {path: _read_xml(path) for paths in parts.values() for path in paths}
    given = {path: _word(root, "filename") for path, root in roots.items()}
    found: dict[Path, Path] = {}
    for form in (
        lambda path: str(path.absolute().with_suffix("")),
        lambda path: f"{path.absolute().parent}/{given[path]}",
        lambda path: f"{path.absolute().parent}/{os.path.splitext(given[path])[0]}",  # noqa: PTH122
    ):
        names = {form(path): path for path in roots if path not in found}
        hits = files.by_names(names, images, found.values())
        found |= {names[name]: image for name, image in hits.items()}
    lost = next((path for path in roots if path not in found), None)
    if lost is not None:
        raise InputError(
            f"{lost}: expected an image of its own, {lost.stem}.* (or {given[lost] or 'none'}, as "
            f"<filename> says), got none below {folder}, or several. Add the image, or name its "
            "folder by --images."
        )
    return {
        split: [_Document(path, roots[path], found[path]) for path in paths]
        for split, paths in parts.items()
    }


# --- contents -------------------------------------------------------------------------------------


def _size(document: _Document, builder: Builder) -> Size | None:
    """Add the image; return its (height, width), of the xml if it says one."""
    size, node = builder.add_image(document.image), document.root.find("size")
    if node is None:
        return size
    given = int(_number(document.path, node, "height")), int(_number(document.path, node, "width"))
    if min(given) <= 0:
        return size
    if size and given != size:
        builder.problems.append(
            f"{document.path}: expected the size of {document.image.name}, {size[1]} x {size[0]} "
            f"pixels (width x height), got {given[1]} x {given[0]}. Try `vitdet data check --fix`."
        )
    return given


def _object(path: Path, item: Element, names: list[str], first: int, builder: Builder) -> Json:
    left, top, right, bottom = box = _box(path, item)
    if left > right or top > bottom:
        got = ", ".join(f"{side} {value:g}" for side, value in zip(_SIDES, box, strict=True))
        builder.problems.append(
            f"{path}: expected xmin below xmax and ymin below ymax, got {got}. Correct the box."
        )
    found: Json = {
        "category_id": names.index(_name(path, item)) + 1,
        "bbox": [left - first, top - first, right - left + first, bottom - top + first],
        "iscrowd": int(_word(item, "difficult").lower() in ("1", "true", "yes")),
    }
    polygon = item.find("polygon")
    if polygon is not None and len(polygon):
        places = range(1, max(3, len(polygon) // 2) + 1)
        points = (_number(path, polygon, f"{axis}{place}") for place in places for axis in "xy")
        found["segmentation"] = [[value - first for value in points]]
    return found


def _with_masks(path: Path, size: Size, objects: list[Json]) -> list[Json]:
    """Return the objects that can be seen, with their masks in run lengths."""
    with opened(path, deep=True) as image:
        numbers = np.asarray(image)
    last = max((int(i) for i in np.unique(numbers) if i != 255), default=0)
    if numbers.shape != size or last > len(objects):
        raise InputError(
            f"{path}: expected {size[0]} x {size[1]} pixels with the numbers of {len(objects)} "
            f"objects, got {numbers.shape} with numbers up to {last}."
        )
    masks = np.stack([numbers == place for place in range(1, len(objects) + 1)])
    drawn = zip(objects, encode(masks), masks, strict=True)
    return [{**each, "segmentation": mask} for each, mask, pixels in drawn if pixels.any()]


# --- xml ------------------------------------------------------------------------------------------


def _read_xml(path: Path) -> Element:
    """Return the root element of a file in UTF-8, UTF-16 or the encoding that it declares."""
    data = files.read_bytes(path, files.MAX_TEXT)
    declared = _DECLARED.search(data[:300])
    encoding = declared[1].decode().lower() if declared else "utf-8"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    try:
        text = data.decode(_ENCODINGS.get(encoding, encoding))
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise InputError(f"{path}: expected plain xml, got declarations (<!DOCTYPE ...>).")
        text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
        return ElementTree.fromstring(re.sub(r"\sxmlns(:\w+)?=[\"'][^\"'<>]*[\"']", "", text))
    except (ElementTree.ParseError, LookupError, UnicodeError) as error:
        got = files.kind_of(data) or f"text that is not ({error})"
        expected = "complete xml, in UTF-8 or what it declares"
        raise InputError(f"{path}: expected {expected}, got {got}.") from error


def _word(element: Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _name(path: Path, item: Element) -> str:
    if not (name := _word(item, "name")):
        raise InputError(f"{path}: expected <name> in <object>, got none. Add the class.")
    return name


def _box(path: Path, item: Element) -> list[float]:
    box = item.find("bndbox")
    if box is None:
        got = "oriented boxes (<robndbox>)" if item.find("robndbox") is not None else "none"
        raise InputError(f"{path}: expected <bndbox> in <object>, got {got}. Add the box.")
    return [_number(path, box, side) for side in _SIDES]


def _number(path: Path, element: Element, tag: str) -> float:
    text = element.findtext(tag)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        got = "no such element" if text is None else repr(text.strip())
        raise InputError(f"{path}: expected a number in <{tag}> of <{element.tag}>, got {got}.")
    return value
