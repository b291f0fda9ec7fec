"""What happens beside the steps of training, every so many images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vitdet.engine.checkpoints import Checkpoints, due
from vitdet.engine.inference import Results, flatten
from vitdet.engine.selection import Selection
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import broadcast_object
from vitdet.utils.files import read_small, write_text

logger = logging.getLogger(__name__)

RECORD = "evaluations.json"
KEY = "evaluations"  # of a checkpoint


class Record:
    """The results of the evaluations so far, {images seen: {metric: value}}, in every process.

    Checkpoints hold those before them. An evaluation that follows a checkpoint at the same step
    stands only in `evaluations.json`, which is written when all that it brings about is done; so
    a run that is killed during one repeats it, and one that is killed later does not.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / RECORD
        self.values: dict[int, dict[str, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: nothing before the first evaluation."""
        return {KEY: _listed(self.values)} if self.values else {}

    def load(self, state: dict[str, Any], images_seen: int) -> None:
        """Continue from a checkpoint's content.

        Raises:
            InputError: it holds something else under `KEY`.
        """
        try:
            known = _values(state.get(KEY, []))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"checkpoint: its {KEY} are no list of results ({error}).") from error
        self.values = {images: each for images, each in known.items() if images <= images_seen}
        after = broadcast_object(self._read()).get(images_seen)
        if after is not None:
            self.values[images_seen] = after

    def add(self, images_seen: int, values: dict[str, float]) -> None:
        """Add an evaluation; what a run that has gone back found after it no longer counts."""
        earlier = {images: each for images, each in self.values.items() if images < images_seen}
        self.values = {**earlier, images_seen: values}

    def text(self) -> str:
        """What `evaluations.json` holds."""
        return json.dumps(_listed(self.values), indent=1) + "\n"

    def _read(self) -> dict[int, dict[str, float]]:
        return read_small(self.path, lambda text: _values(json.loads(text)), {})


def _listed(values: dict[int, dict[str, float]]) -> list[dict[str, Any]]:
    return [{"images_seen": images, "values": each} for images, each in sorted(values.items())]


def _values(listed: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    return {
        int(each["images_seen"]): {str(k): float(v) for k, v in each["values"].items()}
        for each in listed
    }


def _metrics(results: Results) -> list[str]:
    """Names of all metrics, also of those that are not a number this time."""
    return [
        f"{task}/{key}"
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, int | float)
    ]


class Evaluations:
    """Evaluate every so many images, keep the best weights, and stop when nothing improves.

    A checkpoint of the same step is written first: whatever ends the evaluation loses nothing.

    Args:
        every: images between evaluations, 0 for none before the end of training.
        total_batch_size: images a step over all processes.
        evaluate: no arguments; evaluates, prints, and returns to training mode.
        record: what was found so far.
        selection: what is best, and when to stop.
        checkpoints: write what is best, and the record.
    """

    def __init__(
        self,
        *,
        every: int,
        total_batch_size: int,
        evaluate: Callable[[], Results],
        record: Record,
        selection: Selection,
        checkpoints: Checkpoints,
    ) -> None:
        self.every = every
        self.total_batch_size = total_batch_size
        self.evaluate = evaluate
        self.record = record
        self.selection = selection
        self.checkpoints = checkpoints
        self._latest: Results | None = None  # of the last step, if it was evaluated

    def after_step(self, trainer: Trainer) -> None:
        """Evaluate when it is due and training goes on (the end has its own evaluation)."""
        self._latest = None
        if trainer.images_seen < trainer.num_images and self._due(trainer):
            self.now(trainer)
            if self.selection.stop(self.record.values):
                trainer.num_images = trainer.images_seen

    def after_train(self, trainer: Trainer) -> None:
        """Nothing: the caller evaluates the final weights."""

    def before_train(self, trainer: Trainer, num_images: int) -> int:
        """Return until where to train, after a resume to a step whose evaluation was not done."""
        missing = trainer.images_seen not in self.record.values
        if 0 < trainer.images_seen < num_images and missing and self._due(trainer):
            self.now(trainer)
        return trainer.images_seen if self.selection.stop(self.record.values) else num_images

    def now(self, trainer: Trainer) -> Results:
        """Return the results of this moment's weights; one evaluation a step is enough."""
        if self._latest is not None:
            return self._latest
        images = trainer.images_seen
        self.checkpoints.ensure(trainer)
        results = self.evaluate()
        # Only the main process has numbers, and all must decide alike.
        values, names = broadcast_object((flatten(results), _metrics(results)))
        self.selection.check_names(names)
        self.record.add(images, values)
        written = partial(write_text, self.record.path, self.record.text())
        if self.selection.is_best(self.record.values, images):
            self.checkpoints.keep_best(written)
        else:
            self.checkpoints.submit(written)
        self._latest = results
        return results

    def _due(self, trainer: Trainer) -> bool:
        return due(trainer, self.every, self.total_batch_size)
