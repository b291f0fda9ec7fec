"""What a run left in its folder, and its predictions."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitdet import checkpoint
from vitdet.app.report.matching import Json, Scene, scenes
from vitdet.config import load_config
from vitdet.engine.evaluate import TestSet
from vitdet.engine.run import evaluate
from vitdet.predict.loading import building, check_size, check_test_data
from vitdet.scores import evaluate_results, read_truth
from vitdet.utils.checks import InputError, fail

PREDICTIONS = "coco_instances_results.json"  # what the evaluator calls its file


@dataclass(frozen=True)
class Run:
    """A run that was evaluated.

    Attributes:
        folder: where it lies.
        cfg: its recipe.
        recipe: the text of its config.yaml.
        results: AP in percent, {"bbox": {"AP": ..., "per_class": ...}, ...}; None for not a number.
        checkpoint: the weights that were evaluated.
        metrics: the lines of metrics.json, [] without the file.
        environment: versions, {} without the file.
        dataset: the test data.
        predictions: results in COCO's format.
    """

    folder: Path
    cfg: DictConfig
    recipe: str
    results: dict[str, Json]
    checkpoint: str
    metrics: list[Json]
    environment: dict[str, str]
    dataset: Any
    predictions: list[Json]

    def scenes(self, iou_type: str) -> list[Scene]:
        """Return the test images with what is there and what was found, by boxes or by masks."""
        data = self.dataset
        return scenes(
            data.truth or read_truth(data.json_file),
            self.predictions,
            iou_type,
            self.cfg.dataloader.evaluator.get("max_dets", 100),
            style=data.style,
            image_ids=[record["image_id"] for record in data.records],
        )


def read_run(
    folder: Path, predictions: Path | None = None, device: str = "auto", *, trust: bool = False
) -> Run:
    """Read a run's folder, and run its weights over its test data once more for the predictions.

    Args:
        folder: the run's `train.output_dir`.
        predictions: a file in COCO's result format to take instead of running the weights.
        device: "auto", "cpu" or "cuda".
        trust: build what the recipe names outside vitdet, too: it may run code of its author.

    Raises:
        InputError: a file that is missing or damaged, or data that is not there.
    """
    config = folder / "config.yaml"
    results_file = folder / "results.json"
    for path in (config, results_file):
        if not path.is_file():
            fail(
                f"run {folder}",
                expected=f"a folder with {path.name}",
                got="none",
                remedy="Give train.output_dir of a run that was evaluated: training ends with it, "
                "and train_net.py --eval-only --resume does it again.",
            )
    cfg = load_config(config, trust=trust)
    if not trust:
        check_test_data(cfg, str(config))
    with building(str(config)):
        dataset = TestSet(cfg).dataset
    content = _results(results_file)
    if predictions is None:
        found = _predict(cfg, _weights(folder, content["checkpoint"]), device)
    else:
        found = _json(predictions)
        if not isinstance(found, list):
            text = f"expected a list of results, got {type(found).__name__}. Give a {PREDICTIONS}"
            raise InputError(f"predictions {predictions}: {text} of the evaluator.")
        truth = dataset.truth or read_truth(dataset.json_file)
        ids = [record["image_id"] for record in dataset.records]
        # looks at every one of them
        evaluate_results(truth, found, "bbox", style=dataset.style, image_ids=ids)
    lines = folder / "metrics.json"
    environment = folder / "environment.json"
    return Run(
        folder=folder,
        cfg=cfg,
        recipe=config.read_text(encoding="utf-8"),
        results=content["results"],
        checkpoint=content["checkpoint"],
        metrics=_json_lines(lines) if lines.is_file() else [],
        environment=_environment(environment) if environment.is_file() else {},
        dataset=dataset,
        predictions=found,
    )


def _weights(folder: Path, name: str) -> Path:
    """A training names its final file in the run's folder, an evaluation any path."""
    return folder / name if (folder / name).is_file() else Path(name)


def _predict(cfg: DictConfig, weights: Path, device: str) -> list[Json]:
    """Evaluate as the run did, in a folder of its own: nothing in the run's folder changes."""
    cfg = cfg.copy()
    state, _ = checkpoint.weights_of(checkpoint.read(weights), source=str(weights))
    with building(str(weights)):
        check_size(cfg.model, state, str(weights))
    with tempfile.TemporaryDirectory(prefix="vitdet-report-") as temporary:
        cfg.train.output_dir = temporary
        cfg.train.init_checkpoint = str(weights)
        cfg.train.device = device
        cfg.dataloader.evaluator.output_dir = temporary
        evaluate(cfg)
        return _json(Path(temporary) / PREDICTIONS)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a json file, got {error}. Write it again.") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _results(path: Path) -> Json:
    """Read AP and the name of the weights."""
    content = _json(path)
    tasks = content.get("results") if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not tasks or not isinstance(content.get("checkpoint"), str):
        tasks = {"": None}
    for scores in tasks.values():
        values: Json = {"": ""}
        if isinstance(scores, dict) and isinstance(scores.get("per_class", {}), dict):
            values = {**scores, **scores.get("per_class", {}), "per_class": None}
        if not all(value is None or _is_number(value) for value in values.values()):
            text = (
                'expected AP under "results", as an evaluation writes it. Evaluate the run again.'
            )
            raise InputError(f"{path}: {text}")
    return content


def _environment(path: Path) -> dict[str, str]:
    content = _json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected names and versions. Remove the file.")
    return {str(name): str(value) for name, value in content.items()}


def _json_lines(path: Path) -> list[Json]:
    """Read the numbers of a training; a kill may have cut the last line off."""
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            if not isinstance(content, dict) or not _is_number(content.get("images_seen")):
                raise ValueError("no numbers of a training")
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                text = f"{path}: expected a json object a line, got line {number}: {error}."
                raise InputError(f"{text} Remove the line.") from error
            continue
        found.append({name: _finite(v) for name, v in content.items() if _is_number(v)})
    return found


def _finite(value: float) -> float:
    """Return a number that can be drawn, or nan."""
    return float(value) if abs(value) < 1e30 else math.nan
