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

from vitdet.data.checking import Checked
from vitdet.data.findings import BOXES, KINDS, Json
from vitdet.data.images import TURN, open_file, open_image, opened
from vitdet.data.labels import ImageFile, same_object
from vitdet.utils.checks import InputError

_LONGEST = 200  # bytes of a file name, which may be given a number too


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
    for split, each in checked.findings:
        if each.kind in BOXES:
            raise InputError(
                f"{checked.data.parts[split].source}: {KINDS[each.kind].text}, got {each.got}. Say "
                f"how they are written: --boxes {BOXES[each.kind]}, or --boxes xywh if they are "
                "x, y, width, height in pixels all the same."
            )
    partial = output.with_name(f".{output.name[:_LONGEST]}.{os.getpid()}.partial")
    try:
        (partial / "annotations").mkdir(parents=True)
        for split in checked.data.parts:
            _write_part(checked, split, partial)
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


def _write_part(checked: Checked, split: str, output: Path) -> None:
    part, files = checked.data.parts[split], checked.files[split]
    leave = {
        each.image_id
        for where, each in checked.findings
        if where == split and each.kind == "image in two parts"
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
        text = f"{part.source}: has values that are nested too deep to be written."
        raise InputError(text) from error
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


# --- image files ----------------------------------------------------------------------------------


def _names(images: list[Json], files: dict[str, ImageFile]) -> dict[Any, str]:
    """Return {image id: file name in the copy}, each once, whatever the case of its letters."""
    wanted = [(each, _wanted(each, files[each["file_name"]])) for each in images]
    taken: set[str] = set()
    folders: set[str] = set()
    names: dict[Any, str] = {}
    # those that keep their names come first
    for image, name in sorted(wanted, key=lambda pair: pair[0]["file_name"] != str(pair[1])):
        free, count = name, 0
        while _folded(free) in taken | folders or taken & set(map(_folded, free.parents)):
            count += 1
            more = f"_{image['id']}" + (f"_{count}" if count > 1 else "")
            free = name.with_name(f"{name.stem}{more}{name.suffix}")
        taken.add(_folded(free))
        folders |= set(map(_folded, free.parents))
        names[image["id"]] = str(free)
    return names


def _folded(name: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", str(name)).casefold()


def _wanted(image: Json, file: ImageFile) -> PurePosixPath:
    """Return the name that a file should have in the copy: its own, if that is right there."""
    name = PurePosixPath(image["file_name"])
    fits = all(len(os.fsencode(part)) <= _LONGEST and part.isprintable() for part in name.parts)
    if name.is_absolute() or ".." in name.parts or not fits:
        stem = "".join(c if c.isprintable() else "_" for c in name.stem)[:40]
        name = PurePosixPath(f"{image['id']}_{stem}{name.suffix[:8]}")
    if file.header is None:
        return name
    suffixes = file.header.suffixes
    if file.header.deep or (_is_turned(image, file) and ".jpg" not in suffixes):
        suffixes = [".png"]
    right = name.suffix.lower() in suffixes
    return name if right else name.with_name(f"{name.stem}{suffixes[0]}")


def _is_turned(image: Json, file: ImageFile) -> bool:
    """Whether the labels are those of the image as it is stored, and it is shown otherwise."""
    header = file.header
    return header is not None and (
        (image["height"], image["width"]) == header.stored != header.upright
    )


def _store(source: Path, target: Any, image: Json, file: ImageFile) -> None:
    """Write an image file of the copy."""
    header = file.header
    if header is not None and header.deep:
        target.write(_as_8_bits(source))
    elif header is not None and _is_turned(image, file):
        if header.format in ("JPEG", "MPO"):
            with open_file(source, f"image {source}") as original:
                target.write(_without_exif(original.read()))
        else:
            back = TURN[{6: 8, 8: 6}.get(header.orientation, header.orientation)]
            target.write(_png(open_image(source).transpose(back)))
    else:
        with open_file(source, f"image {source}") as original:
            shutil.copyfileobj(original, target, 1 << 20)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.info.pop("exif", None)
    image.save(buffer, format="PNG")
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
    return _png(Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8)))
