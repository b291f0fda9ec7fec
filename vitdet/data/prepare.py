"""From a folder of data to the annotation files of one training, kept beside the run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitdet.data.clean import clean
from vitdet.data.files import WHOLE, Found, Part, counted, is_file, listed, read_json
from vitdet.data.findings import KINDS, Json, notes_on, stop_at_faults
from vitdet.data.formats import find_data
from vitdet.utils.checks import InputError, one_line
from vitdet.utils.files import RESULT_MARKER, write_text

_COPY_OF = ".rf."  # Roboflow names augmented copies of an image NAME_jpg.rf.<number>.jpg


@dataclass(frozen=True)
class Prepared:
    """What a training needs to know of its data."""

    train: tuple[str, str]  # annotation file, image folder; absolute
    val: tuple[str, str]
    class_names: tuple[str, ...]  # in the order of their ids
    masks: bool  # whether every object has one
    num_images: int  # of the training part, with objects
    notes: tuple[str, ...]  # for people: what was found, left out and done


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

    Nothing is written into the folder. What is in `cache` is written anew, but for a run that is
    resumed: it goes on with what it began with, and with data of another number of images, objects
    or classes only if `allow_changed`. Where there is no validation part, `val_fraction` of the
    images become one. What cannot be used is an InputError of one line, as in `find_data`.
    """
    found = find_data(folder, form, images, splits=("train", "val"))
    notes = _summary(found)
    parts = {split: _checked(part, notes) for split, part in found.parts.items()}
    if folder.is_file() and len(parts) == 1:  # the user's word, whatever the name of the file
        parts = {WHOLE: next(iter(parts.values()))}
    whole = parts.get("train") or parts.get(WHOLE)
    if whole is None:
        got = f"{found.format} with {' and '.join(parts)} only ({'; '.join(found.notes)})"
        raise InputError(
            f"data folder {found.folder}: expected images to train on, got {got}. Add a part for "
            "training, or name the part's own file."
        )
    if "val" in parts:
        train, val = whole, parts["val"]
    else:
        contents = split_content(whole.content, whole.images, val_fraction, seed)
        train, val = (
            replace(whole, split=split, content=content, json_file=None)
            for split, content in zip(("train", "val"), contents, strict=True)
        )
        aside, total = len(val.content["images"]), len(whole.content["images"])
        notes.append(f"no validation part: {aside} of {total} images put aside for it")
    _need_objects(train, "training part", "Add labels (vitdet data check shows what there is).")
    if not allow_empty:
        way = "Without them there is no AP: add labels, or train all the same with --allow-empty."
        _need_objects(val, "validation part", way)
    objects = [*_objects(train), *_objects(val)]
    with_mask = sum(bool(each.get("segmentation")) for each in objects)
    if 0 < with_mask < len(objects):
        bare = len(objects) - with_mask
        notes.append(f"{bare} of {len(objects)} objects have no mask: boxes only")
    earlier = _earlier((train, val), cache, allow_changed) if resume else {}
    return Prepared(
        train=_stored(train, cache, earlier),
        val=_stored(val, cache, earlier),
        class_names=_class_names(train),
        masks=with_mask == len(objects) > 0,
        num_images=len({each["image_id"] for each in _objects(train)}),
        notes=tuple(map(one_line, notes)),
    )


def prepare_part(
    folder: Path,
    cache: Path,
    *,
    images: Path | None = None,
    class_names: Sequence[str] = (),
    split: str | None = None,
) -> tuple[tuple[str, str], tuple[str, ...]]:
    """Find the part of a data set to evaluate on: `split`, or val, else test, else all of it.

    Arguments and errors are those of `prepare_data`. Where the data have some of the classes of the
    model (`class_names`), they get all, in this order.

    Returns:
        (annotation file, image folder), and lines for people.
    """
    found = find_data(folder, None, images)
    notes = _summary(found)
    given = next(iter(found.parts)) if folder.is_file() else "train"
    split = split or next(each for each in ("val", "test", WHOLE, given) if each in found.parts)
    if split not in found.parts:
        raise InputError(f"{folder}: expected a part {split}, found {', '.join(found.parts)}.")
    part = _with_classes(_checked(found.parts[split], notes), class_names, notes)
    _need_objects(part, "data to evaluate on", "Add labels.")
    notes.append(f"evaluated is {split}, of {len(part.content['images'])} images")
    return _stored(part, cache, {}), tuple(map(one_line, notes))


def _summary(found: Found) -> list[str]:
    counts = [
        f"{split} {counted(len(part.content['images']), 'image')} with "
        f"{counted(len(part.content['annotations']), 'object')}"
        for split, part in found.parts.items()
    ]
    categories = next(iter(found.parts.values())).content["categories"]
    names = [str(each.get("name")) for each in categories]
    classes = f"{counted(len(names), 'class')} ({listed(names)})"
    return [f"found {found.format}: {', '.join(counts)}; {classes}", *found.notes]


def _checked(part: Part, notes: list[str]) -> Part:
    """Return a part as its labels are read; the first fault that stops a training is an error."""
    if part.problems:
        more = counted(len(part.problems) - 1, "more fault")
        raise InputError(part.problems[0] + (f" ({more})" if len(part.problems) > 1 else ""))
    found = clean(part.content, part.images, part.source)
    stop_at_faults(part.source, found.findings)
    faults = [each for each in found.findings if KINDS[each.kind].severity == "fault"]
    notes += [f"{part.split}: {line}" for line in notes_on(faults)]
    return _changed(part, **found.content) if found.changed else part


