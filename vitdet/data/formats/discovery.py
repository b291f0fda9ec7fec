"""Which format the data in a folder have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vitdet.data.formats import coco, voc, yolo
from vitdet.data.formats.parts import WHOLE, Found, Part
from vitdet.utils.checks import fail

FORMATS = {"coco": coco, "yolo": yolo, "voc": voc}


def find_data(folder: Path, form: str | None = None, images: Path | None = None) -> Found:
    """Read the data set of a folder, whatever its format.

    Args:
        folder: of the data set, or an annotation file in COCO's format.
        form: "coco", "yolo" or "voc" where the folder holds several; None finds out.
        images: folder of the images, where they do not lie with the labels.

    Raises:
        InputError: one line that says what was looked for and what was found.
    """
    if folder.is_file():
        return coco.read(folder.parent, [folder], images)
    if not folder.is_dir():
        remedy = "Check the path."
        fail("data", expected=f"a folder {folder}", got="nothing at this path", remedy=remedy)
    wanted = FORMATS if form is None else {form: FORMATS[form]}
    found = {name: files for name, each in wanted.items() if (files := each.find(folder))}
    if not found:
        fail(
            f"data folder {folder}",
            expected=" or ".join(each.LOOKED_FOR for each in wanted.values()),
            got=_contents(folder),
            remedy="Give the folder that holds these, or convert the labels to one of the formats.",
        )
    if len(found) > 1:
        got = " and ".join(
            f"{FORMATS[name].NAME} ({files[0].relative_to(folder)})"
            for name, files in found.items()
        )
        remedy = f"Choose with --format {' or --format '.join(found)}."
        fail(f"data folder {folder}", expected="labels of one format", got=got, remedy=remedy)
    ((name, files),) = found.items()
    data = FORMATS[name].read(folder, files, images)
    _check_parts(data)
    return data


def _contents(folder: Path) -> str:
    """Say what lies in a folder: names of folders, and numbers of files by suffix."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [f"{path.name}/" for path in entries if path.is_dir()]
    kinds = Counter(path.suffix.lower() or "no suffix" for path in entries if path.is_file())
    files = [f"{count} x {kind}" for kind, count in kinds.most_common()]
    return ", ".join([*folders[:8], *files[:8]]) or "an empty folder"


def _check_parts(data: Found) -> None:
    """Stop where the parts have other classes, or where there is nothing to train on."""
    parts = list(data.parts.values())
    if WHOLE in data.parts and {"train", "val"} & set(data.parts):
        fail(
            f"data folder {data.folder}",
            expected="parts whose names say train or val",
            got=", ".join(str(part.source.relative_to(data.folder)) for part in parts),
            remedy="Rename the files, or name the one to use instead of the folder.",
        )
    if not {WHOLE, "train"} & set(data.parts):
        fail(
            f"data folder {data.folder}",
            expected="images to train on",
            got=f"{data.format} with {' and '.join(data.parts)} only",
            remedy="Add a part for training, or name the part's own file.",
        )
    first = _categories(parts[0])
    for part in parts[1:]:
        other = _categories(part)
        if other != first:
            place = next(key for key in (*first, *other) if first.get(key) != other.get(key))
            fail(
                f"{part.source}",
                expected=f"the categories of {parts[0].source}",
                got=f"{other.get(place)!r} with id {place} instead of {first.get(place)!r}",
                remedy="Use the same categories in both files.",
            )


def _categories(part: Part) -> dict[str, Any]:
    """Return {id as text: name}; what is no id or name is found later."""
    return {repr(each.get("id")): each.get("name") for each in part.content["categories"]}
