"""Writes a repaired copy of a data set, in COCO's format; the original is only ever read.

Everything in the copy is a new file: a link to an original could be written through, by whatever
opens the copy later.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from vitdet.data.checking import Checked, Picture
from vitdet.data.findings import KINDS, Json
from vitdet.data.images import TURN, header_of, open_file, opened, suffixes_of
from vitdet.utils.checks import InputError

_LONGEST = 200  # bytes of a file name, which may be given a number too
_ANSWERS = {"corner boxes": "corners", "fraction boxes": "fractions"}


def write_repaired(checked: Checked, output: Path) -> Counter[str]:
    """Write a repaired copy: annotations/instances_SPLIT.json and the images in SPLIT/.

    The folder appears when it is complete. repairs.json in it lists what was done.

    Args:
        checked: a data set and its findings.
        output: a folder that is not there yet, or is empty, outside the data set.

    Returns:
        {kind: how many objects, or for masks masks, the copy has lost by it}.

    Raises:
        InputError: a folder that cannot be used, or boxes of which it is not known how they are
            written.
    """
    check_output(checked.data.folder, [part.images for part in checked.data.parts.values()], output)
    _ask(checked)
    partial = output.with_name(f".{output.name[:_LONGEST]}.{os.getpid()}.partial")
    try:
        (partial / "annotations").mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"--fix {output}: the folder cannot be made ({error.strerror}). Choose another place."
        ) from error
    try:
        for split, part in checked.data.parts.items():
            findings = [each for part_, each in checked.findings if part_ == split]
            pictures = checked.pictures[split]
            dropped = {each.image_id for each in findings if each.kind == "image in two parts"}
            content = _joined(checked.cleaned[split].content, pictures, dropped)
            names = _Names(content["images"], pictures)
            for image in content["images"]:
                source, picture = part.images / image["file_name"], pictures[image["file_name"]]
                image["file_name"] = names.of[image["id"]]
                _store(source, partial / split / image["file_name"], image, picture)
            path = partial / "annotations" / f"instances_{split}.json"
            path.write_text(_json(content, part.source), encoding="utf-8")
        done = [
            {"kind": each.kind, "split": split, "where": each.where, "done": each.done}
            for split, each in checked.findings
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
    for _, each in checked.findings:
        lost[each.kind] += each.lost
    return +lost


def check_output(folder: Path, images: Iterable[Path], output: Path) -> None:
    """Stop where writing to `output` could touch the data.

    Raises:
        InputError: it holds something, or lies in the data, or the data lie in it.
    """
    target = output.resolve()
    for place in (folder.resolve(), *(each.resolve() for each in images)):
        if target == place or place in target.parents or target in place.parents:
            shares = "is" if target == place else "shares files with"
            raise InputError(
                f"--fix {output}: expected a folder apart from the data, got one that {shares} "
                f"{place}. The original is never changed: choose a folder outside of it."
            )
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise InputError(
            f"--fix {output}: expected a new folder, got one with content. Choose another one, or "
            "remove it."
        )


def _ask(checked: Checked) -> None:
    for split, each in checked.findings:
        if each.kind in _ANSWERS:
            raise InputError(
                f"{checked.data.parts[split].source}: {KINDS[each.kind].text}, got {each.got}. Say "
                f"how they are written: --boxes {_ANSWERS[each.kind]}, or --boxes xywh if they are "
                "x, y, width, height in pixels all the same."
            )


def _json(content: Json, source: Path) -> str:
    try:
        return json.dumps(content)
    except RecursionError as error:
        raise InputError(f"{source}: has values that are nested too deep to be written.") from error


def _joined(content: Json, pictures: dict[str, Picture], dropped: set[Any]) -> Json:
    """Return a copy of a content, entries of one image made one, without the images that leave."""
    first: dict[Any, Any] = {}
    ids: dict[Any, Any] = {}
    images = []
    for image in content["images"]:
        picture = pictures[image["file_name"]]
        same = (picture.digest or image["file_name"], image["height"], image["width"])
        ids[image["id"]] = first.setdefault(same, image["id"])
        if ids[image["id"]] == image["id"] and image["id"] not in dropped:
            images.append(dict(image))
    seen: set[str] = set()
    annotations = []
    for given in content["annotations"]:
        annotation = given
        if ids[given["image_id"]] != given["image_id"]:
            annotation = {**given, "image_id": ids[given["image_id"]]}
        keys = ("image_id", "category_id", "bbox", "segmentation", "iscrowd")
        same = json.dumps([annotation.get(key) or 0 for key in keys])
        if annotation["image_id"] not in dropped and same not in seen:
            annotations.append(annotation)
        seen.add(same)
    return {**content, "images": images, "annotations": annotations}


# --- image files ----------------------------------------------------------------------------------


class _Names:
    """File names in the copy, each once, whatever the case of its letters.

    Attributes:
        of: {image id: name, relative to the part's folder}.
    """

    def __init__(self, images: list[Json], pictures: dict[str, Picture]) -> None:
        self._taken: set[str] = set()
        self._folders: set[str] = set()
        self.of: dict[Any, str] = {}
        wanted = [(each, _wanted(each, pictures[each["file_name"]])) for each in images]
        # those that keep their names come first
        for image, name in sorted(wanted, key=lambda pair: pair[0]["file_name"] != str(pair[1])):
            self.of[image["id"]] = self._free(name, image["id"])

    def _free(self, name: PurePosixPath, number: Any) -> str:
        free, count = name, 0
        while not self._is_free(free):
            count += 1
            more = f"_{number}" + (f"_{count}" if count > 1 else "")
            free = name.with_name(f"{name.stem}{more}{name.suffix}")
        self._taken.add(_folded(free))
        self._folders |= {_folded(each) for each in free.parents}
        return str(free)

    def _is_free(self, name: PurePosixPath) -> bool:
        """Whether no file has this name, nor that of a folder above it, nor a folder this name."""
        key = _folded(name)
        above = {_folded(each) for each in name.parents}
        used = key in self._taken or key in self._folders
        return not used and not above & self._taken


def _folded(name: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", str(name)).casefold()


def _wanted(image: Json, picture: Picture) -> PurePosixPath:
    """Return the name that a file should have in the copy: its own, if that is right there."""
    name = PurePosixPath(image["file_name"])
    fits = all(len(os.fsencode(part)) <= _LONGEST and part.isprintable() for part in name.parts)
    if name.is_absolute() or ".." in name.parts or not fits:
        stem = "".join(c if c.isprintable() else "_" for c in name.stem)[:40]
        name = PurePosixPath(f"{image['id']}_{stem}{name.suffix[:8]}")
    if picture.error is not None:
        return name
    if picture.deep or (_is_turned(image, picture) and picture.format not in ("JPEG", "MPO")):
        return name.with_name(f"{name.stem}.png")
    if picture.has_suffix(name.name):
        return name
    return name.with_name(f"{name.stem}{suffixes_of(picture.format)[0]}")


def _is_turned(image: Json, picture: Picture) -> bool:
    """Whether the labels are those of the image as it is stored, and it is shown otherwise."""
    return (image["height"], image["width"]) == picture.stored != picture.upright


def _store(source: Path, target: Path, image: Json, picture: Picture) -> None:
    """Write an image file of the copy, which is never one that is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        if picture.deep:
            file.write(_as_8_bits(source))
        elif _is_turned(image, picture):
            file.write(_without_rotation(source))
        else:
            with open_file(source, f"image {source}") as original:
                shutil.copyfileobj(original, file, 1 << 20)


def _without_rotation(path: Path) -> bytes:
    """Return a file with the pixels as they are stored, and nothing that asks to turn them."""
    with opened(path, deep=True) as image:
        orientation = header_of(image).orientation
        if image.format in ("JPEG", "MPO"):
            with open_file(path, f"image {path}") as file:
                return _without_exif(file.read())
        image.load()
        back = {6: 8, 8: 6}.get(orientation, orientation)
        turned = image.format == "TIFF"  # by Pillow
        stored = image.transpose(TURN[back]) if turned else image
        stored.info.pop("exif", None)
        buffer = io.BytesIO()
        stored.save(buffer, format="PNG", exif=b"")
    return buffer.getvalue()


def _without_exif(data: bytes) -> bytes:
    """Return a JPEG without the segments that may ask to turn it; its pixels stay as they are."""
    kept, place = [data[:2]], 2
    while data[place : place + 1] == b"\xff" and data[place + 1] != 0xDA:  # up to the first scan
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        fill = data[place + 1] == 0xFF
        segment = data[place : place + (1 if fill else 2 + length)]
        if not segment[4:].startswith((b"Exif\0", b"http://ns.adobe.com/xap/", b"MPF\0")):
            kept.append(segment)
        place += len(segment)
    return b"".join(kept) + data[place:]


def _as_8_bits(path: Path) -> bytes:
    """Scale grey values so that the image's own range fills 0 to 255."""
    with opened(path, deep=True) as image:
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255 / (high - low) if high > low else 0)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
