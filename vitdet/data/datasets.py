"""Data sets: COCO and LVIS by their names, any COCO json with its image folder by two values."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.data.detection_utils import get_fed_loss_cls_weights
from detectron2.structures import BoxMode

from vitdet.data.clean import clean
from vitdet.data.files import read_json
from vitdet.data.findings import Cleaned, Json, check_lists, notes_on, stop_at_faults
from vitdet.data.labels import Style, file_name
from vitdet.data.masks import is_polygon
from vitdet.utils.checks import InputError, nearest
from vitdet.utils.run_lengths import compressed

logger = logging.getLogger(__name__)

Check = Literal["error", "drop", "keep"]
# name: (image folder, annotation file). File names in the published annotations begin with
# "images/v1/" or "images/v2/" (baaivision/EVA, EVA-02/det, data/datasets/objects365.py).
_OBJECTS365 = {
    f"objects365_v2_{split}": ("Objects365", f"Objects365/annotations/zhiyuan_objv2_{split}.json")
    for split in ("train", "val")
}


@dataclass(frozen=True)
class Dataset:
    """Images with their annotations, in memory; image files stay on disk until they are mapped."""

    name: str
    class_names: tuple[str, ...]  # in the order of the class indexes that models use
    class_ids: tuple[int, ...]  # category id in the annotation file of each class index
    records: list[Json] = field(repr=False)  # detectron2 dataset dicts, boxes XYWH in pixels
    json_file: Path  # evaluation reads its ground truth there
    style: Style = "coco"  # whose rules hold in evaluation
    # what predictions are compared with where the file had to be read otherwise than it is written,
    # or entries were left out; None for what the file says
    truth: Json | None = field(default=None, repr=False)


def coco_dataset(
    json: str | Path,
    images: str | Path,
    name: str | None = None,
    style: Style = "coco",
    check: Check = "error",
) -> Dataset:
    """Read any annotation file in COCO's format.

    Args:
        json: the annotation file; classes are its "categories", in the order of their ids.
        images: the folder that the file names are relative to.
        name: for tables; by default the json's name.
        style: "lvis" for LVIS rules: federated evaluation, file names from `coco_url`.
        check: what to do with faults (`vitdet.data.findings`): "error" stops and names the first,
            "drop" leaves them out and logs how many, "keep" looks at nothing that detectron2 does
            not look at. What is only written otherwise, such as numbers in quotes, is read.

    Raises:
        InputError: one line saying which file and annotation, what was expected, and what to do.
    """
    json_file, image_root = Path(json), Path(images)
    if not image_root.is_dir():
        got = "a file" if image_root.exists() else "nothing at this path"
        raise InputError(
            f"image folder {image_root}: expected a folder, got {got}. File names in {json_file} "
            "are relative to it."
        )
    if check not in get_args(Check):
        raise InputError(f'check: expected "error", "drop" or "keep", got {check!r}.')
    found = _read(json_file, image_root, style, check)
    try:
        categories = sorted(found.content["categories"], key=lambda each: each["id"])
        names = tuple(category["name"] for category in categories)
        records = records_of(found, image_root, style, json_file)
    except KeyError as error:  # where nothing was looked at
        text = f"annotation file {json_file}: an entry has no key {error}. Convert it to COCO's"
        raise InputError(f"{text} format.") from error
    ids, truth = tuple(each["id"] for each in categories), found.content if found.changed else None
    return Dataset(name or json_file.stem, names, ids, records, json_file, style, truth)


def _read(json_file: Path, images: Path, style: Style, check: Check) -> Cleaned:
    content, _ = read_json(json_file)
    if check == "keep":
        content = {"annotations": [], **content} if isinstance(content, dict) else content
        check_lists(content, json_file)
        return Cleaned(content)
    found = clean(content, images, json_file, style=style)
    if check == "error":
        stop_at_faults(json_file, found.findings)
    for line in notes_on(found.findings):
        logger.warning("%s: %s", json_file, line)
    return found


def records_of(found: Cleaned, image_root: Path, style: Style, json_file: Path) -> list[Json]:
    """Turn annotations into detectron2 dataset dicts, ordered by image id.

    Where some objects have no mask, none has one in the records: only boxes can be trained.
    """
    mixed = any(each.kind == "object without mask" for each in found.findings)
    ids = sorted(category["id"] for category in found.content["categories"])
    class_index = {category: index for index, category in enumerate(ids)}
    by_image: dict[int, list[Json]] = defaultdict(list)
    for annotation in found.content["annotations"]:
        if annotation["category_id"] not in class_index:
            raise InputError(
                f"annotation file {json_file}, annotation {annotation.get('id')}: expected a "
                f'category_id of its categories, got {annotation["category_id"]!r}; check="drop" '
                "leaves such annotations out."
            )
        converted = {
            "category_id": class_index[annotation["category_id"]],
            "bbox": annotation["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "iscrowd": annotation.get("iscrowd", 0),
        }
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list) and segmentation:
            # as detectron2's data/datasets/coco.py: an annotation of too small polygons is left out
            segmentation = [part for part in segmentation if is_polygon(part)]
            if not segmentation:
                continue
        if segmentation and not mixed:
            converted["segmentation"] = compressed(segmentation)
        by_image[annotation["image_id"]].append(converted)
    lists = ("neg_category_ids", "not_exhaustive_category_ids") if style == "lvis" else ()
    return [
        {
            "file_name": str(image_root / file_name(image, style)),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": by_image[image["id"]],
            **{key: image.get(key, []) for key in lists},
        }
        for image in sorted(found.content["images"], key=lambda each: each["id"])
    ]


def has_objects(record: dict[str, Any]) -> bool:
    """Whether an image has annotations other than crowd regions."""
    return any(not each.get("iscrowd", 0) for each in record.get("annotations", ()))


def named_dataset(name: str) -> Dataset:
    """Return a data set by its usual name, such as "coco_2017_train".

    The files lie under the folder named by the environment variable DETECTRON2_DATASETS, by default
    "./datasets", in the layout of facebookresearch/detectron2 datasets/README.md; Objects365 has
    that of EVA's code. Annotations are taken as detectron2 takes them (check="keep").
    """
    coco, lvis = builtin._PREDEFINED_SPLITS_COCO["coco"], builtin._PREDEFINED_SPLITS_LVIS.values()
    known: dict[str, tuple[str, str]] = {**coco, **_OBJECTS365}
    for places in lvis:
        known |= places
    if name not in known:
        close = nearest(name, known)
        own = "Own data: use coco_dataset(json=..., images=...)."
        raise InputError(
            f"data set name: expected one of {', '.join(sorted(known))}, got {name!r}. "
            + (f"Did you mean {close}?" if close else own)
        )
    images, json_file = known[name]
    style = "lvis" if any(name in places for places in lvis) else "coco"
    given = os.environ.get("DETECTRON2_DATASETS")
    root = Path(given or "datasets").expanduser()
    for what, path in (("annotation file", root / json_file), ("image folder", root / images)):
        if not path.exists():
            raise InputError(
                f"data set {name}: expected its {what} {path}, got nothing at this path. Set the "
                f"environment variable DETECTRON2_DATASETS to the folder that holds {json_file} "
                f"and {images} (it is {root if given else 'not set, so ./datasets'})."
            )
    return coco_dataset(root / json_file, root / images, name, style, check="keep")


def joined_dataset(names: Sequence[str]) -> Dataset:
    """Return several named data sets of the same classes as one to train on, not to evaluate."""
    parts = [named_dataset(name) for name in names]
    if len({(part.class_names, part.class_ids) for part in parts}) != 1:
        sizes = ", ".join(f"{len(part.class_ids)} in {part.name}" for part in parts) or "none"
        raise InputError(f"joined data sets: expected some of the same classes, got {sizes}.")
    name, records = "+".join(names), [record for part in parts for record in part.records]
    none = Path(f"{name} has no annotation file of its own")
    return replace(parts[0], name=name, records=records, json_file=none)


def coco_mini(split: Literal["train", "val"], num_images: int | None = None) -> Dataset:
    """Return the small set of real COCO photographs that tests and configs/mini use.

    It lies in the folder named by VITDET_COCO_MINI, by default `../shared/data/coco-mini` beside
    the project, and has 100 + 34 images; `num_images` takes the first that have objects.
    """
    default = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco-mini"
    root = Path(os.environ.get("VITDET_COCO_MINI", default))
    if not root.is_dir():
        raise InputError(f"coco_mini: got nothing at {root}. Set VITDET_COCO_MINI to its folder.")
    json_file = root / "annotations" / f"instances_{split}.json"
    dataset = coco_dataset(json_file, root / split, f"coco_mini_{split}")
    return dataset if num_images is None else subset(dataset, num_images)


def subset(dataset: Dataset, num_images: int) -> Dataset:
    """Return the first `num_images` images that have objects; evaluation then counts only these."""
    chosen = list(filter(has_objects, dataset.records))
    if len(chosen) < num_images:
        raise InputError(
            f"subset of {dataset.name}: expected {num_images} images with objects, got "
            f"{len(chosen)}. Ask for fewer."
        )
    return replace(dataset, records=chosen[:num_images])


def federated_loss_weights(
    dataset: str = "lvis_v1_train", freq_power: float = 0.5
) -> Callable[[], torch.Tensor]:
    """Return the callable that detectron2's FastRCNNOutputLayers takes for the federated loss.

    Classes are drawn as negatives with a chance proportional to (number of training images with
    the class) ** freq_power ("Probabilistic two-stage detection", Zhou et al. 2021, Sec. 5.3). The
    counts are those built into detectron2.
    """
    if MetadataCatalog.get(dataset).get("class_image_count") is None:
        raise InputError(
            "federated loss: expected a data set whose image counts detectron2 knows, such as "
            f"lvis_v1_train, got {dataset!r}."
        )
    return partial(get_fed_loss_cls_weights, dataset, freq_power)
