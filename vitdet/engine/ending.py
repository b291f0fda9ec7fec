"""What a training says at its end: AP, the best, files, what to do next, and why AP is near 0."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitdet.engine.checkpoints import BEST, FINAL
from vitdet.engine.evaluate import PREDICTIONS, Evaluations, Results, TestSet
from vitdet.engine.log import IMAGES, METRICS, read_metrics
from vitdet.engine.recipe import Counts
from vitdet.engine.trainer import Trainer

_NEAR_ZERO = 1.0  # percent
_FEW = 50  # images
_MOST_NAMES = 5


def objects_by_class(dataset: Any) -> Counter[str] | None:
    """Return how many objects of each class a data set has; None if it has no records."""
    records, names = getattr(dataset, "records", None), dataset.class_names
    if not records or "annotations" not in records[0]:
        return None
    found = (each.get("category_id") for record in records for each in record["annotations"])
    return Counter(names[c] for c in found if isinstance(c, int) and 0 <= c < len(names))


def closing_lines(
    cfg: DictConfig,
    trainer: Trainer,
    evaluations: Evaluations,
    test: TestSet,
    results: Results,
    data: Mapping[str, Counts],
    objects: Counter[str] | None,
) -> Iterator[str]:
    """Yield the lines; `objects` are those of the training data by class."""
    folder = Path(cfg.train.output_dir)
    steps = -(-trainer.images_seen // cfg.dataloader.train.total_batch_size)
    yield f"the end: {trainer.images_seen} images in {steps} steps"
    for task, values in results.items():
        shown = {"AP": values.get("AP"), "AP50": values.get("AP50")}
        aps = [f"{name} {v:.2f}" for name, v in shown.items() if isinstance(v, Real)]
        if aps:
            yield f"{task:<10} {', '.join(aps)} on {test.name} ({data['test']['images']} images)"
    images, value = evaluations.best()
    weights = BEST if images and (folder / BEST).exists() else FINAL
    if images:
        when = "the last" if images == trainer.images_seen else f"after {images} images"
        yield f"best       {evaluations.metric} {value:.2f}, {when}"
    found = next(iter(results.values()), {}).get("thresholds", {}).get("over_all")
    if found is not None and images == trainer.images_seen:
        yield f"threshold  {found:.2f} has the largest F1: predict, serve and report use it"
    names = [weights, FINAL, "results.json", PREDICTIONS, METRICS, "log.txt"]
    there = [name for name in dict.fromkeys(names) if (folder / name).exists()]
    yield f"files      {', '.join(there)} in {_here(folder)}"
    if images and value < _NEAR_ZERO and str(evaluations.metric).rpartition("/")[2] == "AP":
        for number, reason in enumerate(_reasons(cfg, trainer, test, data, objects)):
            yield f"{'why so low' if not number else '':<10} {reason}"
    else:
        yield from _weak_classes(results, objects)
    picture = next((each["file_name"] for each in getattr(test.dataset, "records", ())), "IMAGE")
    for label, words in (
        ("next", ["predict", _here(picture), "--weights", _here(folder / weights)]),
        ("", ["report", _here(folder)]),
    ):
        yield f"{label:<10} {_command()} {shlex.join(words)}"


def _reasons(
    cfg: DictConfig,
    trainer: Trainer,
    test: TestSet,
    data: Mapping[str, Counts],
    objects: Counter[str] | None,
) -> Iterator[str]:
    """Yield what the counts of this run say about an AP near zero."""
    seen, meant = trainer.images_seen, cfg.schedule.get("num_images")
    if isinstance(meant, int | float) and seen < meant / 2:
        yield f"too short: {seen} images were seen, the recipe is made for {meant:g}"
    losses = [
        each["total_loss"]
        for each in read_metrics(Path(cfg.train.output_dir))
        if "total_loss" in each and each[IMAGES] <= seen
    ]
    if len(losses) > 1:
        yield f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}"
    if not cfg.train.init_checkpoint:
        yield "it started from random weights: --weights FILE starts from trained ones"
    for part, what in (("train", "to learn from"), ("test", "to evaluate on")):
        count = data[part]["images"]
        if count and count < _FEW:
            yield f"few images: {count} {what}, with {data[part]['objects']} objects"
    yield from _lacking(objects, objects_by_class(test.dataset))
    predictions = getattr(test.evaluator, "predictions", None)
    if predictions == []:
        yield "there are no predictions at all"
    elif predictions:
        best = max(each["score"] for each in predictions)
        yield f"the best score of the {len(predictions)} predictions is {best:.2f}"


def _lacking(objects: Counter[str] | None, tested: Counter[str] | None) -> Iterator[str]:
    """Yield lines about classes of which one part of the data has no object."""
    if objects is None or tested is None:
        return
    for names, what in (
        ([name for name in tested if not objects[name]], "seen in training, but in the test data"),
        ([name for name in objects if not tested[name]], "in the test data, so without AP"),
    ):
        if names:
            yield f"never {what}: {_names(names)}"


def _weak_classes(results: Results, objects: Counter[str] | None) -> Iterator[str]:
    """Yield a line about the classes of the first task whose AP is near zero."""
    aps = next(iter(results.values()), {}).get("per_class", {})
    weak = [name for name, ap in aps.items() if math.isfinite(ap) and ap < _NEAR_ZERO]
    if weak:
        said = [f"{name} ({objects[name]} to learn from)" if objects else name for name in weak]
        yield f"AP near 0  {_names(said)}"


def _here(path: str | Path) -> str:
    """Return a path as it is typed in this folder."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _command() -> str:
    """`vitdet` as it can be typed here: by its name where that is the one of this Python."""
    own = Path(sys.executable).with_name("vitdet")
    if (named := shutil.which("vitdet")) and Path(named).resolve() == own.resolve():
        return "vitdet"
    return shlex.quote(str(own)) if own.exists() else f"{sys.executable} -m vitdet.app.cli"
