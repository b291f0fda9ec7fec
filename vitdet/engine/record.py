"""What a run keeps of where it comes from: config, versions, command, seed, and its data.

Of a data set it keeps the class names and the numbers of images and objects. A resumed run goes on
with the data it began with.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitdet.config import save_config
from vitdet.engine.inference import Results, TestSet
from vitdet.utils.checks import fail
from vitdet.utils.distributed import barrier, is_main
from vitdet.utils.env import describe
from vitdet.utils.files import write_text

logger = logging.getLogger(__name__)

Counts = dict[str, Any]
PREDICTIONS = "coco_instances_results.json"  # beside results.json, named as detectron2 does


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
    """Stop a resume with other data than those that the run began with.

    Args:
        data: counts of "train" and "test" now.
        content: of the checkpoint.
        source: its name.
        allow: `train.allow_changed_data`: say what changed and go on.

    Raises:
        InputError: names what changed.
    """
    about = content.get("vitdet")
    before = about.get("data", {}) if isinstance(about, Mapping) else {}
    if not before:
        logger.info("%s does not say which data it was trained on: not compared", source)
    changes = [
        f"{part} data: {text}"
        for part in data
        if part in before
        for text in changed(before[part], data[part])
    ]
    if not changes:
        return
    if allow:
        logger.warning("the data changed since %s: %s", source, "; ".join(changes))
        return
    fail(
        f"data for resuming {source}",
        expected="those with which the run began",
        got="; ".join(changes),
        remedy="Give it the same data, go on all the same with train.allow_changed_data=true, or "
        "start another run from the file with train.init_checkpoint.",
    )


def changed(before: Counts, now: Counts) -> list[str]:
    """Return what differs between the counts of a data set, in words; the name is free."""
    found = []
    old, new = before["class_names"], now["class_names"]
    if old != new:
        gone = [name for name in old if name not in new]
        added = [name for name in new if name not in old]
        words = [f"without {', '.join(gone[:5])}"] * bool(gone)
        words += [f"with {', '.join(added[:5])}"] * bool(added)
        found.append(f"{len(old)} classes, now {len(new)} {' and '.join(words) or 'in new order'}")
    found += [
        f"{before[key]} {key}, now {now[key]}"
        for key in ("images", "objects")
        if before[key] != now[key]
    ]
    return found


def write(
    cfg: DictConfig,
    output_dir: Path,
    dataset: Any,
    data: Mapping[str, Counts],
) -> dict[str, Any]:
    """Write config.yaml, environment.json and run.json; return what checkpoints keep of them.

    Args:
        cfg: the recipe, its lengths in images.
        output_dir: folder of the run.
        dataset: has `class_names`, and `class_ids` where its classes have numbers of their own.
        data: counts of "train" and "test".
    """
    environment = describe()
    if is_main():
        set_absolute_paths(cfg)
        save_config(cfg, output_dir / "config.yaml")
        write_text(output_dir / "environment.json", json.dumps(environment, indent=1) + "\n")
        about = {"command": sys.argv, "seed": cfg.train.seed, "data": data}
        write_text(output_dir / "run.json", json.dumps(about, indent=1) + "\n")
    barrier()
    config = (output_dir / "config.yaml").read_text(encoding="utf-8")
    return {
        "class_names": list(dataset.class_names),
        "class_ids": list(getattr(dataset, "class_ids", range(1, len(dataset.class_names) + 1))),
        "config": config,
        "environment": environment,
        "data": dict(data),
    }


def set_absolute_paths(cfg: DictConfig) -> None:
    """Let a recipe say where its data lie from whatever folder it is read later."""
    for part in ("train", "test"):
        node = cfg.dataloader[part].dataset
        for key in ("json", "images"):
            value = node.get(key) if isinstance(node, DictConfig) else None
            if isinstance(value, str) and Path(value).exists():
                node[key] = str(Path(value).absolute())


def write_results(output_dir: Path, test: TestSet, source: str, results: Results) -> None:
    """Write the last evaluation: AP and of which file, and the predictions, which a report shows.

    With a moving average they are those of the average, which is evaluated last.
    """
    if not is_main():
        return
    content = {"dataset": test.name, "checkpoint": source, "results": _json_ready(results)}
    write_text(output_dir / "results.json", json.dumps(content, indent=1) + "\n")
    predictions = getattr(test.evaluator, "predictions", None)  # one of your own may keep none
    if predictions is not None:
        write_text(output_dir / PREDICTIONS, json.dumps(predictions) + "\n")


def _json_ready(value: Any) -> Any:
    """JSON has no NaN (the AP of a class without instances): it becomes null."""
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    number = float(value)
    return number if math.isfinite(number) else None
