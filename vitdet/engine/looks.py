"""Pictures of a training while it runs: what goes in, and what the detector finds.

They cost time, and change nothing: weights and random states are bit for bit those of a training
without pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitdet.drawing import contact_sheet, draw_instances, save_image
from vitdet.engine.hooks import due
from vitdet.engine.inference import TestSet, infer
from vitdet.engine.losses import Batch
from vitdet.engine.trainer import Trainer
from vitdet.utils.distributed import is_main
from vitdet.utils.env import random_state

THRESHOLD = 0.3  # of the predictions that are drawn
_BATCH_IMAGES = 8
_TEST_IMAGES = 6
_COLUMNS = 4  # of a sheet
_CELL_HEIGHT = 360  # pixels


class Looks:
    """Write `batch_<images>.jpg` and `predictions_<images>.jpg` every so many images.

    A batch is drawn as the detector gets it, after augmentation, with its boxes and masks; the
    first one of a run is always drawn. Predictions are those on the first few test images, always
    the same, beside their truth. Only the main process draws.

    Args:
        folder: for the pictures; made when the first one is written.
        every: images between pictures, 0 for none at all.
        total_batch_size: images a step over all processes.
        test: the images to predict on.
    """

    def __init__(self, folder: Path, *, every: int, total_batch_size: int, test: TestSet) -> None:
        self.folder = folder
        self.every = every if is_main() else 0
        self.total_batch_size = total_batch_size
        self._test = test
        self._inputs: Batch | None = None  # the test images, read when they are first drawn
        self._batch: Batch = []
        self._drawn = -1  # images seen at the last predictions

    def watching(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the training's batches through, and remember the latest."""
        for batch in batches:
            if self.every:
                self._batch = batch
            yield batch

    def after_step(self, trainer: Trainer) -> None:
        """Draw when it is due, and the batch of a run's first step."""
        if not self.every:
            return
        is_due = due(trainer, self.every, self.total_batch_size)
        if is_due or trainer.images_seen <= self.total_batch_size:
            self._draw_batch(trainer)
        if is_due:
            self._draw_predictions(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Draw what the final weights find."""
        if self.every and self._drawn != trainer.images_seen:
            self._draw_predictions(trainer)

    def _draw_batch(self, trainer: Trainer) -> None:
        pictures = [
            draw_instances(
                _pixels(record["image"], trainer), record["instances"], self._test.class_names
            )
            for record in self._batch[:_BATCH_IMAGES]
        ]
        self._save("batch", pictures, trainer)

    def _draw_predictions(self, trainer: Trainer) -> None:
        self._drawn = trainer.images_seen
        with random_state(0):
            if self._inputs is None:
                self._inputs = _first(self._test.loader, _TEST_IMAGES)
            found = self._predictions(trainer)
        # A data set of one's own may be without records; then there is no truth to draw.
        records = getattr(self._test.dataset, "records", ())
        truth = {record["image_id"]: record["annotations"] for record in records}
        names = self._test.class_names
        pictures = []
        for record, instances in zip(self._inputs, found, strict=True):
            image = _pixels(record["image"], trainer, (record["height"], record["width"]))
            if record["image_id"] in truth:
                pictures.append(draw_instances(image, truth[record["image_id"]], names))
            pictures.append(draw_instances(image, instances, names, THRESHOLD))
        titles = ["truth", "prediction"] * (_COLUMNS // 2) if truth else []
        self._save("predictions", pictures, trainer, titles)

    def _predictions(self, trainer: Trainer) -> list[Any]:
        detector = trainer.detector
        was_training = detector.training
        detector.eval()
        try:
            outputs = [infer(detector, [each], trainer.dtype) for each in self._inputs or ()]
        finally:
            detector.train(was_training)
        return [output["instances"] for (output,) in outputs]

    def _save(
        self, kind: str, pictures: list[np.ndarray], trainer: Trainer, titles: Sequence[str] = ()
    ) -> None:
        if not pictures:  # this process has no part of the test images
            return
        rows = [pictures[i : i + _COLUMNS] for i in range(0, len(pictures), _COLUMNS)]
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(rows, titles=titles, cell_height=_CELL_HEIGHT)
        save_image(sheet, self.folder / f"{kind}_{trainer.images_seen:09d}.jpg")


def _first(loader: Any, count: int) -> Batch:
    """Return the first inputs of a loader, which is then left."""
    found: Batch = []
    for batch in loader:
        found += batch
        if len(found) >= count:
            break
    return found[:count]


def _pixels(
    image: torch.Tensor, trainer: Trainer, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Turn a model input (3, height, width) into uint8 RGB (height, width, 3) of a size."""
    pixels = image.cpu().clamp(0, 255).to(torch.uint8).numpy().transpose(1, 2, 0)
    if getattr(trainer.detector, "input_format", None) == "BGR":
        pixels = pixels[:, :, ::-1]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if size is not None:
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture)
