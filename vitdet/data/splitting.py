"""A validation part for data that have none: by image, roughly by class, copies kept together."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitdet.utils.checks import fail

Json = dict[str, Any]
_COPY_OF = ".rf."  # Roboflow names augmented copies of an image NAME_jpg.rf.<number>.jpg


def split_content(
    content: Json, images: Path, fraction: float = 0.1, seed: int = 0
) -> tuple[Json, Json]:
    """Cut a data set in two.

    Images of the same bytes, and augmented copies of one image by Roboflow's names, stay together.
    A class that two or more such groups have is in both parts, where that is possible; beyond this
    the smaller part has the fraction of every class, as far as whole images allow.

    Args:
        content: in COCO's format.
        images: the folder that file names are relative to.
        fraction: of the images that go into the second part, between 0 and 1.
        seed: of the choice; the same seed gives the same parts.

    Returns:
        Two contents with the same categories, of the larger and of the smaller part.

    Raises:
        InputError: a fraction out of range, or fewer than two different images.
    """
    if not 0 < fraction < 1:
        remedy = "0.1 puts a tenth of the images aside."
        fail("--val-fraction", expected="a number between 0 and 1", got=fraction, remedy=remedy)
    groups = _groups(content["images"], images)
    if len(groups) < 2:
        fail(
            "data without a validation part",
            expected="two or more different images to split",
            got=f"{len(groups)} among {len(content['images'])}",
            remedy="Add images.",
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    groups = [groups[place] for place in order]
    classes: dict[Any, set[Any]] = defaultdict(set)
    for annotation in content["annotations"]:
        number, label = annotation.get("image_id"), annotation.get("category_id")
        if isinstance(number, int) and isinstance(label, int):  # else an error, later
            classes[number].add(label)
    of_groups = [set().union(*(classes[number] for number in group)) for group in groups]
    chosen = _choose(of_groups, [len(group) for group in groups], fraction)
    second = {number for place in chosen for number in groups[place]}
    everything = {image["id"] for image in content["images"]}
    return _part(content, everything - second), _part(content, second)


def _part(content: Json, numbers: set[int]) -> Json:
    return {
        **content,
        "images": [each for each in content["images"] if each["id"] in numbers],
        "annotations": [each for each in content["annotations"] if _of(each, numbers)],
    }


def _of(annotation: Json, numbers: set[int]) -> bool:
    number = annotation.get("image_id")
    return isinstance(number, int) and number in numbers


def _choose(of_groups: Sequence[set[Any]], sizes: Sequence[int], fraction: float) -> set[int]:
    """Return the places of the groups that go into the smaller part.

    Rare classes choose first: what a common class then still lacks is easily found. A group is not
    taken where the larger part would lose one of its classes.
    """
    totals = Counter(each for classes in of_groups for each in classes)
    left, taken, chosen = Counter(totals), Counter(), set()

    def take(place: int) -> None:
        if place in chosen or any(left[each] == 1 for each in of_groups[place]):
            return
        chosen.add(place)
        left.subtract(of_groups[place])
        taken.update(of_groups[place])

    for each in sorted(totals, key=lambda each: (totals[each], str(each))):
        wanted = max(1, math.floor(fraction * totals[each])) if totals[each] > 1 else 0
        for place, classes in enumerate(of_groups):
            if taken[each] >= wanted:
                break
            if each in classes:
                take(place)
    # images without objects last: a part of them only makes up the number
    target = max(1, round(fraction * sum(sizes)))
    for place in sorted(range(len(of_groups)), key=lambda place: len(of_groups[place]) > 0):
        if sum(sizes[each] for each in chosen) >= target or len(chosen) == len(sizes) - 1:
            break
        take(place)
    # where every image has a class of its own, one of them has to go all the same
    return chosen or {min(range(len(of_groups)), key=lambda place: len(of_groups[place]))}


def _groups(entries: Sequence[Json], images: Path) -> list[list[int]]:
    """Return the ids of images that must not be parted, in the order of the file."""
    copies = same_bytes([images / each["file_name"] for each in entries])
    keys: dict[Any, list[int]] = defaultdict(list)
    joined: dict[Any, Any] = {}  # a group of equal files -> the group of the first one's name
    for each in entries:
        name, _, rest = each["file_name"].partition(_COPY_OF)
        key = name if rest else each["file_name"]
        group = copies.get(images / each["file_name"])
        if group is not None:
            key = joined.setdefault(group, key)
        keys[key].append(each["id"])
    return list(keys.values())


def same_bytes(paths: Iterable[Path]) -> dict[Path, str]:
    """Return {path: digest} of the files that have an equal among them.

    Only files of one size are read.
    """
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        if path.is_file():
            by_size[path.stat().st_size].append(path)
    by_digest: dict[str, list[Path]] = defaultdict(list)
    for equal in by_size.values():
        if len(equal) > 1:
            for path in equal:
                by_digest[hashlib.sha256(path.read_bytes()).hexdigest()].append(path)
    return {path: digest for digest, equal in by_digest.items() if len(equal) > 1 for path in equal}
