"""Which format the data in a folder have, and what their parts have in common."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from vitdet.data.files import Listing, exists, home, is_link, kind_of, list_files, read_bytes
from vitdet.data.formats import coco, voc, yolo
from vitdet.data.formats.parts import SPLITS, WHOLE, Found, counted, listed, real_files
from vitdet.data.formats.xml import is_voc
from vitdet.utils.checks import InputError

FORMATS = {"coco": coco, "yolo": yolo, "voc": voc}
_MAX_LOOKED_AT = 20  # files of other tools, to name the tool

# Labels of other tools by keys of their json, and the way out.
_TOOLS = (
    ((b'"shapes"', b'"imagePath"'), "labelme", "convert it by labelme's labelme2coco.py"),
    ((b'"objects"', b'"tags"'), "Supervisely", "export it as COCO"),
    ((b'"classTitle"', b'"points"'), "Supervisely", "export it as COCO"),
    ((b'"shape_attributes"',), "VGG Image Annotator", "export it as COCO"),
    ((b'"coordinates"', b'"annotation'), "CreateML", "export it as COCO"),
    ((b'"result"', b'"from_name"'), "Label Studio", "export it as COCO"),
    ((b'"box2d"',), "BDD100K (Scalabel)", "convert it by bdd100k.label.to_coco"),
    ((b'"items"', b'"media_type"'), "Datumaro", "convert it by `datum convert -f coco`"),
    ((b'"score"', b'"image_id"'), "results of a detector", "give the annotations"),
    ((b'"label"', b'"box"'), "another tool", "convert it to COCO's format"),
)
_OTHER_SUFFIXES = {
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"), "unpack the archive"),
    **dict.fromkeys((".tfrecord", ".record"), "convert the TFRecords to COCO's format"),
    **dict.fromkeys((".parquet", ".arrow"), "export the table to COCO's format"),
    **dict.fromkeys((".csv", ".tsv", ".mat"), "convert the table to COCO's format"),
}


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
        InputError: one line that says what was looked for and what was found.
    """
    folder = _opened(folder, "data")
    images = None if images is None else _opened(images, "--images")
    if images is not None and not images.is_dir():
        raise InputError(f"--images {images}: expected a folder, got a file. Give its folder.")
    if not folder.is_dir():
        found = _read_file(folder, form, images, splits)
    else:
        listing = list_files(folder)
        name, files = _format(listing, form)
        found = FORMATS[name].read(listing, files, images, splits)
    _check_parts(found)
    parts = {split: found.parts[split] for split in (WHOLE, *SPLITS) if split in found.parts}
    found = replace(found, parts=parts)
    return replace(found, notes=(*dict.fromkeys(found.notes), *_common(found)))


def _opened(path: Path, what: str) -> Path:
    """Return a path as it is meant: ~ and file:// are understood.

    Raises:
        InputError: nothing is there.
    """
    text = str(path)
    if re.match(r"file:/", text):
        text = unquote(re.sub(r"^file:/+", "/", text))
    found = home(text)
    if exists(found):
        return found
    remedy = "Check the path."
    if re.match(r"[a-z0-9+]+:/", text):
        remedy = "Download it first, and give the folder."
    elif text.strip() != text and exists(Path(text.strip())):
        remedy = f"Did you mean {text.strip()!r}, without the blank?"
    elif exists(Path(text.replace("\\", "/"))):
        remedy = f"Did you mean {text.replace(chr(92), '/')!r}?"
    got = "a link that leads nowhere" if is_link(found) else "nothing at this path"
    raise InputError(f"{what}: expected a folder {found}, got {got}. {remedy}")


def _read_file(path: Path, form: str | None, images: Path | None, splits: Collection[str]) -> Found:
    if path.suffix.lower() in (".yaml", ".yml") and form in (None, "yolo"):
        return yolo.read(Listing(path.parent), [path], images, splits)
    data = read_bytes(path)
    kind = kind_of(data)
    begin = data[:2000].strip(b"\xff\xfe\xef\xbb\xbf\x00 \r\n\t")[:1]
    if kind is not None or begin not in (b"{", b"["):
        raise InputError(
            f"data {path}: expected a folder, a json in COCO's format or a data.yaml, got "
            f"{kind or 'another file'}. Give the folder of the data."
        )
    return coco.read_file(path, images)


