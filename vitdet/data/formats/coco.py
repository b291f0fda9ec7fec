"""COCO's format: one json a part, with its images in a folder. Roboflow's exports are such too.

Ids, sizes and annotations are handed on as they stand; `vitdet.data.annotations` reads them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any

from vitdet.data.files import Listing, kind_of, read_bytes, read_json
from vitdet.data.formats.names import ImageNames
from vitdet.data.formats.parts import (
    WHOLE,
    Found,
    Json,
    Part,
    listed,
    real_files,
    real_paths,
    split_of,
    split_of_path,
)
from vitdet.utils.checks import InputError

NAME = "COCO json"
LOOKED_FOR = (
    "json files with images, annotations and categories (annotations/instances_*.json, *.json, "
    "train/_annotations.coco.json)"
)
_KEYS = (b'"images"', b'"annotations"', b'"categories"')
_LISTS = ("images", "annotations", "categories")


def find(listing: Listing) -> list[Path]:
    """Return the annotation files of a folder: in it, and one or two folders below.

    COCO has other json files beside those of instances (captions, keypoints): where there is an
    instances_*.json, its neighbours of other names are not taken.
    """
    above = len(listing.folder.parts)
    for depth in (2, 3):
        files = [path for path in listing.of(".json") if len(path.parts) - above <= depth]
        files = [path for path in files if _looks_like_annotations(path, listing.folder)]
        if files:
            break
    exact = {path.parent for path in files if path.name.startswith("instances_")}
    return [
        path for path in files if path.parent not in exact or path.name.startswith("instances_")
    ]


def read(
    listing: Listing, files: list[Path], images: Path | None, splits: Collection[str]
) -> Found:
    """Read the parts of a data set.

    Args:
        listing: of the folder.
        files: what `find` found.
        images: folder of the images, where the user named it.
        splits: the parts that are wanted, beside data that are not split.

    Raises:
        InputError: two files for one part, images that are not found, a file that is not json.
    """
    folder = listing.folder
    by_split: dict[str, Path] = {}
    for path in files:
        split = split_of_path(path, folder) or WHOLE
        other = by_split.setdefault(split, path)
        if other != path:
            told = "a data set that is not split" if split == WHOLE else split
            raise InputError(
                f"data folder {folder}: expected one annotation file for {told}, got "
                f"{other.relative_to(folder)} and {path.relative_to(folder)}. "
                "Put one of them elsewhere, or name the file instead of the folder."
            )
    wanted = {split: path for split, path in by_split.items() if split in (WHOLE, *splits)}
    found = _read(folder, wanted or by_split, images, listing)
    named = {path for part in found.parts.values() for path in real_files(part)}
    notes = [*found.notes, *listing.notes()]
    if len(wanted) == len(by_split) and images is None:
        images_below = listing.images()
        real = zip(images_below, real_paths(images_below), strict=True)
        rest = [path for path, whole in real if whole not in named]
        if rest:
            first = rest[0].relative_to(folder)
            notes.append(f"left out: {len(rest)} image files that no json names (first: {first})")
    return Found(folder, found.format, found.parts, tuple(notes))


def read_file(path: Path, images: Path | None) -> Found:
    """Read one annotation file that the user named.

    Raises:
        InputError: as `read`.
    """
    split = split_of(path.stem) or split_of(path.parent.name) or WHOLE
    return _read(path.parent, {split: path}, images, None)


def _read(
    folder: Path, files: dict[str, Path], images: Path | None, listing: Listing | None
) -> Found:
    notes: list[str] = []
    contents: dict[str, Json] = {}
    plain: set[str] = set()
    for split, path in files.items():
        content, encoding = read_json(path)
        contents[split] = _lists(path, content)
        if encoding == "utf-8":
            plain.add(split)
        else:
            told = "UTF-8 with a byte order mark" if encoding == "utf-8-sig" else encoding.upper()
            notes.append(f"{path.name} is read as {told}")
    given = dict(contents)
    contents, left_out = _without_surplus(contents)
    if left_out:
        notes.append(f"left out: the category {listed(left_out)}, which no object is of")
    contents, problems = _united(files, contents, notes)
    parts = {}
    for split, path in files.items():
        above = _above(path, folder)
        if images is not None or (listing is not None and listing.folder != above):
            listing = None
        names = ImageNames(
            [_file_name(image) for image in contents[split]["images"]],
            split,
            images=images,
            places=_places(path, folder, split),
            folder=above,
            listing=listing,
        )
        root, renamed = names.located(path, notes)
        if renamed or any("file_name" not in image for image in contents[split]["images"]):
            contents[split] = _renamed(contents[split], renamed)
        same = contents[split] is given[split] and split in plain
        parts[split] = Part(
            split,
            contents[split],
            root,
            path,
            json_file=path if same else None,
            problems=tuple(problems[split]),
        )
    format_name = NAME if not left_out else "Roboflow's COCO json"
    return Found(folder, format_name, parts, tuple(notes))


def _looks_like_annotations(path: Path, folder: Path) -> bool:
    """Whether the file names the three lists; one that was cut off may lack the last.

    What is no json but has the name of a part is taken too: reading it says what it is.
    """
    data = read_bytes(path)
    if kind_of(data) is not None:
        return split_of_path(path, folder) is not None
    if b"\x00" in data[:4]:
        data = data.decode(json.detect_encoding(data[:4]), "ignore").encode()
    return sum(key in data for key in _KEYS) >= 2


def _lists(path: Path, content: Any) -> Json:
    if not isinstance(content, dict):
        raise InputError(
            f"annotation file {path}: expected an object with images, annotations and categories, "
            f"got a {type(content).__name__}. A list is often a file of results; give the "
            "annotations."
        )
    for key in _LISTS:
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            got = repr(entries)[:80]
            if entries is None:
                got = f"only the keys {listed(list(content)) or '(none)'}"
            raise InputError(
                f'annotation file {path}: expected a list "{key}" of objects (COCO format), got '
                f"{got}. Convert the annotations to COCO's format."
            )
    return content


def _file_name(image: Json) -> Any:
    """File name of an image; LVIS has the last two parts of a URL instead."""
    if "file_name" not in image and isinstance(image.get("coco_url"), str):
        return "/".join(image["coco_url"].split("/")[-2:])
    return image.get("file_name")


def _renamed(content: Json, names: dict[str, str]) -> Json:
    given = [(image, _file_name(image)) for image in content["images"]]
    images = [
        {**image, "file_name": names.get(name, name)} if isinstance(name, str) else image
        for image, name in given
    ]
    return {**content, "images": images}


def _above(path: Path, folder: Path) -> Path:
    """The folder below which the images of a json are looked for by their names."""
    if path.parent != folder:
        return folder
    return folder.parent if folder.name.lower().startswith(("annotation", "label")) else folder


def _places(path: Path, folder: Path, split: str) -> list[Path]:
    """Return the folders where the images of a json usually are."""
    stem = path.stem.removeprefix("instances_")
    spellings = dict.fromkeys((stem, split, {"val": "valid"}.get(split, split)))
    found = [path.parent]
    for base in dict.fromkeys((folder, path.parent, _above(path, folder))):
        found += [base / each for each in spellings]
        found += [base / "images" / each for each in spellings]
        found += [base / each / "images" for each in spellings]
        found += [base / "images", base]
    return [each for each in dict.fromkeys(found) if each.is_dir()]


# --- categories -----------------------------------------------------------------------------------


def _key(value: Any) -> Hashable:
    """An id to compare by: 1, 1.0 and "1" are one, as they are when the annotations are read."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 19:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else repr(value)


