"""COCO's format: one json a part, with its images in a folder. Roboflow's exports are such too.

Ids, sizes and annotations are handed on as they stand; `vitdet.data.clean` reads them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any

from vitdet.data.files import Listing, is_file, kind_of, list_files, read_bytes, read_json
from vitdet.data.findings import check_lists
from vitdet.data.formats.parts import (
    WHOLE,
    Found,
    Index,
    Json,
    Part,
    listed,
    only_wanted,
    real_paths,
    split_of_path,
)
from vitdet.data.masks import whole
from vitdet.utils.checks import InputError

NAME = "COCO json"
LOOKED_FOR = (
    "json files with images, annotations and categories (annotations/instances_*.json, *.json, "
    "train/_annotations.coco.json)"
)
_LISTS = ("images", "annotations", "categories")
_PLACES = ("{}", "images/{}", "{}/images", "images", ".")  # of the images of a part
_PROBES = 50  # names that are looked for to find the folder of the images


def find(listing: Listing) -> list[Path]:
    """Return the annotation files of a folder: in it, and one or two folders below.

    COCO has other json files beside those of instances (captions, keypoints): where there is an
    instances_*.json, its neighbours of other names are not taken.
    """
    above, files = len(listing.folder.parts), []
    for depth in (2, 3):
        near = (path for path in listing.of(".json") if len(path.parts) - above <= depth)
        files = files or [path for path in near if _looks_right(path, listing.folder)]
    exact = {path.parent for path in files if path.name.startswith("instances_")}
    return [p for p in files if p.parent not in exact or p.name.startswith("instances_")]


def _looks_right(path: Path, folder: Path) -> bool:
    """Whether the file names the lists (one that was cut off may lack the last).

    What is no json but has the name of a part is taken too: reading it says what it is.
    """
    data = read_bytes(path)
    if kind_of(data) is not None:
        return split_of_path(path, folder) is not None
    if b"\x00" in data[:4]:
        data = data.decode(json.detect_encoding(data[:4]), "ignore").encode()
    return sum(f'"{key}"'.encode() in data for key in _LISTS) >= 2


def read(
    listing: Listing, files: list[Path], images: Path | None, splits: Collection[str]
) -> Found:
    """Read the wanted parts of a data set, and data that are not split.

    `listing` is of the folder, and empty where the user named a file; `files` is what `find` found,
    `images` the folder of the images where the user named it.
    """
    folder, notes, by_split = listing.folder, list[str](), dict[str, Path]()
    for path in files:
        split = split_of_path(path, folder) or WHOLE
        if (other := by_split.setdefault(split, path)) != path:
            raise InputError(
                f"data folder {folder}: expected one annotation file for {split}, got "
                f"{other.relative_to(folder)} and {path.relative_to(folder)}. "
                "Put one of them elsewhere, or name the file instead of the folder."
            )
    wanted, contents, as_it_is = only_wanted(by_split, splits), {}, {}
    for split, path in wanted.items():
        contents[split], encoding = read_json(path)
        if not isinstance(contents[split], dict):
            raise InputError(
                f"annotation file {path}: expected an object with images, annotations and "
                "categories, got another value. Results of a detector are a list: give annotations."
            )
        check_lists(contents[split], path)
        as_it_is[split] = contents[split] if encoding == "utf-8" else None
        if encoding != "utf-8":
            name = "UTF-8 with a byte order mark" if encoding == "utf-8-sig" else encoding.upper()
            notes.append(f"{path.name} is read as {name}")
    surplus = _without_surplus(contents)
    if surplus:
        notes.append(f"left out: the category {listed(surplus)}, which no object is of")
    _unite(wanted, contents, notes)
    parts = {}
    for split, path in wanted.items():
        root, content = _located(path, split, contents[split], folder, images, notes)
        json_file = path if content is as_it_is[split] else None
        parts[split] = Part(split, content, root, path, json_file)
    notes += listing.notes()
    if len(wanted) == len(by_split) and images is None:
        named = set().union(*(part.real_files() for part in parts.values()))
        below = listing.images()
        rest = [p for p, real in zip(below, real_paths(below), strict=True) if real not in named]
        if rest:
            first = rest[0].relative_to(folder)
            notes.append(f"left out: {len(rest)} image files that no json names (first: {first})")
    return Found(folder, "Roboflow's COCO json" if surplus else NAME, parts, tuple(notes))


# --- images ---------------------------------------------------------------------------------------


def _file_name(image: Json) -> Any:
    """File name of an image; LVIS has the last two parts of a URL instead."""
    if "file_name" not in image and isinstance(image.get("coco_url"), str):
        return "/".join(image["coco_url"].split("/")[-2:])
    return image.get("file_name")


def _located(
    source: Path, split: str, content: Json, folder: Path, given: Path | None, notes: list[str]
) -> tuple[Path, Json]:
    """Return the folder of the images, and the content with their names below it.

    Names that are not there as written are looked for by their ends. Absolute names do not count
    where the user named the folder of the images.
    """
    inside = source.parent == folder and folder.name.lower().startswith(("annotation", "label"))
    below = given or (folder.parent if inside else folder)
    words = (source.stem.removeprefix("instances_"), split, {"val": "valid"}.get(split, split))
    bases = dict.fromkeys((folder, source.parent, below))
    usual = (base / form.format(word) for base in bases for form in _PLACES for word in words)
    places = [each for each in dict.fromkeys((source.parent, *usual)) if each.is_dir()]
    places = [given] if given else places

    def has(root: Path, name: str) -> bool:
        return is_file(root / name) and not (given and Path(name).is_absolute())

    given_names = [_file_name(image) for image in content["images"]]
    names = dict.fromkeys(name for name in given_names if isinstance(name, str))
    sample = list(names)[:: max(1, len(names) // _PROBES)]
    root = max(places, key=lambda place: sum(has(place, name) for name in sample))
    missing = [name for name in names if not has(root, name)]
    paths = {name: root / name for name in names.keys() - missing}
    found = _by_ends(missing, list(paths.values()), below, split) if missing else {}
    if missing and not found and not paths:
        raise InputError(
            f"images of {source}: expected a folder that holds {missing[0]}, got none of "
            f"{listed(places, 12)}, and no single file of that name below {below}. Put the images "
            "beside the annotation file, or name their folder by --images."
        )
    if found:
        root, paths, first = below, paths | found, next(iter(found))
        notes.append(
            f"{source.name}: {len(found)} of {len(names)} images are found by their base "
            f"names, not as written: {first} is {found[first].relative_to(below)}"
        )
    elif all("file_name" in image for image in content["images"]):
        return root, content
    renamed = {
        name: path.relative_to(root).as_posix()
        if path.is_relative_to(root)
        else str(path.absolute())
        for name, path in paths.items()
    }
    images = [
        {**image, "file_name": renamed.get(name, name)} if isinstance(name, str) else image
        for image, name in zip(content["images"], given_names, strict=True)
    ]
    return root, {**content, "images": images}


def _by_ends(names: list[str], others: list[Path], below: Path, split: str) -> dict[str, Path]:
    """Return the files that names mean by their ends; each is for one image."""
    index = Index(list_files(below).images())
    hits = {name: index.find(name, split) for name in names}
    found = {name: paths[0] for name, paths in hits.items() if len(paths) == 1}
    taken = Counter(map(os.path.normpath, (*found.values(), *others)))
    return {name: path for name, path in found.items() if taken[os.path.normpath(path)] == 1}


# --- categories -----------------------------------------------------------------------------------


def _key(value: Any) -> Hashable:
    """An id to compare by: 1, 1.0 and "1" are one, as they are when the annotations are read."""
    number = whole(value)
    return repr(value) if number is None else number


def _used(content: Json) -> set[Hashable]:
    return {_key(each.get("category_id")) for each in content["annotations"]}


def _without_surplus(contents: dict[str, Json]) -> list[str]:
    """Leave out the category that Roboflow adds above all others; return the names left out.

    It is the super-category of every other, has none itself, and no object is of it. Where it has
    the name of a class, it is known by that alone.
    """
    used, names = set().union(*map(_used, contents.values())), []
    for split, content in contents.items():
        for each in content["categories"]:
            name, number = each.get("name"), _key(each.get("id"))
            others = [other for other in content["categories"] if other is not each]
            above = others and all(other.get("supercategory") == name for other in others)
            twins = (other for other in others if other.get("name") == name)
            twin = any(_key(other.get("id")) in used for other in twins)
            if (above or twin) and each.get("supercategory") == "none" and number not in used:
                names.append(str(name))
                kept = [other for other in contents[split]["categories"] if other is not each]
                contents[split] = {**content, "categories": kept}
    return list(dict.fromkeys(names))


def _unite(files: dict[str, Path], contents: dict[str, Json], notes: list[str]) -> None:
    """Give all parts the categories of all, by their names; ids are those of the first part.

    Raises:
        InputError: parts that have no class in common, or write one in two ways.
    """
    tables = {split: table for split, each in contents.items() if (table := _table(each))}
    if len(tables) < len(contents):
        return  # wrong categories: the reader of annotations says which
    first, *others = sorted(contents, key=(WHOLE, "train", "val", "test").index)
    ids = {name: number for number, name in tables[first].items()}
    entries = list(contents[first]["categories"])
    for split in others:
        spelt = {"".join(filter(str.isalnum, name.lower())): name for name in ids}
        new = {name: number for number, name in tables[split].items() if name not in ids}
        for name, number in new.items():
            alike = spelt.get("".join(filter(str.isalnum, name.lower())))
            if alike or len(new) == len(tables[split]):
                raise InputError(
                    f"{files[split]}: expected the categories of {files[first]}, got {name!r} "
                    f"instead of {alike or next(iter(ids))!r}. Use the same in both files."
                )
            ids[name] = max(ids.values()) + 1 if number in ids.values() else number
            entries.append({"id": ids[name], "name": name})
    for split, table in tables.items():
        missing = [name for name in ids if name not in table.values()]
        moved = sum(ids[name] != number for number, name in table.items())
        if missing:
            notes.append(f"{split} has no class {listed(missing)}: the classes of all parts count")
        if moved:
            notes.append(f"{split} has other ids of {moved} classes: they are matched by name")
        if missing or moved:  # an unknown id stays one, whatever the ids of other parts are
            new_ids = {number: ids[name] for number, name in table.items()}
            annotations = [
                {**each, "category_id": new_ids.get(_key(given), f"{given!r} of {split}")}
                for each in contents[split]["annotations"]
                for given in [each.get("category_id")]
            ]
            lists = {"annotations": annotations, "categories": entries}
            contents[split] = {**contents[split], **lists}


def _table(content: Json) -> dict[Any, str] | None:
    """Return {id: name}, None where an id or a name is wrong or repeated."""
    table = {_key(each.get("id")): each.get("name") for each in content["categories"]}
    good = all(isinstance(number, int) and isinstance(name, str) for number, name in table.items())
    unique = len(set(map(str, table.values()))) == len(table) == len(content["categories"])
    return table if good and unique else None
