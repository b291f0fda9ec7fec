"""What a run left in its folder, and its predictions."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitdet import checkpoint
from vitdet.app.report.matching import Json, Scene, scenes
from vitdet.config import load_config
from vitdet.engine.inference import TestSet
from vitdet.engine.run import evaluate
from vitdet.predict.loading import building, check_size, check_test_data
from vitdet.scores import read_truth
from vitdet.utils.checks import fail

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
    content = _json(results_file)
    if not isinstance(content, dict) or not content.get("results"):
        remedy = "Evaluate the run again."
        fail(str(results_file), expected='AP under "results"', got="none", remedy=remedy)
    if predictions is None:
        found = _predict(cfg, _weights(folder, content["checkpoint"]), device)
    else:
        found = _json(predictions)
        if not isinstance(found, list):
            got = type(found).__name__
            remedy = f"Give a {PREDICTIONS} of the evaluator."
            fail(f"predictions {predictions}", expected="a list of results", got=got, remedy=remedy)
    lines = folder / "metrics.json"
    environment = folder / "environment.json"
    return Run(
        folder=folder,
        cfg=cfg,
        recipe=config.read_text(encoding="utf-8"),
        results=content["results"],
        checkpoint=content["checkpoint"],
        metrics=_json_lines(lines) if lines.is_file() else [],
        environment=_json(environment) if environment.is_file() else {},
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
    except (OSError, ValueError) as error:
        fail(str(path), expected="a json file", got=str(error), remedy="Write it again.")


def _json_lines(path: Path) -> list[Json]:
    """Read the numbers of a training; a kill may have cut the last line off."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                got = f"line {number}: {error}"
                fail(str(path), expected="a json object a line", got=got, remedy="Remove the line.")
    return found