def _used(content: Json) -> set[Hashable]:
    return {_key(each.get("category_id")) for each in content["annotations"]}


def _without_surplus(contents: dict[str, Json]) -> tuple[dict[str, Json], list[str]]:
    """Leave out the category that Roboflow adds above all others; return the names left out.

    It is the super-category of every other, has none itself, and no object is of it. Where it has
    the name of a class, it may be told by that alone.
    """
    used = set().union(*(_used(content) for content in contents.values()))
    cleaned, names = {}, []
    for split, content in contents.items():
        categories = content["categories"]
        twice = Counter(str(each.get("name")) for each in categories)
        known = {str(each.get("name")) for each in categories if _key(each.get("id")) in used}
        surplus = []
        for each in categories:
            name = str(each.get("name"))
            others = [other for other in categories if other is not each]
            above = each.get("supercategory") == "none" and others
            above = above and all(other.get("supercategory") == name for other in others)
            double = twice[name] > 1 and name in known and each.get("supercategory") == "none"
            if (above or double) and _key(each.get("id")) not in used:
                surplus.append(each)
        cleaned[split] = content
        if surplus:
            kept = [each for each in categories if each not in surplus]
            cleaned[split] = {**content, "categories": kept}
            names += [str(each.get("name")) for each in surplus]
    return cleaned, list(dict.fromkeys(names))


