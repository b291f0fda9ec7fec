"""What a run keeps of where it comes from, and what must be the same where it goes on.

Config, versions, command and seed; of a data set the class names and the numbers of images and
objects. A resumed run goes on with the data it began with.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from vitdet import checkpoint
from vitdet.config import config_text
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import is_main
from vitdet.utils.env import describe
from vitdet.utils.files import write_text

logger = logging.getLogger(__name__)

Counts = dict[str, Any]


def counts(dataset: Any) -> Counts:
    """Return name, class names, and the numbers of images and objects of a data set.

    A data set of another project may be without `records`: the numbers are None then.
    """
    records = getattr(dataset, "records", None)
    known = isinstance(records, Sequence)
    return {
        "name": str(dataset.name),
        "class_names": list(dataset.class_names),
        "images": len(records) if known else None,
        "objects": sum(len(each.get("annotations", ())) for each in records) if known else None,
    }


def check_data(
    data: Mapping[str, Counts], content: Mapping[str, Any], source: str, *, allow: bool
) -> None:
    """Stop a resume with other data than those that the run began with; `allow` says so only.

    Args:
        data: counts of "train" and "test" now.
        content: of the checkpoint.
        source: its name.
        allow: `train.allow_changed_data`.

    Raises:
        InputError: names what changed.
    """
    about = content.get("vitdet")
    before = about.get("data", {}) if isinstance(about, Mapping) else {}
    if not before:
        logger.info("%s does not say which data it was trained on: not compared", source)
    parts = [part for part in data if part in before]
    found = [f"{part} data: {e}" for part in parts for e in _changed(before[part], data[part])]
    changes = "; ".join(found)
    if changes and not allow:
        raise InputError(
            f"data for resuming {source}: expected those with which the run began, got {changes}. "
            "Give it the same data, go on all the same with train.allow_changed_data=true, or "
            "start another run from the file with train.init_checkpoint."
        )
    if changes:
        logger.warning("the data changed since %s: %s", source, changes)


def _changed(before: Counts, now: Counts) -> list[str]:
    """Return what differs between the counts of a data set, in words; the name is free."""
    old, new = before["class_names"], now["class_names"]
    differ = [f"without {name}" for name in old if name not in new]
    differ += [f"with {name}" for name in new if name not in old]
    words = ", ".join(differ[:9]) or "in new order"
    found = [f"{len(old)} classes, now {len(new)} ({words})"] * (old != new)
    numbers = [key for key in ("images", "objects") if before[key] != now[key]]
    return found + [f"{before[key]} {key}, now {now[key]}" for key in numbers]


def load_weights(
    detector: nn.Module, content: Mapping[str, Any], source: str, class_names: Iterable[str]
) -> None:
    """Load the weights of a file's content exactly; its class names, if any, must be ours.

    Raises:
        InputError: another size, class count, format, or other class names.
    """
    state, initialised = checkpoint.weights_of(content, source=source)
    checkpoint.load_weights(detector, state, source=source, initialised=initialised)
    about = content.get("vitdet")
    theirs = about.get("class_names") if isinstance(about, dict) else None
    if theirs is not None and list(theirs) != list(class_names):
        pairs = zip_longest(theirs, class_names, fillvalue="no class")
        first = next((a, b) for a, b in pairs if a != b)
        raise InputError(
            f"class names of {source}: expected those of the data set, {first[1]} among them, got "
            f"{first[0]} in its place. Use the data set that the file was trained on; to start "
            "another training from these weights, pass them through converter.py, which drops the "
            "names."
        )


def write(
    cfg: DictConfig, output_dir: Path, dataset: Any, data: Mapping[str, Counts]
) -> dict[str, Any]:
    """Write config.yaml, environment.json and run.json; return what checkpoints keep of them.

    Args:
        cfg: the recipe, its lengths in images.
        output_dir: folder of the run.
        dataset: has `class_names`, and `class_ids` where its classes have numbers of their own.
        data: counts of "train" and "test".
    """
    names = list(dataset.class_names)
    note = {
        "class_names": names,
        "class_ids": list(getattr(dataset, "class_ids", range(1, len(names) + 1))),
        "config": config_text(cfg),
        "environment": describe(),
        "data": dict(data),
    }
    if is_main():
        about = {"command": sys.argv, "seed": cfg.train.seed, "data": data}
        write_text(output_dir / "config.yaml", note["config"])
        for name, content in (("environment", note["environment"]), ("run", about)):
            write_text(output_dir / f"{name}.json", json.dumps(content, indent=1) + "\n")
    return note


def set_absolute_paths(cfg: DictConfig) -> None:
    """Let a recipe say where its data lie from whatever folder it is read later."""
    for part in ("train", "test"):
        node = cfg.dataloader[part].dataset
        for key in ("json", "images"):
            value = node.get(key) if isinstance(node, DictConfig) else None
            if isinstance(value, str) and Path(value).exists():
                node[key] = str(Path(value).absolute())
