"""From a folder of data to the annotation files of one training, kept beside the run."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitdet.data.clean import clean
from vitdet.data.findings import KINDS, notes_on, stop_at_faults
from vitdet.data.formats import WHOLE, Found, Part, find_data
from vitdet.data.splitting import split_content
from vitdet.utils.checks import fail
from vitdet.utils.files import write_text
from vitdet.utils.run_lengths import compressed, mask_util

_VERSION = 2  # of what is written; a change of it makes the files anew
_NOTE = "source.json"


@dataclass(frozen=True)
class Prepared:
    """What a training needs to know of its data.

    Attributes:
        train: (annotation file, image folder).
        val: likewise.
        class_names: in the order of their ids.
        masks: whether every object has a mask.
        num_images: of the training part, with objects.
        notes: lines for people: what was found, and what was done.
    """

    train: tuple[str, str]
    val: tuple[str, str]
    class_names: tuple[str, ...]
    masks: bool
    num_images: int
    notes: tuple[str, ...]


def prepare_data(
    folder: Path,
    cache: Path,
    *,
    form: str | None = None,
    images: Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> Prepared:
    """Find the data of a folder, and write what is not there yet in COCO's format into `cache`.

    An annotation file that can be used as it is stays where it is. Nothing is written into the
    folder. What was written before is used again, unless a file of the folder or an argument
    changed since.

    Args:
        folder: of the data, or an annotation file.
        cache: folder for the annotation files; made when something is written.
        form: "coco", "yolo" or "voc" where the folder holds several.
        images: folder of the images of an annotation file.
        val_fraction: of the images, where there is no validation part.
        seed: of that choice.

    Raises:
        InputError: no data that can be read, in one line.
    """
    arguments = [_VERSION, str(folder.resolve()), form, str(images), val_fraction, seed]
    fingerprint = _fingerprint(folder, cache.parent.resolve(), arguments)
    earlier = _read_note(cache / _NOTE)
    if earlier.get("fingerprint") == fingerprint:
        return _from_json(earlier["prepared"])
    prepared = _prepare(find_data(folder, form, images), cache, val_fraction, seed)
    if earlier:
        changed = "the data changed since they were last prepared, so that was done again"
        prepared = Prepared(**{**vars(prepared), "notes": (*prepared.notes, changed)})
    cache.mkdir(parents=True, exist_ok=True)
    note = {"fingerprint": fingerprint, "prepared": vars(prepared)}
    write_text(cache / _NOTE, json.dumps(note, indent=1) + "\n")
    return prepared


def _prepare(found: Found, cache: Path, val_fraction: float, seed: int) -> Prepared:
    parts = {split: part for split, part in found.parts.items() if split != "test"}
    notes = [f"found {found.format}: {_told(found)}"]
    parts = {split: _without_hidden(part, notes) for split, part in parts.items()}
    parts = {split: _cleaned(part, notes) for split, part in parts.items()}
    if set(parts) == {"train", "val"}:
        train, val = parts["train"], parts["val"]
    else:
        (whole,) = (part for split, part in parts.items() if split in (WHOLE, "train"))
        contents = split_content(whole.content, whole.images, val_fraction, seed)
        train, val = (
            Part(split, content, whole.images, whole.source)
            for split, content in zip(("train", "val"), contents, strict=True)
        )
        counts = [len(content["images"]) for content in contents]
        notes.append(f"no validation part: {counts[1]} of {sum(counts)} images put aside for it")
    with_mask, objects = (sum(each) for each in zip(_count(train), _count(val), strict=True))
    masks = with_mask == objects > 0
    if with_mask and not masks:
        train, val = _without_masks(train), _without_masks(val)
        notes.append(f"{objects - with_mask} of {objects} objects have no mask: boxes only")
    train.content["categories"].sort(key=lambda each: each["id"])
    used = {each["category_id"] for each in train.content["annotations"]}
    unused = [each["name"] for each in train.content["categories"] if each["id"] not in used]
    if unused:
        notes.append(f"classes without an object to train on: {', '.join(unused)}")
    return Prepared(
        train=_stored(train, cache),
        val=_stored(val, cache),
        class_names=tuple(each["name"] for each in train.content["categories"]),
        masks=masks,
        num_images=_images_with_objects(train),
        notes=tuple(notes),
    )


def _cleaned(part: Part, notes: list[str]) -> Part:
    """Return the part as it is read, whatever its labels are written like; stop at faults."""
    found = clean(part.content, part.images, part.source)
    stop_at_faults(part.source, found.findings)
    faults = [each for each in found.findings if KINDS[each.kind].severity == "fault"]
    notes += [f"{part.split}: {line}" for line in notes_on(faults)]
    return part if not found.changed else replace(part, content=found.content, json_file=None)


def _told(found: Found) -> str:
    counts = [f"{split} {len(part.content['images'])}" for split, part in found.parts.items()]
    categories = next(iter(found.parts.values())).content["categories"]
    names = [str(each.get("name")) for each in categories]
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    classes = "class" if len(names) == 1 else "classes"
    return f"{', '.join(counts)} images; {len(names)} {classes} ({listed})"


def _count(part: Part) -> tuple[int, int]:
    """Return how many objects have a mask, and how many there are (crowd regions left out)."""
    objects = [each for each in part.content["annotations"] if not each.get("iscrowd")]
    return sum(bool(each.get("segmentation")) for each in objects), len(objects)


def _without_masks(part: Part) -> Part:
    bare = [
        {key: value for key, value in each.items() if key != "segmentation"}
        for each in part.content["annotations"]
    ]
    return Part(part.split, {**part.content, "annotations": bare}, part.images, part.source)


def _without_hidden(part: Part, notes: list[str]) -> Part:
    """Leave out objects without a pixel in an image of object numbers: others lie over them."""
    if part.json_file is not None:
        return part
    seen = [each for each in part.content["annotations"] if not _is_hidden(each)]
    if hidden := len(part.content["annotations"]) - len(seen):
        notes.append(f"{part.split}: {hidden} objects are hidden by others, and left out")
    return Part(part.split, {**part.content, "annotations": seen}, part.images, part.source)


def _is_hidden(annotation: dict[str, Any]) -> bool:
    mask = annotation.get("segmentation")
    return isinstance(mask, dict) and not mask_util.area(compressed(mask))


def _images_with_objects(part: Part) -> int:
    """Return the number of images that are trained on."""
    objects = (each for each in part.content["annotations"] if not each.get("iscrowd"))
    count = len({each.get("image_id") for each in objects})
    if not count:
        got = f"none in {part.source}"
        remedy = "Add labels (vitdet data check shows what there is)."
        fail("training part", expected="images with objects", got=got, remedy=remedy)
    return count


def _stored(part: Part, cache: Path) -> tuple[str, str]:
    """Return annotation file and image folder; write the file where there is none."""
    path = part.json_file
    if path is None:
        path = cache / f"{part.split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(part.content))
    return str(path.resolve()), str(part.images.resolve())


def _fingerprint(folder: Path, run: Path, arguments: list[Any]) -> str:
    """Return a digest of the names, sizes and times of all files, without reading them.

    A run inside the data folder is left out: its files change all the time.
    """
    digest = hashlib.sha256(json.dumps(arguments).encode())
    for base, folders, files in os.walk((folder.parent if folder.is_file() else folder).resolve()):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(base, name) != run
        )
        for name in sorted(files):
            status = (Path(base) / name).stat()
            digest.update(f"{base}/{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_note(path: Path) -> dict[str, Any]:
    """Return what an earlier call noted, {} where there is nothing that still holds."""
    if not path.is_file():
        return {}
    note = json.loads(path.read_text(encoding="utf-8"))
    files = (note["prepared"]["train"][0], note["prepared"]["val"][0])
    return note if all(Path(file).is_file() for file in files) else {}


def _from_json(values: dict[str, Any]) -> Prepared:
    lists = ("train", "val", "class_names", "notes")
    return Prepared(**{**values, **{key: tuple(values[key]) for key in lists}})
