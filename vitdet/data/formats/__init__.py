"""Data sets as tools write them (COCO json, Roboflow, YOLO text, Pascal VOC xml), as COCO dicts.

The readers are our own: those of supervision decode whole images where a header is enough, and know
neither ImageSets nor `difficult`. What they cannot use is named and counted, never passed over.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from vitdet.data import files
from vitdet.data.files import SPLITS, WHOLE, Found, Listing, Part, counted, exists, listed
from vitdet.data.formats import coco, voc, yolo
from vitdet.utils.checks import InputError

__all__ = ["FORMATS", "Found", "Part", "find_data"]

FORMATS = {"coco": coco, "yolo": yolo, "voc": voc}
_MAX_LOOKED_AT = 20  # files of a suffix, to name the tool that wrote them
_SUFFIXES = (".json", ".ndjson", ".jsonl", ".xml", ".csv", ".txt")


def find_data(
    folder: Path,
    form: str | None = None,
    images: Path | None = None,
    splits: Collection[str] = SPLITS,
) -> Found:
    """Read the data set of a folder, whatever its format.

    Args:
        folder: of the data set, or an annotation file in COCO's format, or a data.yaml.
        form: "coco", "yolo" or "voc" where the folder holds several; None finds out.
        images: folder of the images, where they do not lie with the labels.
        splits: parts that are wanted; others are not read.

    Raises:
        InputError: what was looked for, and what was found.
    """
    folder = _opened(folder, "data")
    images = None if images is None else files.written(_opened(images, "--images"))
    if images is not None and not images.is_dir():
        raise InputError(f"--images {images}: expected a folder, got a file. Give its folder.")
    if folder.is_dir():
        listing = files.list_files(folder)
        name, paths = _format(listing, form)
        found = FORMATS[name].read(listing, paths, images, splits)
    elif folder.suffix.lower() in (".yaml", ".yml") and form in (None, "yolo"):
        found = yolo.read(Listing(folder.parent), [folder], images, splits)
    else:
        found = coco.read(Listing(folder.parent), [folder], images, SPLITS)
    if WHOLE in found.parts and {"train", "val"} & set(found.parts):
        got = ", ".join(os.path.relpath(each.source, folder) for each in found.parts.values())
        raise InputError(
            f"data folder {folder}: expected parts whose names say train or val, got {got}. "
            "Rename the files, or name the one to use instead of the folder."
        )
    parts = {split: found.parts[split] for split in (WHOLE, *SPLITS) if split in found.parts}
    return replace(found, parts=parts, notes=(*dict.fromkeys(found.notes), *_common(parts)))


def _opened(path: Path, what: str) -> Path:
    """Return a path as it is meant: ~ and file:// are understood."""
    text = str(path)
    if text.startswith("file:/"):
        text = unquote(re.sub(r"^file:/+", "/", text))
    found = files.home(text)
    if exists(found):
        return found
    likely = next((x for x in (text.strip(), text.replace("\\", "/")) if exists(x)), None)
    remedy = "Check the path." if likely is None else f"Did you mean {likely!r}?"
    if re.match(r"[a-z0-9+]+:/", text):
        remedy = "Download it first, and give the folder."
    got = "a link that leads nowhere" if files.is_link(found) else "nothing at this path"
    raise InputError(f"{what}: expected a folder {found}, got {got}. {remedy}")


def _format(listing: Listing, form: str | None) -> tuple[str, list[Path]]:
    """Return the format of a folder, and the files that tell it."""
    folder = listing.folder
    wanted = FORMATS if form is None else {form: FORMATS[form]}
    found = {name: paths for name, each in wanted.items() if (paths := each.find(listing))}
    if len(found) == 1:
        return found.popitem()
    if found:
        got = (f"{FORMATS[x].NAME} ({found[x][0].relative_to(folder)})" for x in found)
        raise InputError(
            f"data folder {folder}: expected labels of one format, got {' and '.join(got)}. "
            f"Choose with --format {' or --format '.join(found)}."
        )
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    kinds = Counter(path.suffix.lower() or "no suffix" for path in entries if path.is_file())
    got = [f"{path.name}/" for path in entries if path.is_dir()][:8]
    got += [f"{count} x {kind}" for kind, count in kinds.most_common(8)]
    hints = list(dict.fromkeys(_hints(listing)))[:3]
    hints = hints or ["Give the folder that holds these, or convert the labels to one of them."]
    raise InputError(
        f"data folder {folder}: expected {' or '.join(x.LOOKED_FOR for x in wanted.values())}, "
        f"got {', '.join(got) or 'an empty folder'}. {' '.join(hints)}"
    )


def _hints(listing: Listing) -> Iterator[str]:
    """Yield what labels there are instead, and what to do with them."""
    folder = listing.folder
    for path in listing.of(".yaml", ".yml"):
        if path.parent != folder and path.stem.lower() in ("data", "dataset"):
            yield f"There is {path.relative_to(folder)}: give {path.parent}."
            return
    found = [path for suffix in _SUFFIXES for path in listing.of(suffix)[:_MAX_LOOKED_AT]]
    for path in found:
        data = files.read_bytes(path)
        if (kind := files.kind_of(data)) and path.suffix.lower() == ".json":
            yield f"{path.name} is {kind}."
        if tool := files.tool_of(data):
            yield f"{path.name} is of {tool}."
            return
    for place, count in Counter(path.parent for path in listing.of(".txt")).most_common(1):
        yield (
            f"There are {count} x .txt in {place.relative_to(folder)}/, and no names of classes: "
            "write a classes.txt, one name a line, or a data.yaml."
        )


def _common(parts: dict[str, Part]) -> Iterator[str]:
    """Yield lines on classes without objects, and on images of two parts."""
    counts = {
        split: Counter(repr(each.get("category_id")) for each in part.content["annotations"])
        for split, part in parts.items()
    }
    categories = next(iter(parts.values())).content["categories"]
    names = {repr(each.get("id")): str(each.get("name")) for each in categories}
    bare = [name for key, name in names.items() if not any(each[key] for each in counts.values())]
    if bare and len(bare) < len(names):
        yield f"{counted(len(bare), 'class')} without any object: {listed(bare)}"
    spelt = Counter(coco.letters(name) for name in names.values())
    if twins := [name for name in names.values() if spelt[coco.letters(name)] > 1]:
        yield f"classes that differ in their spelling alone: {listed(twins)}"
    if "train" in parts and "val" in parts:
        untrained = [names[k] for k in names if counts["val"][k] and not counts["train"][k]]
        if untrained:
            yield f"only val has objects of {listed(untrained)}: nothing is learnt of them"
        if both := len(parts["train"].real_files() & parts["val"].real_files()):
            yield f"{counted(both, 'image')} of val are in train, too: their AP says little"
