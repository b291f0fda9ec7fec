"""MODEL_CARD.md: one page beside the weights that says what they are."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitdet.engine.inference import Results, flatten
from vitdet.engine.run_folder import BEST, FINAL
from vitdet.utils.distributed import is_main
from vitdet.utils.files import write_text

NAME = "MODEL_CARD.md"
_VERSIONS = ("python", "torch", "torchvision", "device", "git")
_MAX_CLASSES = 100  # that are listed by name


def write(
    folder: Path,
    cfg: DictConfig,
    note: Mapping[str, Any],
    results: Results,
    evaluations: Mapping[int, Mapping[str, float]],
) -> None:
    """Write the card of a finished run; the main process does.

    Args:
        folder: of the run.
        cfg: the recipe, durations in images.
        note: what `vitdet.engine.record.write` returned.
        results: of the final weights.
        evaluations: {images seen: {metric: value}} of the whole run.
    """
    if is_main():
        write_text(folder / NAME, card(folder, cfg, note, results, evaluations))


def card(
    folder: Path,
    cfg: DictConfig,
    note: Mapping[str, Any],
    results: Results,
    evaluations: Mapping[int, Mapping[str, float]],
) -> str:
    """Return the text of the card; the arguments are those of `write`."""
    data = note["data"]
    parts = [
        f"# {folder.resolve().name}",
        _what(cfg, note["class_names"]),
        "## Results\n" + _results(folder, cfg, results, evaluations),
        "## Data\n" + "\n".join(_data(name, data[name]) for name in data),
        "## Training\n" + _training(cfg, note["environment"]),
        f"## Use\n{_use(folder)}",
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


def _results(
    folder: Path,
    cfg: DictConfig,
    results: Results,
    evaluations: Mapping[int, Mapping[str, float]],
) -> str:
    rows = {FINAL: flatten(results)}
    metric = cfg.train.get("best_metric")
    found = {images: each for images, each in evaluations.items() if metric in each}
    if found and (folder / BEST).exists():
        best = max(found, key=lambda images: (found[images][metric], -images))
        rows = {f"{BEST} ({metric} best, after {best} images)": found[best], **rows}
    columns = [name for name in rows[FINAL] if name.rpartition("/")[2].startswith("AP")]
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


def _training(cfg: DictConfig, environment: Mapping[str, str]) -> str:
    train = cfg.train
    start = train.init_checkpoint or "random weights"
    batch = cfg.dataloader.train.total_batch_size
    versions = ", ".join(f"{key} {environment[key]}" for key in _VERSIONS)
    return "\n".join(
        [
            f"- {train.num_images} images, {batch} a step, from {start}; seed {train.seed}",
            f"- command: `{shlex.join(sys.argv)}`",
            "- recipe: config.yaml, in the folder and in every checkpoint",
            f"- {versions}",
        ]
    )


def _use(folder: Path) -> str:
    weights = BEST if (folder / BEST).exists() else FINAL
    return f"```\nvitdet predict IMAGES --weights {weights}\n```"
