"""What a run left in its folder: results, predictions, numbers of the training, recipe."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitdet import checkpoint
from vitdet.config import load_config
from vitdet.engine.evaluate import PREDICTIONS, TestSet
from vitdet.engine.run import evaluate
from vitdet.predict.loading import building, check_size, check_test_data
from vitdet.utils.checks import InputError

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run that was evaluated; empty is what its folder does not have."""

    cfg: DictConfig
    recipe: str  # the text of config.yaml
    results: dict[str, Json]  # percent: {"bbox": {"AP": ..., "per_class": ...}}; None for no number
    checkpoint: str  # that was evaluated
    metrics: list[dict[str, float]]  # the lines of metrics.json
    versions: dict[str, str]
    dataset: Any  # of the test
    predictions: list[Json]  # in COCO's format


def read_run(
    folder: Path, predictions: Path | None = None, device: str = "auto", *, trust: bool = False
) -> Run:
    """Read a run's folder; evaluate its weights once more where it has no predictions.

    Arguments are those of the command.

    Raises:
        InputError: a file that is missing or damaged, or data that is not there.
    """
    for name in ("config.yaml", "results.json"):
        if not (folder / name).is_file():
            raise InputError(
                f"run {folder}: it has no {name}. Give train.output_dir of a run that was "
                "evaluated: training ends with it, and train_net.py --eval-only --resume does it."
            )
    config = folder / "config.yaml"
    cfg = load_config(config, trust=trust)
    if not trust:
        check_test_data(cfg, str(config))
    with building(str(config)):
        dataset = TestSet(cfg).dataset
    content = _results(folder / "results.json")
    kept = predictions or folder / PREDICTIONS
    if predictions or kept.is_file():
        found = _json(kept)
    else:
        weights = folder / content["checkpoint"]  # a training names a file of the folder
        found = _predict(cfg, weights if weights.is_file() else Path(content["checkpoint"]), device)
    if not isinstance(found, list):
        raise InputError(f"predictions {kept}: expected a list, got a {type(found).__name__}.")
    environment = folder / "environment.json"
    versions = _json(environment) if environment.is_file() else {}
    if not isinstance(versions, dict):
        raise InputError(f"{environment}: no names and versions. Remove the file.")
    return Run(
        cfg=cfg,
        recipe=config.read_text(encoding="utf-8"),
        results=content["results"],
        checkpoint=content["checkpoint"],
        metrics=_metrics(folder / "metrics.json"),
        versions={str(name): str(value) for name, value in versions.items()},
        dataset=dataset,
        predictions=found,
    )


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
        evaluate(cfg)
        return _json(Path(temporary) / PREDICTIONS)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: it is no json file ({error}). Write it again.") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _results(path: Path) -> Json:
    """Read AP and the name of the weights."""
    content = _json(path)
    try:
        values = []
        for scores in content["results"].values():
            values += [value for key, value in scores.items() if key != "per_class"]
            values += scores.get("per_class", {}).values()
        sound = values and all(value is None or _is_number(value) for value in values)
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound or not isinstance(content.get("checkpoint"), str):
        text = 'no AP under "results", as an evaluation writes it'
        raise InputError(f"{path}: {text}. Evaluate the run again.")
    return content


def _metrics(path: Path) -> list[dict[str, float]]:
    """Read the numbers of a training; a kill may have cut the last line off."""
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            if not isinstance(content, dict) or not _is_number(content.get("images_seen")):
                raise ValueError("no numbers of a training")
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: {error}. Remove the line.") from error
            continue
        numbers = {name: float(value) for name, value in content.items() if _is_number(value)}
        # what cannot be drawn is not a number
        found.append({n: v if abs(v) < 1e30 else math.nan for n, v in numbers.items()})
    return found
