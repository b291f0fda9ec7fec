"""COCO's format: one json a part, with its images in a folder. Roboflow's exports are such too."""

from __future__ import annotations

from pathlib import Path

from vitdet.data.annotations import read_json
from vitdet.data.formats.parts import WHOLE, Found, Json, Part, split_of
from vitdet.utils.checks import fail

NAME = "COCO json"
LOOKED_FOR = (
    "json files with images, annotations and categories (annotations/instances_*.json, *.json, "
    "train/_annotations.coco.json)"
)
_KEYS = (b'"images"', b'"annotations"', b'"categories"')
_PROBES = 50  # file names that are looked for to find the folder of a json


def find(folder: Path) -> list[Path]:
    """Return the annotation files of a folder: in it, and one folder below.

    COCO has other json files beside those of instances (captions, keypoints): where there is an
    instances_*.json, its neighbours of other names are not taken.
    """
    files = [path for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])]
    with_instances = {path.parent for path in files if path.name.startswith("instances_")}
    return [
        path
        for path in files
        if (path.parent not in with_instances or path.name.startswith("instances_"))
        and _looks_like_annotations(path)
    ]


def read(folder: Path, files: list[Path], images: Path | None = None) -> Found:
    """Read the parts of a data set.

    Args:
        folder: of the data set.
        files: what `find` found, or a file that the user named.
        images: folder of the images, where the user named it.

    Raises:
        InputError: two files for one part, images that are not found, a file that is not json.
    """
    by_split: dict[str, Path] = {}
    for path in files:
        split = _split(path, folder)
        other = by_split.setdefault(split, path)
        if other != path:
            fail(
                f"data folder {folder}",
                expected=f"one annotation file for {_told(split)}",
                got=f"{other.relative_to(folder)} and {path.relative_to(folder)}",
                remedy="Put one of them elsewhere, or name the file instead of the folder.",
            )
    contents = {split: _read(path) for split, path in by_split.items()}
    dummy = _dummy_category(list(contents.values()))
    parts = {}
    for split, path in by_split.items():
        root = images or _image_folder(path, folder, split, contents[split])
        if dummy is None:
            parts[split] = Part(split, contents[split], root, path, json_file=path)
        else:
            kept = [each for each in contents[split]["categories"] if each["id"] != dummy]
            parts[split] = Part(split, {**contents[split], "categories": kept}, root, path)
    return Found(folder, NAME if dummy is None else "Roboflow's COCO json", parts)


def _looks_like_annotations(path: Path) -> bool:
    """Whether the file names the three lists; one that was cut off may lack the last."""
    text = path.read_bytes()
    return sum(key in text for key in _KEYS) >= 2


def _split(path: Path, folder: Path) -> str:
    """The part that a file is for, by its name, else by its folder's."""
    in_name = split_of(path.stem)
    return in_name or (split_of(path.parent.name) if path.parent != folder else None) or WHOLE


def _told(split: str) -> str:
    return "a data set that is not split" if split == WHOLE else split


def _read(path: Path) -> Json:
    content = read_json(path)
    for part in ("images", "annotations", "categories"):
        entries = content.get(part)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            fail(
                f"annotation file {path}",
                expected=f'a list "{part}" of objects (COCO format)',
                got=f"only the keys {', '.join(map(str, content))}"
                if entries is None
                else repr(entries)[:80],
                remedy="Convert the annotations to COCO's format.",
            )
    return content


def _dummy_category(contents: list[Json]) -> int | None:
    """Return the id of the category that Roboflow adds above the others, None without one.

    It is the super-category of every other, has none itself, and no object is of it.
    """
    categories = contents[0]["categories"]
    if any(content["categories"] != categories for content in contents[1:]):
        return None
    for each in categories:
        others = [other for other in categories if other is not each]
        above = others and all(other.get("supercategory") == each.get("name") for other in others)
        if above and each.get("supercategory") == "none":
            used = any(
                annotation.get("category_id") == each.get("id")
                for content in contents
                for annotation in content["annotations"]
            )
            return None if used else each.get("id")
    return None


def _image_folder(path: Path, folder: Path, split: str, content: Json) -> Path:
    """Return the folder that has most of the file's images."""
    names = [each.get("file_name") for each in content["images"]]
    names = [name for name in names if isinstance(name, str)]
    names = names[:: max(1, len(names) // _PROBES)]
    stem = path.stem.removeprefix("instances_")
    spellings = dict.fromkeys((stem, split, {"val": "valid"}.get(split, split)))
    candidates = [path.parent]
    for base in dict.fromkeys((folder, path.parent, path.parent.parent)):
        if base == folder or folder in base.parents:
            candidates += [base / each for each in spellings]
            candidates += [base / "images" / each for each in spellings]
            candidates += [base / each / "images" for each in spellings]
            candidates += [base / "images", base]
    candidates = [each for each in dict.fromkeys(candidates) if each.is_dir()]
    hits = [sum((each / name).is_file() for name in names) for each in candidates]
    if names and not any(hits):
        looked = ", ".join(str(each.relative_to(folder)) for each in candidates)
        fail(
            f"images of {path}",
            expected=f"a folder that holds {names[0]}",
            got=f"no such file in any of {looked}",
            remedy="Put the images beside the annotation file, or name their folder by --images.",
        )
    return candidates[hits.index(max(hits))]