def _changed(part: Part, **lists: Any) -> Part:
    return replace(part, content={**part.content, **lists}, json_file=None)


def _class_names(part: Part) -> tuple[str, ...]:
    categories = sorted(part.content["categories"], key=lambda each: each["id"])
    return tuple(each["name"] for each in categories)


def _with_classes(part: Part, names: Sequence[str], notes: list[str]) -> Part:
    """Give a part the classes of a model, by their names, where it has some of them."""
    own = {each["id"]: each["name"] for each in part.content["categories"]}
    if _class_names(part) == tuple(names) or not set(own.values()) <= set(names):
        return part  # of other classes the evaluation says so
    ids = {name: number for number, name in enumerate(names, 1)}
    annotations = [
        {**each, "category_id": ids[own[each["category_id"]]]}
        for each in part.content["annotations"]
    ]
    notes.append(f"{len(own)} of the model's {len(names)} classes are in the data")
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return _changed(part, annotations=annotations, categories=categories)


def _objects(part: Part) -> list[Json]:
    return [each for each in part.content["annotations"] if not each.get("iscrowd")]


def _need_objects(part: Part, what: str, remedy: str) -> None:
    if not _objects(part):
        got = f"none in {counted(len(part.content['images']), 'image')}"
        raise InputError(f"{what} {part.source}: expected images with objects, got {got}. {remedy}")


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


def _earlier(parts: tuple[Part, Part], cache: Path, allow_changed: bool) -> dict[str, Path]:
    """Return {split: file} of the parts with which a run began; {} where they do not hold.

    Raises:
        InputError: the data have other images, objects or classes now.
    """
    pairs = [(part, cache / f"{part.split}.json") for part in parts if part.json_file is None]
    pairs = [(part, path) for part, path in pairs if path.is_file()]
    contents = [(part.split, read_json(path)[0], part.content) for part, path in pairs]
    changes = [
        f"{split}: {len(before[key])} {key}, now {len(now[key])}"
        for split, before, now in contents
        for key in ("images", "annotations", "categories")
        if len(before[key]) != len(now[key])
    ]
    if changes and not allow_changed:
        raise InputError(
            f"data for resuming {cache.parent}: expected those with which the run began, got "
            f"{'; '.join(changes)}. Give it the same data, or go on all the same with "
            "train.allow_changed_data=true."
        )
    names = [[x["file_name"] for x in each["images"]] for pair in contents for each in pair[1:]]
    same = names[::2] == names[1::2]
    return {part.split: path for part, path in pairs} if same and not changes else {}


# --- a validation part ----------------------------------------------------------------------------


def split_content(
    content: Json, images: Path, fraction: float = 0.1, seed: int = 0
) -> tuple[Json, Json]:
    """Cut a cleaned content in two at random, by image; return the larger and the smaller part.

    Images of the same bytes, and augmented copies of one image by Roboflow's names, stay together.
    A class that two or more such groups have is in both parts, where that is possible, so many rare
    classes make the smaller part larger than `fraction`. The same seed gives the same parts.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--val-fraction: expected a number between 0 and 1, got {fraction}.")
    groups = _groups(content["images"], images)
    if len(groups) < 2:
        raise InputError(
            "data without a validation part: expected two or more different images to split, got "
            f"{len(groups)} among {len(content['images'])}. Add images."
        )
    np.random.default_rng(seed).shuffle(groups)
    of_image: dict[int, set[int]] = defaultdict(set)
    for each in content["annotations"]:
        of_image[each["image_id"]].add(each["category_id"])
    classes = [set().union(*(of_image[number] for number in group)) for group in groups]
    left, taken = Counter(label for group in classes for label in group), set()
    second: set[int] = set()
    target = max(1, round(fraction * len(content["images"])))
    for rare in (True, False):  # first what has a class that the part lacks, then up to its size
        for group, labels in zip(groups, classes, strict=True):
            wanted = labels - taken if rare else len(second) < target
            last = any(left[label] == 1 for label in labels)  # of a class, in the larger part
            last = last or len(second) + len(group) == len(content["images"])
            if wanted and not last and second.isdisjoint(group):
                second.update(group)
                taken |= labels
                left.subtract(labels)
    # where every image has a class of its own, one of them has to go all the same
    second = second or set(min(zip(map(len, classes), groups, strict=True))[1])

    def part(in_second: bool) -> Json:
        keys = {"images": "id", "annotations": "image_id"}
        lists = {
            name: [each for each in content[name] if (each[key] in second) is in_second]
            for name, key in keys.items()
        }
        return {**content, **lists}

    return part(False), part(True)


def _groups(entries: Sequence[Json], images: Path) -> list[list[int]]:
    """Return the ids of images that must not be parted, in the order of the file."""
    paths = [images / each["file_name"] for each in entries]
    sizes = {path: path.stat().st_size for path in paths if is_file(path)}
    count = Counter(sizes.values())
    equal = [path for path, size in sizes.items() if count[size] > 1]
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in equal}
    groups: dict[str, list[int]] = defaultdict(list)
    first: dict[bytes, str] = {}  # name of the first image of the same bytes
    for each, path in zip(entries, paths, strict=True):
        name = each["file_name"].partition(_COPY_OF)[0]
        same = first.setdefault(digests[path], name) if path in digests else name
        groups[same].append(each["id"])
    return list(groups.values())
