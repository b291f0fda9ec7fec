"""MODEL_CARD.md: one page beside the weights that says what they are."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitdet.engine.run_folder import BEST, FINAL

NAME = "MODEL_CARD.md"
_VERSIONS = ("python", "torch", "torchvision", "device", "git")
_MAX_CLASSES = 100  # that are listed by name


def card(
    folder: Path,
    cfg: DictConfig,
    note: Mapping[str, Any],
    evaluations: Mapping[int, Mapping[str, float]],
    *,
    finished: bool,
) -> str:
    """Return the text of the card of a run.

    Args:
        folder: of the run.
        cfg: the recipe, durations in images.
        note: what `vitdet.engine.record.write` returned.
        evaluations: {images seen: {metric: value}} of the whole run, the last of them of the
            weights that the card is about.
        finished: whether these are the final weights.
    """
    data = note["data"]
    rows = _rows(cfg, evaluations, finished=finished)
    weights = next(
        (name for name in (BEST, FINAL) if any(row.startswith(name) for row in rows)), ""
    )
    parts = [
        f"# {folder.resolve().name}",
        _what(cfg, note["class_names"]),
        "## Results\n" + _table(rows),
        "## Data\n" + "\n".join(_data(name, data[name]) for name in data),
        "## Training\n" + _training(cfg, note["environment"], max(evaluations), finished=finished),
        f"## Use\n```\nvitdet predict IMAGES --weights {weights or 'CHECKPOINT'}\n```",
        "## License and limits\nTo be filled in by whoever publishes these weights: the license of "
        "the weights, that of the data and of the start, what they are for and what they are not.",
    ]
    return "\n\n".join(parts) + "\n"


def _what(cfg: DictConfig, class_names: list[str]) -> str:
    model = cfg.model
    kind = str(getattr(model._target_, "__name__", model._target_)).rsplit(".", 1)[-1]
    names = ", ".join(class_names[:_MAX_CLASSES])
    names += ", ..." * (len(class_names) > _MAX_CLASSES)
    return f"A detector ({kind}) of {len(class_names)} classes: {names}."


def _rows(
    cfg: DictConfig, evaluations: Mapping[int, Mapping[str, float]], *, finished: bool
) -> dict[str, Mapping[str, float]]:
    """Return {weights: AP}: the best ones, if the run keeps them, and the newest."""
    newest = max(evaluations)
    rows = {FINAL if finished else f"after {newest} images": evaluations[newest]}
    metric = cfg.train.get("best_metric")
    found = {images: each for images, each in evaluations.items() if metric in each}
    if found:
        best = max(found, key=lambda images: (found[images][metric], -images))
        rows = {f"{BEST} ({metric} best, after {best} images)": found[best], **rows}
    return rows


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    names = dict.fromkeys(name for values in rows.values() for name in values)
    columns = [name for name in names if name.rpartition("/")[2].startswith("AP")]
    lines = ["| weights | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = (f"{values[key]:.2f}" if key in values else "-" for key in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "AP in percent, on the test data.\n\n" + "\n".join(lines)


def _data(part: str, data: Mapping[str, Any]) -> str:
    return (
        f"- {part}: {data['name']}, {data['images']} images, {data['objects']} objects, "
        f"fingerprint {data['hash']}"
    )


def _training(
    cfg: DictConfig, environment: Mapping[str, str], images: int, *, finished: bool
) -> str:
    train = cfg.train
    start = train.init_checkpoint or "random weights"
    length = f"{images} images" if finished else f"{images} of {train.num_images} images so far"
    batch = cfg.dataloader.train.total_batch_size
    versions = ", ".join(f"{key} {environment[key]}" for key in _VERSIONS)
    return "\n".join(
        [
            f"- {length}, {batch} a step, from {start}; seed {train.seed}",
            f"- command: `{shlex.join(sys.argv)}`",
            "- recipe: config.yaml, in the folder and in every checkpoint",
            f"- {versions}",
        ]
    )
