"""Checks of the data: what there is, the files, the classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitdet.app.doctor.finding import FAULT, OK, WARNING, Finding
from vitdet.app.doctor.patient import BUILD_ERRORS, Patient
from vitdet.engine.inference import build
from vitdet.utils.checks import InputError, one_line

_SAMPLE = 50  # image files that are looked for


def data(patient: Patient) -> Iterator[Finding]:
    """Read both halves of the data, and look for some of their files."""
    for half in ("train", "test"):
        try:
            found = build(patient.cfg.dataloader[half].dataset)
        except InputError as error:
            text, _, remedy = str(error).rpartition(". ")
            yield Finding(FAULT, f"{half} data", text or remedy, remedy if text else "")
            continue
        except BUILD_ERRORS as error:
            said = one_line(f"{type(error).__name__}: {error}")[:400]
            remedy = f"Correct dataloader.{half}.dataset."
            yield Finding(FAULT, f"{half} data", said, remedy)
            continue
        setattr(patient, half, found)
        yield _content(half, found)
        yield from _files(half, found)
    yield from _workers(patient.cfg)


def _content(half: str, found: Any) -> Finding:
    objects = [len(record.get("annotations", ())) for record in found.records]
    empty = sum(count == 0 for count in objects)
    text = f"{found.name}: {len(objects)} images, {sum(objects)} objects, "
    text += f"{len(found.class_names)} classes"
    if objects and empty == len(objects):
        remedy = "Without annotations nothing can be learnt or evaluated."
        return Finding(FAULT, f"{half} data", f"{text}; none has an object", remedy)
    return Finding(OK, f"{half} data", text + f"; {empty} images without objects" * bool(empty))


def _files(half: str, found: Any) -> Iterator[Finding]:
    names = [record["file_name"] for record in found.records if "file_name" in record]
    sample = names[:: max(len(names) // _SAMPLE, 1)]
    absent = [name for name in sample if not Path(name).is_file()]
    if absent:
        text = f"{len(absent)} of {len(sample)} image files that were looked for are not there "
        remedy = "Check the image folder and the file names in the annotations."
        yield Finding(FAULT, f"{half} data", f"{text}({absent[0]}, ...)", remedy)


def _workers(cfg: DictConfig) -> Iterator[Finding]:
    workers, cores = cfg.dataloader.train.get("num_workers", 0), os.cpu_count() or 1
    if workers > cores:
        text = f"{workers} reading processes on {cores} cores"
        remedy = f"dataloader.train.num_workers={cores} is enough."
        yield Finding(WARNING, "train data", text, remedy)


def classes(patient: Patient) -> Iterator[Finding]:
    """Training against test classes, heads against both."""
    if patient.train is not None and patient.test is not None:
        ours, theirs = patient.train.class_names, patient.test.class_names
        if tuple(ours) != tuple(theirs):
            pairs = zip_longest(ours, theirs, fillvalue="no class")
            first = next((a, b) for a, b in pairs if a != b)
            text = f"training data have {first[0]} where test data have {first[1]}"
            remedy = "Give both the same categories in the same order."
            yield Finding(FAULT, "classes", text, remedy)
            return
    if patient.train is None:
        return
    count = len(patient.train.class_names)
    own = _classes_of(patient.cfg.model)
    text = f"{count} of the data"
    if own is not None and own != count:
        text += f"; the recipe's {own} are replaced by these"
    weighted = _federated(patient.cfg.model)
    if weighted not in (None, count):
        text = f"the federated loss has weights of {weighted} classes, the data have {count}"
        remedy = "Set use_fed_loss=false in the box predictors, or use the data of its weights."
        yield Finding(FAULT, "classes", text, remedy)
    else:
        yield Finding(OK, "classes", text)


def _classes_of(model: DictConfig) -> int | None:
    node = model.get("roi_heads", model)
    return node.get("num_classes")


def _federated(model: DictConfig) -> int | None:
    """Return the number of classes that the federated loss has weights for, None without it."""
    heads = model.get("roi_heads")
    if heads is None:
        return None
    predictors = heads.get("box_predictors") or [heads.get("box_predictor")]
    for predictor in predictors:
        if predictor is None or not predictor.get("use_fed_loss"):
            continue
        weights = build(predictor.get_fed_loss_cls_weights)
        return len(weights())
    return None
