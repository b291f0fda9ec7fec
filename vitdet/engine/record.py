"""What a run keeps of where it comes from: config, versions, command, seed, and its data.

A data set is known again by its fingerprint: class names, numbers of images and objects, and a hash
over the list of images and all annotations. A resumed run goes on with the data it began with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from vitdet.config import save_config
from vitdet.engine.inference import Results
from vitdet.utils.checks import fail
from vitdet.utils.distributed import barrier, broadcast_object, is_main
from vitdet.utils.env import describe
from vitdet.utils.files import write_text

logger = logging.getLogger(__name__)

Fingerprint = dict[str, Any]


def fingerprint(dataset: Any, *, images: bool = False) -> Fingerprint:
    """Return what tells a data set from another one.

    Paths count below the folder of the images only, so a data set may move.

    Args:
        dataset: has `name`, `class_names` and `records`.
        images: read all image files too. Left out, a picture that is replaced by another one of the
            same name and size is not noticed.

    Returns:
        {"name", "class_names", "images", "objects", "hash"}; the hash is hexadecimal.

    Raises:
        InputError: a record that holds an object which has no plain form.
    """
    records = dataset.records
    root = str(getattr(dataset, "image_root", ""))
    content = hashlib.blake2b(digest_size=16)
    for record in records:
        file = str(record.get("file_name", ""))
        inside = file.removeprefix(root).lstrip("/")
        content.update(_ENCODER.encode({**record, "file_name": inside}).encode())
        if images:
            content.update(_digest(Path(file)))
    return {
        "name": str(dataset.name),
        "class_names": list(dataset.class_names),
        "images": len(records),
        "objects": sum(len(record.get("annotations", ())) for record in records),
        "hash": content.hexdigest(),
    }


def _digest(file: Path) -> bytes:
    try:
        return hashlib.blake2b(file.read_bytes()).digest()
    except OSError as error:
        fail(
            f"image {file}",
            expected="a file that can be read, as train.hash_images=true reads all",
            got=error.strerror,
            remedy="Check the image folder, or leave train.hash_images off.",
        )


def _plain(value: Any) -> Any:
    """Return what JSON knows for a value that it does not know."""
    if isinstance(value, bytes):  # of masks in COCO's encoding
        return value.decode("latin-1")
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    fail(
        "records of the data set",
        expected="plain values, arrays and tensors",
        got=type(value).__name__,
        remedy="Keep other objects out of the records, or hold them in the mapper.",
    )


# One encoder for all records: equal values give equal text on every machine.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=_plain)


def of_data(train: Any, test: Any, *, images: bool) -> dict[str, Fingerprint]:
    """Return the fingerprints of training and test data; the main process looks, all know."""
    found = None
    if is_main():
        parts = {"train": train, "test": test}
        found = {name: fingerprint(data, images=images) for name, data in parts.items()}
    return broadcast_object(found)


def check_data(
    data: Mapping[str, Fingerprint], content: Mapping[str, Any], source: str, *, allow: bool
) -> None:
    """Stop a resume with other data than those that the run began with.

    Args:
        data: fingerprints now.
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


def changed(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Return what differs between two fingerprints, in words; the name does not count."""
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
    if not found and before["hash"] != now["hash"]:
        found.append(f"other annotations or images (hash {before['hash']}, now {now['hash']})")
    return found


def write(
    cfg: DictConfig,
    output_dir: Path,
    dataset: Any,
    data: Mapping[str, Fingerprint],
    written: Mapping[str, str],
) -> dict[str, Any]:
    """Write config.yaml, environment.json and run.json; return what checkpoints keep of them.

    Args:
        cfg: the recipe, durations in images.
        output_dir: folder of the run.
        dataset: has `class_names`, and `class_ids` where its classes have numbers of their own.
        data: see `of_data`.
        written: durations as the recipe had them, see `vitdet.engine.durations.resolve`.
    """
    environment = describe()
    if is_main():
        notes = [f"{key}: {text}" for key, text in written.items()]
        save_config(cfg, output_dir / "config.yaml", notes)
        write_text(output_dir / "environment.json", json.dumps(environment, indent=1) + "\n")
        about = {"command": sys.argv, "seed": cfg.train.seed, "data": data}
        about["durations"] = dict(written)
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


def write_results(output_dir: Path, dataset: str, source: str, results: Results) -> None:
    """Write results.json: the AP of the last evaluation, and of which file."""
    if not is_main():
        return
    content = {"dataset": dataset, "checkpoint": source, "results": _json_ready(results)}
    write_text(output_dir / "results.json", json.dumps(content, indent=1) + "\n")


def _json_ready(value: Any) -> Any:
    """JSON has no NaN (the AP of a class without instances): it becomes null."""
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    number = float(value)
    return number if math.isfinite(number) else None
