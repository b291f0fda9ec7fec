"""One pass over a COCO content: check, refusal and repair.

A training, `vitdet data check` and its `--fix` take the same pass. A training stops at the kinds
of `vitdet.data.findings` that have `stops`, or leaves them out; the check prints all; `--fix`
writes the result, with the images, into a new folder. The original is only ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from vitdet.data.files import Found
from vitdet.data.findings import BOXES, KINDS, Cleaned, Finding, Json, check_lists
from vitdet.data.images import TURN, ImageError, header_of, open_file, open_image, opened
from vitdet.data.labels import (
    Boxes,
    Classes,
    ImageFile,
    Images,
    Labels,
    Style,
    file_name,
    same_object,
    where,
)
from vitdet.utils.checks import InputError

_LONG = 32  # times as long as high, or higher
_LONGEST_NAME = 200  # bytes of a file name, which may be given a number too


def clean(
    content: Json,
    images: Path,
    source: Path,
    *,
    style: Style = "coco",
    boxes: Boxes = "ask",
    files: Mapping[str, ImageFile] | None = None,
) -> Cleaned:
    """Read the lists of a COCO content; say and mend what is wrong with them.

    What can be understood is kept, however it is written. An object without a box has that of its
    mask. What has neither, or is of no image or class in the file, is left out.

    Args:
        content: {"images", "annotations", "categories"}, lists of objects; not changed.
        images: the folder that file names are relative to.
        source: where the content comes from, for messages.
        style: "lvis" where file names are in `coco_url`.
        boxes: how they are written; "ask": x, y, width, height, unless they look otherwise.
        files: {file name: what its file is}, for a closer look at everything; None opens only files
            of images without a size, and leaves alone what a training does not stop at.

    Raises:
        InputError: what is no COCO content at all.
    """
    check_lists(content, source)
    log = Cleaned(content)
    try:
        classes = Classes(content["categories"], log)
        found = Images(content["images"], images, style, files, log)
    except InputError as error:
        raise InputError(f"annotation file {source}, {error}") from error
    labels = Labels(found, classes, log, boxes=boxes, closer=files is not None)
    annotations = labels.read(content["annotations"])
    if log.changed:
        images_kept = [image for image, _ in found.kept.values()]
        lists = {"images": images_kept, "categories": classes.kept, "annotations": annotations}
        log.content = {**content, **lists}
    return log


# --- the check of a whole data set: labels, image files, and one part against another -------------


@dataclass(frozen=True)
class Checked:
    """A data set and what was found in it."""

    data: Found
    findings: list[Finding]
    cleaned: dict[str, Cleaned] = field(repr=False)  # {part: the result of the pass}
    files: dict[str, dict[str, ImageFile]] = field(repr=False)  # {part: {file name: what it is}}

    @property
    def faults(self) -> list[Finding]:
        """The findings that are faults."""
        return [each for each in self.findings if KINDS[each.kind].severity == "fault"]


def check_data(
    data: Found, progress: Callable[[int, int], None] | None = None, *, boxes: Boxes = "ask"
) -> Checked:
    """Look at every label and every image file of a data set.

    `progress` is called with (files seen, files) after each; `boxes` are those of `clean`.
    """
    checked = Checked(data, [], {}, defaultdict(dict))
    total = sum(len(part.content["images"]) for part in data.parts.values())
    seen = 0
    for split, part in data.parts.items():
        files = checked.files[split]
        for name in map(file_name, part.content["images"]):
            files[name] = files.get(name) or _look_at(part.images / name)
            seen += 1
            if progress is not None:
                progress(seen, total)
        found = clean(part.content, part.images, part.source, boxes=boxes, files=files)
        checked.cleaned[split] = found
        known = {each.got for each in found.findings}
        others = [
            Finding("unreadable labels", split, text, "left out", lost=1)
            for text in part.problems
            if text.rstrip(".") not in known
        ]
        every = (*found.findings, *others, *_of_images(found.content, files))
        checked.findings.extend(each._replace(split=split) for each in every)
    for first, second in combinations(data.parts, 2):
        checked.findings.extend(_in_both(checked, first, second))
    return checked


def _look_at(path: Path) -> ImageFile:
    """Decode a file to its end and say what it is."""
    digest = ""
    try:
        with open_file(path, f"image {path}") as file:
            data = file.read()
        digest = hashlib.sha256(data).hexdigest()
        with opened(data, str(path), deep=True) as image:
            header = header_of(image)
            if header.format in ("JPEG", "MPO"):
                image.draft("L", (64, 64))  # every byte is read, and far fewer pixels are computed
            image.load()
        return ImageFile(header, digest=digest)
    except ImageError as error:
        return ImageFile(error=error, digest=digest)
    except OSError as error:  # the disk's
        text = f"image {path}: {error.strerror}."
        return ImageFile(error=ImageError(text, "unreadable file"))


def _of_images(content: Json, files: dict[str, ImageFile]) -> Iterator[Finding]:
    """Yield what is to be said of the images of a part."""
    with_objects = {each["image_id"] for each in content["annotations"]}
    first: dict[str, str] = {}
    for image in content["images"]:
        number, name = image["id"], image["file_name"]
        place, file = where(number, name), files[name]
        if number not in with_objects:
            yield Finding("image without annotations", place, "none", image_id=number)
        twin = first.setdefault(file.digest or name, place)
        if twin != place:
            yield Finding("same image twice", place, f"also {twin}", f"joined with {twin}", number)
        for kind, got, done in _of_file(image, file):
            yield Finding(kind, place, got, done, number)


def _of_file(image: Json, file: ImageFile) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, what is there, what a repair makes of it) of one file."""
    sides, header = (image["height"], image["width"]), file.header
    if max(sides) > _LONG * min(sides):
        yield "elongated image", f"{sides[0]} x {sides[1]} (height x width)", ""
    if header is None:
        return
    if header.orientation != 1 and (sides == header.upright or sides != header.stored):
        yield "turned by EXIF", f"stored {header.stored[0]} x {header.stored[1]}", ""
    if header.deep:
        yield "more than 8 bits", f"Pillow's mode {header.mode}", "scaled to 8 bits"


