"""COCO's format: one json a part, with its images in a folder. Roboflow's exports are such too.

Ids, sizes and annotations are handed on as they stand; `vitdet.data.clean` reads them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from vitdet.data import files
from vitdet.data.files import WHOLE, Found, Listing, listed
from vitdet.data.findings import Json, check_lists
from vitdet.data.labels import key_of
from vitdet.utils.checks import InputError

NAME = "COCO json"
LOOKED_FOR = (
    "json files with images, annotations and categories (annotations/instances_*.json, *.json, "
    "train/_annotations.coco.json)"
)
_LISTS = (b'"images"', b'"annotations"', b'"categories"')
_PLACES = ("{}", "images/{}", "{}/images", "images", ".")  # of the images of a part
_DEEPEST = 8  # folders above an annotation file
_PROBES = 50  # names that are looked for to find the folder of the images


def find(listing: Listing) -> list[Path]:
    """Return the annotation files of a folder: in it and one folder below, or where the first are.

    COCO has other json files beside those of instances (captions, keypoints): where there is an
    instances_*.json, its neighbours of other names are not taken.
    """
    above, found = len(listing.folder.parts), []
    for depth in range(2, _DEEPEST):
        near = (path for path in listing.of(".json") if len(path.parts) - above <= depth)
        found = found or [path for path in near if _looks_right(path, listing.folder)]
    exact = {path.parent for path in found if path.name.startswith("instances_")}
    return [p for p in found if p.parent not in exact or p.name.startswith("instances_")]


def _looks_right(path: Path, folder: Path) -> bool:
    """Whether a file names the lists (one that was cut off may lack the last), or is no json.

    What is no json but has the name of a part is taken: reading it says what it is.
    """
    data = files.read_bytes(path)
    if files.kind_of(data) is not None:
        return files.split_of_path(path, folder) is not None
    if b"\x00" in data[:4]:  # UTF-16
        data = data.replace(b"\x00", b"")
    lists = sum(key in data for key in _LISTS)
    return lists == 3 or (lists == 2 and files.tool_of(data) is None)


def read(
    listing: Listing, paths: list[Path], images: Path | None, splits: Collection[str]
) -> Found:
    """Read the wanted parts of a data set, and data that are not split.

    `listing` is of the folder, and empty where the user named a file; `paths` is what `find` found,
    `images` the folder of the images where the user named it.
    """
    folder, notes, by_split = listing.folder, list[str](), dict[str, Path]()
    for path in paths:
        split = files.split_of_path(path, folder) or WHOLE
        if (other := by_split.setdefault(split, path)) != path:
            raise InputError(
                f"data folder {folder}: expected one annotation file for {split}, got "
                f"{other.relative_to(folder)} and {path.relative_to(folder)}. Name one of them."
            )
    wanted = files.only_wanted(by_split, splits)
    contents, as_it_is = {}, {}
    for split, path in wanted.items():
        content, encoding = files.read_json(path)
        check_lists(content, path)
        lvis = [x for x in content["images"] if "file_name" not in x and "coco_url" in x]
        for image in lvis:  # folder and name of the file stand in a URL only
            image["file_name"] = "/".join(str(image["coco_url"]).split("/")[-2:])
        contents[split] = content
        as_it_is[split] = content if encoding == "utf-8" and not lvis else None
        if encoding != "utf-8":
            name = "UTF-8 with a byte order mark" if encoding == "utf-8-sig" else encoding.upper()
            notes.append(f"{path.name} is read as {name}")
    surplus = _without_surplus(contents)
    if surplus:
        notes.append(f"left out: the category {listed(surplus)}, which no object is of")
    _unite(wanted, contents, notes)
    others = [path for path in listing.of(".json") if files.split_of(path.stem)]
    others = [path for path in others if path not in paths]
    notes += files.left_out("json file", "of other kinds", others, folder)
    parts = {}
    for split, path in wanted.items():
        root, content = _located(path, split, contents[split], folder, images, notes)
        json_file = path if content is as_it_is[split] else None
        parts[split] = files.Part(split, content, root, path, json_file)
    notes += listing.notes()
    if len(wanted) == len(by_split) and images is None:
        named, below = set().union(*(x.real_files() for x in parts.values())), listing.images()
        real = zip(below, files.real_paths(below), strict=True)
        rest = [path for path, its in real if its not in named]
        notes += files.left_out("image file", "that no json names", rest, folder)
    return Found(folder, "Roboflow's COCO json" if surplus else NAME, parts, tuple(notes))


# --- images ---------------------------------------------------------------------------------------


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
        return files.is_file(root / name) and not (given and Path(name).is_absolute())

    names = (image.get("file_name") for image in content["images"])
    names = list(dict.fromkeys(name for name in names if isinstance(name, str)))
    sample = names[:: max(1, len(names) // _PROBES)]
    root = max(places, key=lambda place: sum(has(place, name) for name in sample))
    missing = [name for name in names if not has(root, name)]
    if not missing:
        return root, content
    paths = {name: root / name for name in set(names).difference(missing)}
    found = files.by_names(missing, files.list_files(below).images(), paths.values(), split)
    if not found and not paths:
        raise InputError(
            f"images of {source}: expected a folder that holds {missing[0]}, got none of "
            f"{listed(places, 12)}, and no single file of that name below {below}. Put the images "
            "beside the annotation file, or name their folder by --images."
        )
    if not found:
        return root, content
    first = next(iter(found))
    notes.append(
        f"{source.name}: {len(found)} of {len(names)} images are found by their base "
        f"names, not as written: {first} is {found[first].relative_to(below)}"
    )
    new = {
        name: path.relative_to(below).as_posix()
        if path.is_relative_to(below)
        else str(path.absolute())
        for name, path in (paths | found).items()
    }
    images = [
        {**image, "file_name": new[name]} if isinstance(name, str) and name in new else image
        for image in content["images"]
        for name in [image.get("file_name")]
    ]
    return below, {**content, "images": images}


# --- categories -----------------------------------------------------------------------------------


def _without_surplus(contents: dict[str, Json]) -> list[str]:
    """Leave out the category that Roboflow adds above all others; return the names left out.

    It is the super-category of every other, has none itself, and no object is of it. Where it has
    the name of a class, it is known by that alone.
    """
    objects = (each for content in contents.values() for each in content["annotations"])
    used, names = {key_of(each.get("category_id")) for each in objects}, dict[str, None]()
    for split, content in contents.items():
        for each in content["categories"]:
            name, others = each.get("name"), [x for x in content["categories"] if x is not each]
            above = others and all(other.get("supercategory") == name for other in others)
            twins = (key_of(other.get("id")) for other in others if other.get("name") == name)
            alone = each.get("supercategory") == "none" and key_of(each.get("id")) not in used
            if alone and (above or not used.isdisjoint(twins)):
                names[str(name)] = None
                kept = [x for x in contents[split]["categories"] if x is not each]
                contents[split] = {**content, "categories": kept}
    return list(names)


def _unite(sources: dict[str, Path], contents: dict[str, Json], notes: list[str]) -> None:
    """Give all parts the categories of all, by their names; ids are those of the first part.

    Raises:
        InputError: parts that have no class in common, or write one in two ways.
    """
    tables = {split: table for split, each in contents.items() if (table := _table(each))}
    if len(tables) < len(contents):
        return  # wrong categories: the reader of annotations says which
    first, *others = sorted(contents, key=(WHOLE, *files.SPLITS).index)
    ids = {name: number for number, name in tables[first].items()}
    entries = list(contents[first]["categories"])
    for split in others:
        spelt = {letters(name): name for name in ids}
        new = {name: number for number, name in tables[split].items() if name not in ids}
        for name, number in new.items():
            alike = spelt.get(letters(name))
            if alike or len(new) == len(tables[split]):
                raise InputError(
                    f"{sources[split]}: expected the categories of {sources[first]}, got {name!r} "
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
                {**each, "category_id": new_ids.get(key_of(given), f"{given!r} of {split}")}
                for each in contents[split]["annotations"]
                for given in [each.get("category_id")]
            ]
            lists = {"annotations": annotations, "categories": entries}
            contents[split] = {**contents[split], **lists}


def letters(name: str) -> str:
    """Return what tells a class from others, however it is spelt."""
    return "".join(filter(str.isalnum, name.lower()))


def _table(content: Json) -> dict[int, str] | None:
    """Return {id: name}, None where an id or a name is wrong or repeated."""
    table = {key_of(each.get("id")): each.get("name") for each in content["categories"]}
    good = all(isinstance(number, int) and isinstance(name, str) for number, name in table.items())
    unique = len(set(map(str, table.values()))) == len(table) == len(content["categories"])
    return table if good and unique else None
