"""From a folder of data to the annotation files of one training, kept beside the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitdet.data.clean import clean
from vitdet.data.files import read_json
from vitdet.data.findings import KINDS, notes_on, stop_at_faults
from vitdet.data.formats import WHOLE, Found, Part, find_data
from vitdet.data.formats.parts import counted, listed
from vitdet.data.masks import read_mask
from vitdet.data.splitting import split_content
from vitdet.utils.checks import InputError, one_line
from vitdet.utils.files import RESULT_MARKER, write_text


@dataclass(frozen=True)
class Prepared:
    """What a training needs to know of its data.

    Attributes:
        train: (annotation file, image folder), absolute.
        val: likewise.
        class_names: in the order of their ids.
        masks: whether every object has a mask.
        num_images: of the training part, with objects.
        notes: lines for people: what was found, what was left out, and what was done.
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
    resume: bool = False,
    allow_changed: bool = False,
    allow_empty: bool = False,
) -> Prepared:
    """Find the data of a folder, and write in COCO's format into `cache` what is not so there.

    An annotation file that can be used as it is stays where it is. Nothing is written into the
    folder. What is in `cache` is written anew, but for a run that is resumed: it goes on with what
    it began with.

    Args:
        folder: of the data, or an annotation file, or a data.yaml.
        cache: folder for the annotation files; made when something is written.
        form: "coco", "yolo" or "voc" where the folder holds several.
        images: folder of the images, where they do not lie with the labels.
        val_fraction: of the images, where there is no validation part.
        seed: of that choice.
        resume: whether a run goes on.
        allow_changed: let it go on with data of another number of images, objects or classes.
        allow_empty: let the validation part be without objects.

    Raises:
        InputError: no data that can be read, in one line.
    """
    found = find_data(folder, form, images, splits=("train", "val"))
    notes = [_told(found), *found.notes]
    parts = {split: _checked(part, notes) for split, part in found.parts.items()}
    if folder.is_file() and len(parts) == 1:  # the user's word, whatever the name of the file
        parts = {WHOLE: next(iter(parts.values()))}
    if not {WHOLE, "train"} & set(parts):
        got = f"{found.format} with {' and '.join(parts)} only"
        more = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise InputError(
            f"data folder {found.folder}: expected images to train on, got {got}{more}. "
            "Add a part for training, or name the part's own file."
        )
    if "val" in parts:
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
    _check_objects(train, val, allow_empty)
    with_mask, objects = (sum(each) for each in zip(_count(train), _count(val), strict=True))
    masks = with_mask == objects > 0
    if with_mask and not masks:
        train, val = _without_masks(train), _without_masks(val)
        notes.append(f"{objects - with_mask} of {objects} objects have no mask: boxes only")
    earlier = _earlier(train, val, cache, allow_changed) if resume else {}
    return Prepared(
        train=_stored(train, cache, earlier),
        val=_stored(val, cache, earlier),
        class_names=_class_names(train),
        masks=masks,
        num_images=len(_with_objects(train)),
        notes=tuple(map(one_line, notes)),
    )


def prepare_part(
    folder: Path,
    cache: Path,
    *,
    images: Path | None = None,
    class_names: Sequence[str] = (),
) -> tuple[tuple[str, str], tuple[str, ...]]:
    """Find the part of a data set to evaluate on: val, else test, else all of it.

    Args:
        folder: of the data, or an annotation file, or a data.yaml.
        cache: folder for an annotation file; made when it is written.
        images: folder of the images, where they do not lie with the labels.
        class_names: of the model: where the data have some of them, they get all, in this order.

    Returns:
        (annotation file, image folder), and lines for people.

    Raises:
        InputError: no data that can be read, or without objects, in one line.
    """
    found = find_data(folder, None, images)
    notes = [_told(found), *found.notes]
    given = next(iter(found.parts)) if folder.is_file() else "train"
    split = next(each for each in ("val", "test", WHOLE, given) if each in found.parts)
    part = _with_classes(_checked(found.parts[split], notes), class_names, notes)
    _check_objects(part, part, allow_empty=False)
    notes.append(f"evaluated is {split}, of {len(part.content['images'])} images")
    return _stored(part, cache, {}), tuple(map(one_line, notes))


def _class_names(part: Part) -> tuple[str, ...]:
    """Return the names of a part's classes in the order of their ids."""
    categories = sorted(part.content["categories"], key=lambda each: each["id"])
    return tuple(each["name"] for each in categories)


def _with_classes(part: Part, names: Sequence[str], notes: list[str]) -> Part:
    """Give a part the classes of a model, where it has some of them: told by their names."""
    own = _class_names(part)
    if own == tuple(names) or not set(own) <= set(names):  # other classes: the evaluation says so
        return part
    ids = {name: number for number, name in enumerate(names, 1)}
    numbers = {each["id"]: ids[each["name"]] for each in part.content["categories"]}
    annotations = [
        {**each, "category_id": numbers[each["category_id"]]}
        for each in part.content["annotations"]
    ]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    notes.append(f"{len(own)} of the model's {len(names)} classes are in the data: told by name")
    content = {**part.content, "annotations": annotations, "categories": categories}
    return replace(part, content=content, json_file=None)


