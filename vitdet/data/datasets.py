"""Data sets: COCO and LVIS by their names, any COCO json with its image folder by two values."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import builtin

from vitdet.data.annotations import Check, make_records, read_annotations
from vitdet.data.clean import Style
from vitdet.utils.checks import fail, nearest

logger = logging.getLogger(__name__)

_PROJECT = Path(__file__).resolve().parents[2]

# name: (image folder, annotation file). File names in the published annotations begin with
# "images/v1/" or "images/v2/" (baaivision/EVA, EVA-02/det, data/datasets/objects365.py).
_OBJECTS365 = {
    f"objects365_v2_{split}": ("Objects365", f"Objects365/annotations/zhiyuan_objv2_{split}.json")
    for split in ("train", "val")
}


@dataclass(frozen=True)
class Dataset:
    """Images with their annotations, in memory; image files stay on disk until they are mapped.

    Attributes:
        name: under which detectron2's MetadataCatalog knows it.
        class_names: in the order of the contiguous class indexes that models use.
        class_ids: category id in the annotation file of each class index.
        records: detectron2 dataset dicts; `category_id` is the class index, boxes are XYWH pixels.
        json_file: the annotation file; evaluation reads its ground truth there.
        image_root: folder that `file_name` is relative to.
        style: whether "coco" or "lvis" rules hold in evaluation.
        image_counts: number of training images of each class where the file tells (LVIS).
        truth: what predictions are compared with where the file had to be read otherwise than it is
            written, or entries were left out; None for what the file says.
    """

    name: str
    class_names: tuple[str, ...]
    class_ids: tuple[int, ...]
    records: list[dict[str, Any]] = field(repr=False)
    json_file: Path
    image_root: Path
    style: Style = "coco"
    image_counts: tuple[int, ...] | None = field(default=None, repr=False)
    truth: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def coco_dataset(
    json: str | Path,
    images: str | Path,
    name: str | None = None,
    style: Style = "coco",
    check: Check = "error",
) -> Dataset:
    """Read any annotation file in COCO's format.

    Args:
        json: the annotation file. Class names and their number come from its "categories", in the
            order of their ids.
        images: the folder that the file names are relative to.
        name: for tables and detectron2's MetadataCatalog; by default the json's name.
        style: "lvis" for LVIS rules: federated evaluation, file names from `coco_url`.
        check: what to do with a box outside its image or empty, an empty mask, an unknown category
            or image id, a missing image file and so on (`vitdet.data.findings`): "error" stops and
            names the first, "drop" leaves them out and logs how many, "keep" looks at nothing that
            detectron2 does not look at (an unknown category is an error all the same). What is only
            written otherwise, such as numbers in quotes, is read and logged.

    Raises:
        InputError: one line saying which file and annotation, what was expected, and what to do.
    """
    json_file, image_root = Path(json), Path(images)
    if not image_root.is_dir():
        fail(
            f"image folder {image_root}",
            expected="a folder",
            got="a file" if image_root.exists() else "nothing at this path",
            remedy=f"Give the folder that the file names in {json_file} are relative to.",
        )
    found = read_annotations(json_file, image_root, style, check)
    categories = found.content["categories"]
    dataset = Dataset(
        name=name or _free_name(json_file),
        class_names=tuple(category["name"] for category in categories),
        class_ids=tuple(category["id"] for category in categories),
        records=make_records(found, image_root, style, json_file),
        json_file=json_file,
        image_root=image_root,
        style=style,
        image_counts=_image_counts(categories),
        truth=found.content if found.changed else None,
    )
    _register(dataset)
    return dataset


def named_dataset(name: str) -> Dataset:
    """Return a data set by its usual name, such as "coco_2017_train".

    The files lie under the folder named by the environment variable DETECTRON2_DATASETS, which is
    read at every call, "./datasets" by default. The layout is detectron2's
    (facebookresearch/detectron2 datasets/README.md), and for Objects365 that of EVA's code:
    Objects365/annotations/zhiyuan_objv2_{train,val}.json, Objects365/images/v1/patch0 and so on.
    Annotations are taken as detectron2 takes them (check="keep").

    Args:
        name: coco_2014_*, coco_2017_*, lvis_v1_*, lvis_v0.5_*, objects365_v2_train or _val.

    Raises:
        InputError: unknown name (says the nearest), missing file or folder.
    """
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    known = _known()
    if name not in known:
        close = nearest(name, known)
        fail(
            "data set name",
            expected=f"one of {', '.join(sorted(known))}",
            got=repr(name),
            remedy=f"Did you mean {close}?"
            if close
            else "Own data: use coco_dataset(json=..., images=...).",
        )
    images, json_file, style = known[name]
    for what, path, found in (
        ("annotation file", root / json_file, (root / json_file).is_file()),
        ("image folder", root / images, (root / images).is_dir()),
    ):
        if not found:
            given = "DETECTRON2_DATASETS" in os.environ
            fail(
                f"data set {name}",
                expected=f"its {what} {path}",
                got="nothing at this path",
                remedy="Set the environment variable DETECTRON2_DATASETS to the folder that holds "
                f"{json_file} and {images} (it is {root if given else 'not set, so ./datasets'}).",
            )
    return coco_dataset(root / json_file, root / images, name, style, check="keep")


def joined_dataset(names: Sequence[str]) -> Dataset:
    """Return several named data sets as one to train on; it has no annotation file to evaluate by.

    Args:
        names: for `named_dataset`; all must have the same classes.

    Raises:
        InputError: no names, other classes, or what `named_dataset` raises.
    """
    if not names:
        fail("joined data sets", expected="names", got="none", remedy="Name at least one.")
    parts = [named_dataset(name) for name in names]
    first = parts[0]
    for part in parts[1:]:
        if (part.class_names, part.class_ids) != (first.class_names, first.class_ids):
            fail(
                f"joined data sets {', '.join(names)}",
                expected=f"the {first.num_classes} classes of {first.name} in each",
                got=f"{part.num_classes} in {part.name}, or other names or ids",
                remedy="Join data sets of the same classes only.",
            )
    name = "+".join(names)
    counts = [part.image_counts for part in parts if part.image_counts is not None]
    joined = replace(
        first,
        name=name,
        records=[record for part in parts for record in part.records],
        json_file=Path(f"{name} has no annotation file of its own"),
        image_counts=tuple(map(sum, zip(*counts, strict=True)))
        if len(counts) == len(parts)
        else None,
        truth=None,
    )
    _register(joined)
    return joined


def coco_mini(split: Literal["train", "val"], num_images: int | None = None) -> Dataset:
    """Return the small set of real COCO photographs that tests and configs/mini use.

    It lies in the folder named by VITDET_COCO_MINI, by default `../shared/data/coco-mini` beside
    the project.

    Args:
        split: "train" (100 images) or "val" (34).
        num_images: only the first ones that have objects (to overfit), or None for all.

    Raises:
        InputError: the folder is not there.
    """
    default = _PROJECT.parent / "shared" / "data" / "coco-mini"
    root = Path(os.environ.get("VITDET_COCO_MINI", default))
    if not root.is_dir():
        fail(
            "data set coco_mini",
            expected=f"the folder {root}",
            got="nothing at this path",
            remedy="Set the environment variable VITDET_COCO_MINI to the folder that holds "
            "annotations/instances_train.json, train and val.",
        )
    name = f"coco_mini_{split}"
    dataset = coco_dataset(root / "annotations" / f"instances_{split}.json", root / split, name)
    return dataset if num_images is None else subset(dataset, num_images)


def subset(dataset: Dataset, num_images: int) -> Dataset:
    """Return the first `num_images` images that have objects; evaluation then counts only these."""
    chosen = [
        record
        for record in dataset.records
        if any(not annotation.get("iscrowd", 0) for annotation in record["annotations"])
    ]
    if len(chosen) < num_images:
        fail(
            f"subset of {dataset.name}",
            expected=f"{num_images} images with objects",
            got=len(chosen),
            remedy="Ask for fewer.",
        )
    return replace(dataset, records=chosen[:num_images])


def federated_loss_weights(
    dataset: str = "lvis_v1_train", freq_power: float = 0.5
) -> Callable[[], torch.Tensor]:
    """Return the callable that detectron2's FastRCNNOutputLayers takes for the federated loss.

    Classes are drawn as negatives with a chance proportional to (number of training images with
    the class) ** freq_power ("Probabilistic two-stage detection", Zhou et al. 2021, Sec. 5.3). The
    counts are those built into detectron2; no file is read.

    Args:
        dataset: a name whose counts detectron2 knows.
        freq_power: the exponent.

    Returns:
        Callable without arguments -> float tensor (number of classes,).

    Raises:
        InputError: detectron2 has no counts for this name.
    """
    counts = MetadataCatalog.get(dataset).get("class_image_count")
    if counts is None:
        fail(
            "federated loss",
            expected="a data set whose image counts detectron2 knows, such as lvis_v1_train",
            got=repr(dataset),
            remedy="Name one of those.",
        )
    numbers = [entry["image_count"] for entry in sorted(counts, key=lambda entry: entry["id"])]
    return lambda: torch.tensor(numbers, dtype=torch.float32) ** freq_power


def _known() -> dict[str, tuple[str, str, Style]]:
    """Name -> (image folder, annotation file, style), most from detectron2's own tables."""
    splits_of_coco = {**builtin._PREDEFINED_SPLITS_COCO["coco"], **_OBJECTS365}
    known: dict[str, tuple[str, str, Style]] = {
        name: (images, json_file, "coco") for name, (images, json_file) in splits_of_coco.items()
    }
    for splits in builtin._PREDEFINED_SPLITS_LVIS.values():
        known |= {name: (images, file, "lvis") for name, (images, file) in splits.items()}
    return known


def _free_name(json_file: Path) -> str:
    """The file's name; its whole path when another file already goes by that name."""
    registered = MetadataCatalog.get(json_file.stem).get("json_file", str(json_file))
    return json_file.stem if registered == str(json_file) else str(json_file)


def _register(dataset: Dataset) -> None:
    """Let detectron2's visualizer and evaluators find the data set by its name.

    An entry cannot be changed, only replaced; what detectron2 itself knows of a name (colours,
    image counts) is kept.
    """
    known = MetadataCatalog.get(dataset.name).as_dict()
    MetadataCatalog.remove(dataset.name)
    known |= {
        "json_file": str(dataset.json_file),
        "image_root": str(dataset.image_root),
        "evaluator_type": dataset.style,
        "thing_classes": list(dataset.class_names),
        "thing_dataset_id_to_contiguous_id": {
            category: index for index, category in enumerate(dataset.class_ids)
        },
    }
    MetadataCatalog.get(dataset.name).set(**known)


def _image_counts(categories: Sequence[dict[str, Any]]) -> tuple[int, ...] | None:
    counts: Sequence[int | None] = [category.get("image_count") for category in categories]
    if any(count is None for count in counts):
        return None
    return tuple(int(count) for count in counts if count is not None)
