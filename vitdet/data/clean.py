"""One pass over a COCO content: what tools write otherwise is read, what is wrong is said.

A training, `vitdet data check` and its `--fix` take the same pass. A training stops at the kinds
of `vitdet.data.findings` that have `stops`, or leaves them out; the check prints all; `--fix`
writes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vitdet.data.findings import Finding, Json, Log
from vitdet.data.labels import Boxes, Classes, ImageFile, Images, Labels, Style
from vitdet.data.masks import shown
from vitdet.utils.checks import InputError


@dataclass
class Cleaned:
    """The result of a pass."""

    content: Json  # what was given where nothing had to change, else a copy
    findings: list[Finding] = field(default_factory=list)
    changed: bool = False  # whether the content says something else than what was given


def clean(
    content: Json,
    images: Path,
    source: Path,
    *,
    style: Style = "coco",
    boxes: Boxes = "ask",
    without_mask: Literal["keep", "drop"] = "keep",
    files: Mapping[str, ImageFile] | None = None,
) -> Cleaned:
    """Read the lists of a COCO content; say and mend what is wrong with them.

    What can be understood is kept. Numbers may be text or floats; ids may be words; boxes and masks
    may be nested or written otherwise; sizes may be missing. An object without a box has that of
    its mask. What has neither, or is of no image or class in the file, is left out.

    Args:
        content: {"images", "annotations", "categories"}, lists of objects; not changed.
        images: the folder that file names are relative to.
        source: where the content comes from, for error messages.
        style: "lvis" where file names are in `coco_url`.
        boxes: how they are written; "ask": x, y, width, height, unless they look otherwise.
        without_mask: "drop" leaves out objects without a mask, where others have one.
        files: {file name: what its file is}, for a closer look at everything; None opens only files
            of images without a size, and leaves alone what a training does not stop at.

    Raises:
        InputError: what is no COCO content at all.
    """
    check_lists(content, source)
    log = Log()
    try:
        classes = Classes(content["categories"], log)
        found = Images(content["images"], images, style, files, log)
    except InputError as error:
        raise InputError(f"annotation file {source}, {error}") from error
    labels = Labels(found, classes, log, boxes=boxes, closer=files is not None)
    annotations = labels.read(content["annotations"], without_mask)
    if log.changed:
        images_kept = [image for image, _ in found.kept.values()]
        content = {**content, "images": images_kept, "categories": classes.kept}
        content["annotations"] = annotations
    return Cleaned(content, log.found, log.changed)


def check_lists(content: Json, source: Path) -> None:
    """Raise an InputError where one of COCO's three lists is not there, or is none of objects."""
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            got = "the keys " + ", ".join(map(str, content)) if entries is None else shown(entries)
            raise InputError(
                f'annotation file {source}: expected a list "{key}" of objects (COCO format), got '
                f"{got or 'none'}. Convert the annotations to COCO's format."
            )