def _in_both(checked: Checked, first: str, second: str) -> Iterator[Finding]:
    """Yield images of one part that are in another too."""
    contents = {split: checked.cleaned[split].content for split in (first, second)}
    objects = Counter(each["image_id"] for each in contents[first]["annotations"])
    names = [each["file_name"] for each in contents[second]["images"]]
    theirs = {checked.files[second][name].digest: name for name in names}
    for image in contents[first]["images"]:
        number, name = image["id"], image["file_name"]
        if other := theirs.get(checked.files[first][name].digest):
            got, done = f"the bytes of {other} of {second}", f"leaves {first} with its objects"
            kind, lost = "image in two parts", objects[number]
            place = where(number, name)
            yield Finding(kind, place, got, done, number, lost=lost, split=first)


# --- a repaired copy ------------------------------------------------------------------------------


def write_repaired(checked: Checked, output: Path) -> Counter[str]:
    """Write a repaired copy: annotations/instances_SPLIT.json and the images in SPLIT/.

    The folder appears when it is complete; repairs.json in it lists what was done. Everything in it
    is a new file: a link to an original could be written through, by whatever opens it later.

    Returns:
        {kind: how many objects, or for masks masks, the copy has lost by it}.

    Raises:
        InputError: a folder that is not new or empty and apart from the data, or boxes of which it
            is not known how they are written.
    """
    check_output(checked.data, output)
    for each in checked.findings:
        if each.kind in BOXES:
            source, text = checked.data.parts[each.split].source, KINDS[each.kind].text
            raise InputError(
                f"{source}: {text}, got {each.got}. Say how they are written: --boxes "
                f"{BOXES[each.kind]}, or --boxes xywh if they are in pixels all the same."
            )
    partial = output.with_name(f".{output.name[:_LONGEST_NAME]}.{os.getpid()}.partial")
    try:
        (partial / "annotations").mkdir(parents=True)
        for split in checked.data.parts:
            _write_part(checked, split, partial)
        done = [
            {key: getattr(each, key) for key in ("kind", "split", "where", "done")}
            for each in checked.findings
            if each.done
        ]
        text = json.dumps(done, indent=1) + "\n"
        (partial / "repairs.json").write_text(text, encoding="utf-8")
        if output.is_dir():
            output.rmdir()  # it is empty
        partial.rename(output)
    except OSError as error:  # nothing of it stays
        raise InputError(
            f"--fix {output}: could not be written ({error.strerror}). Look at its disk, and at "
            "the files of the data."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    lost = Counter[str]()
    for each in checked.findings:
        lost[each.kind] += each.lost
    return +lost


def check_output(data: Found, output: Path) -> None:
    """Raise an InputError where writing to `output` could touch the data, or what is there."""
    target = output.resolve()
    for folder in (data.folder, *(part.images for part in data.parts.values())):
        place = folder.resolve()
        if target == place or place in target.parents or target in place.parents:
            shares = "is" if target == place else "shares files with"
            raise InputError(
                f"--fix {output}: expected a folder apart from the data, got one that {shares} "
                f"{place}. The original is never changed: choose a folder outside of it."
            )
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise InputError(f"--fix {output}: expected a new folder, got one with content.")


def _write_part(checked: Checked, split: str, output: Path) -> None:
    part, files = checked.data.parts[split], checked.files[split]
    leave = {
        each.image_id
        for each in checked.findings
        if each.split == split and each.kind == "image in two parts"
    }
    content = _joined(checked.cleaned[split].content, files, leave)
    names = _names(content["images"], files)
    for image in content["images"]:
        name, image["file_name"] = image["file_name"], names[image["id"]]
        target = output / split / image["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:  # never one that is there
            _store(part.images / name, file, image, files[name])
    try:
        text = json.dumps(content)
    except RecursionError as error:
        raise InputError(f"{part.source}: has values that are nested too deep.") from error
    path = output / "annotations" / f"instances_{split}.json"
    path.write_text(text, encoding="utf-8")


def _joined(content: Json, files: dict[str, ImageFile], leave: set[Any]) -> Json:
    """Return a copy of a content, entries of one image made one, without the images that leave."""
    first: dict[Any, Any] = {}
    ids: dict[Any, Any] = {}
    images = []
    for image in content["images"]:
        name = image["file_name"]
        same = (files[name].digest or name, image["height"], image["width"])
        ids[image["id"]] = first.setdefault(same, image["id"])
        if ids[image["id"]] == image["id"] and image["id"] not in leave:
            images.append(dict(image))
    objects: dict[str, Json] = {}
    for each in content["annotations"]:
        annotation = {**each, "image_id": ids[each["image_id"]]}
        if annotation["image_id"] not in leave:
            objects.setdefault(same_object(annotation), annotation)
    return {**content, "images": images, "annotations": list(objects.values())}


def _names(images: list[Json], files: dict[str, ImageFile]) -> dict[Any, str]:
    """Return {image id: file name in the copy}, each once, whatever the case of its letters."""
    wanted = [(each, _wanted(each, files[each["file_name"]])) for each in images]
    wanted.sort(key=lambda pair: pair[0]["file_name"] != str(pair[1]))  # who keep theirs come first
    taken: dict[str, Any] = {}
    for image, name in wanted:
        free = name
        while _folded(free) in taken:
            free = free.with_name(f"{image['id']}_{free.name}")
        taken[_folded(free)] = (image["id"], str(free))
    return dict(taken.values())


def _folded(name: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", str(name)).casefold()


def _wanted(image: Json, file: ImageFile) -> PurePosixPath:
    """Return the name that a file should have in the copy: its own, if that is right there."""
    name = PurePosixPath(image["file_name"])
    fits = all(
        len(os.fsencode(part)) <= _LONGEST_NAME and part.isprintable() for part in name.parts
    )
    if name.is_absolute() or ".." in name.parts or not fits:
        name = PurePosixPath(f"{image['id']}{name.suffix[:8]}")
    made = file.header is not None and (file.header.deep or _is_turned(image, file))
    return name.with_suffix(".png") if made else name


def _is_turned(image: Json, file: ImageFile) -> bool:
    """Whether the labels are those of the image as it is stored, and it is shown otherwise."""
    size, header = (image["height"], image["width"]), file.header
    return header is not None and size == header.stored != header.upright


def _store(source: Path, target: Any, image: Json, file: ImageFile) -> None:
    """Write an image file of the copy: as it is, or as PNG where its pixels are others."""
    made = None
    if file.header is not None and file.header.deep:  # its own range fills 0 to 255
        with opened(source, deep=True) as grey:
            values = np.nan_to_num(np.asarray(grey, dtype=np.float64))
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255 / (high - low) if high > low else 0)
        made = Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))
    elif file.header is not None and _is_turned(image, file):
        turn = file.header.orientation
        made = open_image(source).transpose(TURN[{6: 8, 8: 6}.get(turn, turn)])
    if made is not None:
        made.info.pop("exif", None)
        made.save(target, format="PNG")
        return
    with open_file(source, f"image {source}") as original:
        shutil.copyfileobj(original, target, 1 << 20)