def _told(found: Found) -> str:
    counts = [
        f"{split} {counted(len(part.content['images']), 'image')} with "
        f"{counted(len(part.content['annotations']), 'object')}"
        for split, part in found.parts.items()
    ]
    names = [
        str(each.get("name")) for each in next(iter(found.parts.values())).content["categories"]
    ]
    return (
        f"found {found.format}: {', '.join(counts)}; {counted(len(names), 'class')} "
        f"({listed(names)})"
    )


def _checked(part: Part, notes: list[str]) -> Part:
    """Return a part as its labels are read, whatever they are written like.

    Raises:
        InputError: says how many faults there are, and the first.
    """
    if part.problems:
        more = counted(len(part.problems) - 1, "more fault")
        raise InputError(part.problems[0] + (f" ({more})" if len(part.problems) > 1 else ""))
    if part.json_file is None:
        seen = [each for each in part.content["annotations"] if not _is_hidden(each)]
        if hidden := len(part.content["annotations"]) - len(seen):
            notes.append(f"{part.split}: {hidden} objects are hidden by others, and left out")
        part = replace(part, content={**part.content, "annotations": seen})
    found = clean(part.content, part.images, part.source)
    stop_at_faults(part.source, found.findings)
    faults = [each for each in found.findings if KINDS[each.kind].severity == "fault"]
    notes += [f"{part.split}: {line}" for line in notes_on(faults)]
    return replace(part, content=found.content, json_file=None) if found.changed else part


def _is_hidden(annotation: dict[str, Any]) -> bool:
    """Whether others lie over an object of an image of object numbers: it has no pixel."""
    mask = annotation.get("segmentation")
    size = mask.get("size") if isinstance(mask, dict) else None
    if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
        return False
    return read_mask(mask, (size[0], size[1])).problem == "empty mask"


def _check_objects(train: Part, val: Part, allow_empty: bool) -> None:
    if not _with_objects(train):
        raise InputError(
            f"training part {train.source}: expected images with objects, got none in "
            f"{counted(len(train.content['images']), 'image')}. Add labels (vitdet data check "
            "shows what there is)."
            if train is not val
            else f"data {train.source}: expected images with objects to evaluate on, got none in "
            f"{counted(len(train.content['images']), 'image')}. Add labels."
        )
    if not _with_objects(val) and not allow_empty:
        raise InputError(
            f"validation part {val.source}: expected images with objects, got none in "
            f"{counted(len(val.content['images']), 'image')}, so that there would be no AP. "
            "Add labels, or train all the same with --allow-empty."
        )


def _with_objects(part: Part) -> set[Any]:
    """Return the ids of the images that are trained on."""
    objects = (each for each in part.content["annotations"] if not each.get("iscrowd"))
    return {each.get("image_id") for each in objects}


def _count(part: Part) -> tuple[int, int]:
    """Return how many objects have a mask, and how many there are (crowd regions left out)."""
    objects = [each for each in part.content["annotations"] if not each.get("iscrowd")]
    return sum(bool(each.get("segmentation")) for each in objects), len(objects)


def _without_masks(part: Part) -> Part:
    bare = [
        {key: value for key, value in each.items() if key != "segmentation"}
        for each in part.content["annotations"]
    ]
    return replace(part, content={**part.content, "annotations": bare}, json_file=None)


# --- files beside the run -------------------------------------------------------------------------


def _stored(part: Part, cache: Path, earlier: dict[str, Path]) -> tuple[str, str]:
    """Return annotation file and image folder; write the file where there is none."""
    path = part.json_file or earlier.get(part.split)
    if path is None:
        path = cache / f"{part.split}.json"
        cache.mkdir(parents=True, exist_ok=True)
        results = {each: str(part.source) for each in ("train", "val", "test", WHOLE)}
        write_text(cache / RESULT_MARKER, json.dumps(results) + "\n")
        write_text(path, json.dumps(part.content))
    return str(path.resolve()), str(part.images.resolve())


def _earlier(train: Part, val: Part, cache: Path, allow_changed: bool) -> dict[str, Path]:
    """Return {split: file} of the parts with which a run began; {} where they do not hold.

    Raises:
        InputError: the data have other images, objects or classes now.
    """
    files = {part.split: cache / f"{part.split}.json" for part in (train, val)}
    changes: list[str] = []
    same = True
    for part in (train, val):
        if part.json_file is not None or not files[part.split].is_file():
            files.pop(part.split)  # a run without such a file; the checkpoint tells its data
            continue
        before = read_json(files[part.split])[0]
        for key in ("images", "annotations", "categories"):
            ours, theirs = len(part.content[key]), len(before[key])
            if ours != theirs:
                changes.append(f"{part.split}: {theirs} {key}, now {ours}")
        same = same and _file_names(before) == _file_names(part.content)
    if changes and not allow_changed:
        raise InputError(
            f"data for resuming {cache.parent}: expected those with which the run began, got "
            f"{'; '.join(changes)}. Give it the same data, or go on all the same with "
            "train.allow_changed_data=true."
        )
    return files if same and not changes else {}


def _file_names(content: dict[str, Any]) -> Sequence[Any]:
    return [each["file_name"] for each in content["images"]]