def _united(
    files: dict[str, Path], contents: dict[str, Json], notes: list[str]
) -> tuple[dict[str, Json], dict[str, list[str]]]:
    """Give all parts the categories of all, by their names; ids are those of the first part.

    Raises:
        InputError: parts that have no class in common, or write one in two ways.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    first, *others = sorted(contents, key=(WHOLE, "train", "val", "test").index)
    tables = {split: _table(content) for split, content in contents.items()}
    if any(table is None for table in tables.values()):
        return contents, problems  # wrong categories: the reader of annotations says which
    joined = {name: number for number, name in (tables[first] or {}).items()}
    entries = list(contents[first]["categories"])
    for split in others:
        table = tables[split] or {}
        _check_names(files, first, split, joined, table)
        for number, name in table.items():
            if name not in joined:
                numbers = {each for each in joined.values() if isinstance(each, int)}
                free = number if number not in numbers else max(numbers, default=0) + 1
                joined[name] = free
                entries.append({"id": free, "name": name})
    for split, content in contents.items():
        table = tables[split] or {}
        missing = [name for name in joined if name not in table.values()]
        moved = {number: joined[name] for number, name in table.items() if joined[name] != number}
        if not missing and not moved:
            continue
        if missing:
            notes.append(f"{split} has no class {listed(missing)}: the classes of all parts count")
        if moved:
            notes.append(f"{split} has other ids of {len(moved)} classes: they are told by name")
        unknown = sorted(map(str, _used(content) - set(table)))
        if unknown:
            problems[split].append(f"{files[split]}: unknown category ids {listed(unknown)}")
        annotations = [
            {**each, "category_id": moved.get(_key(each.get("category_id")), each["category_id"])}
            if "category_id" in each
            else each
            for each in content["annotations"]
        ]
        contents[split] = {**content, "annotations": annotations, "categories": entries}
    return contents, problems


def _table(content: Json) -> dict[Hashable, str] | None:
    """Return {id: name}, None where an id or a name is wrong or repeated."""
    table = {_key(each.get("id")): each.get("name") for each in content["categories"]}
    good = all(isinstance(number, int) and isinstance(name, str) for number, name in table.items())
    unique = len(set(map(str, table.values()))) == len(table) == len(content["categories"])
    return table if good and unique else None


def _check_names(
    files: dict[str, Path],
    first: str,
    split: str,
    joined: dict[str, Hashable],
    table: dict[Hashable, str],
) -> None:
    """Stop where two parts cannot be of one data set."""
    plain = {"".join(filter(str.isalnum, name.lower())): name for name in joined}
    for number, name in table.items():
        alike = plain.get("".join(filter(str.isalnum, name.lower())), name)
        strange = not set(joined) & set(table.values())
        if (alike != name and name not in joined) or strange:
            wanted = alike if alike != name else next(iter(joined), "none")
            raise InputError(
                f"{files[split]}: expected the categories of {files[first]}, got {name!r} with id "
                f"{number} instead of {wanted!r}. Use the same categories in both files."
            )