def _format(listing: Listing, form: str | None) -> tuple[str, list[Path]]:
    """Return the format of a folder, and the files that tell it."""
    folder = listing.folder
    wanted = FORMATS if form is None else {form: FORMATS[form]}
    found = {name: files for name, each in wanted.items() if (files := each.find(listing))}
    if not found:
        expected = " or ".join(each.LOOKED_FOR for each in wanted.values())
        hints = [f"{hint[0].upper()}{hint[1:]}." for hint in dict.fromkeys(_hints(listing))]
        raise InputError(
            f"data folder {folder}: expected {expected}, got {_contents(folder)}. "
            + (" ".join(hints[:3]) or "Give the folder that holds these, or convert the labels to")
            + ("" if hints else " one of the formats.")
        )
    if len(found) > 1:
        got = " and ".join(
            f"{FORMATS[name].NAME} ({files[0].relative_to(folder)})"
            for name, files in found.items()
        )
        raise InputError(
            f"data folder {folder}: expected labels of one format, got {got}. "
            f"Choose with --format {' or --format '.join(found)}."
        )
    return next(iter(found.items()))


def _contents(folder: Path) -> str:
    """Say what lies in a folder: names of folders, and numbers of files by suffix."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [f"{path.name}/" for path in entries if path.is_dir()]
    kinds = Counter(path.suffix.lower() or "no suffix" for path in entries if not path.is_dir())
    files = [f"{count} x {kind}" for kind, count in kinds.most_common()]
    return ", ".join([*folders[:8], *files[:8]]) or "an empty folder"


def _hints(listing: Listing) -> Iterator[str]:
    """Yield what labels there are instead, and what to do with them."""
    folder = listing.folder
    for path in listing.of(".yaml", ".yml"):
        if path.parent != folder and path.stem.lower() in ("data", "dataset"):
            yield f"there is {path.relative_to(folder)}: give {path.parent}"
    tools: Counter[str] = Counter(map(_tool, listing.of(".json")[:_MAX_LOOKED_AT]))
    yield from (text for text, _ in tools.most_common() if text)
    for path in listing.of(".xml")[:1]:
        if not is_voc(path):
            yield f"{path.relative_to(folder)} is no xml of Pascal VOC: export it as COCO"
    texts = Counter(path.parent for path in listing.of(".txt"))
    for place, count in texts.most_common(1):
        inside = place.relative_to(folder)
        yield (
            f"there are {count} x .txt in {inside}/, and no names of classes: write a classes.txt, "
            "one name a line, or a data.yaml"
        )
    suffixes = Counter(path.suffix.lower() for path in listing.files)
    for suffix, remedy in _OTHER_SUFFIXES.items():
        if suffixes[suffix]:
            yield f"there is {suffixes[suffix]} x {suffix}: {remedy}"


def _tool(path: Path) -> str:
    """Say which tool a json is of, "" where that is not known."""
    data = read_bytes(path)
    if (kind := kind_of(data)) is not None:
        return f"{path.name} is {kind}"
    found = (each for each in _TOOLS if all(key in data for key in each[0]))
    return next((f"the json files are of {tool}: {remedy}" for _, tool, remedy in found), "")


# --- what the parts have in common ----------------------------------------------------------------


def _check_parts(data: Found) -> None:
    if WHOLE in data.parts and {"train", "val"} & set(data.parts):
        sources = ", ".join(
            os.path.relpath(part.source, data.folder) for part in data.parts.values()
        )
        raise InputError(
            f"data folder {data.folder}: expected parts whose names say train or val, got "
            f"{sources}. Rename the files, or name the one to use instead of the folder."
        )


def _common(data: Found) -> Iterator[str]:
    """Yield lines on classes without objects, and on images of two parts."""
    counts = {
        split: Counter(repr(each.get("category_id")) for each in part.content["annotations"])
        for split, part in data.parts.items()
    }
    first = next(iter(data.parts.values()))
    names = {repr(each.get("id")): str(each.get("name")) for each in first.content["categories"]}
    bare = [name for key, name in names.items() if not any(each[key] for each in counts.values())]
    if bare and len(bare) < len(names):
        yield f"{counted(len(bare), 'class')} without any object: {listed(bare)}"
    if "train" in counts and "val" in counts:
        untrained = [names[k] for k in names if counts["val"][k] and not counts["train"][k]]
        if untrained:
            yield f"only val has objects of {listed(untrained)}: nothing is learnt of them"
        ours, theirs = (set(real_files(data.parts[split])) for split in ("train", "val"))
        if both := len(ours & theirs):
            yield f"{counted(both, 'image')} of val are in train, too: their AP says little"
