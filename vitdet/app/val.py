"""`vitdet val --weights FILE`: AP of a checkpoint on its recipe's test set, or on other data.

Without --tta and --slices it is what `train_net.py --eval-only` does, with its numbers.
"""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from vitdet.app.options import load_predictor
from vitdet.config import Train
from vitdet.data.prepare import prepare_part
from vitdet.engine.evaluate import TestSet, write_results
from vitdet.engine.log import logging_to
from vitdet.predict.loading import building, check_test_data
from vitdet.predict.predictor import Predictor
from vitdet.utils import thresholds
from vitdet.utils.checks import InputError


def run(args: argparse.Namespace) -> int:
    """Print the AP table and write results.json; return 0.

    Raises:
        InputError: anything in options, weights or data that a user can repair.
    """
    if args.part and args.data is None:
        raise InputError(f"--part {args.part}: it is a part of --data, which is not given.")
    predictor = load_predictor(args, overrides=args.overrides, threshold=0.0)
    cfg: Any = predictor.cfg
    predictor.precision = args.precision or cfg.train.get("eval_precision", Train.eval_precision)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is not None:
        names = predictor.class_names or ()
        (annotations, images), notes = prepare_part(
            args.data,
            args.out / "data",
            images=args.images,
            class_names=names,
            split=args.part,
        )
        print(*(f"data         {note}" for note in notes), sep="\n", flush=True)
        node = {"_target_": "vitdet.data.datasets.coco_dataset"}
        cfg.dataloader.test.dataset = node | {"json": annotations, "images": images}
    elif not args.trust:
        check_test_data(cfg, str(args.weights))
    plain = predictor.tta is None and predictor.slices is None
    detector = predictor.detector if plain else _Through(predictor)
    with logging_to() as log_to:
        with building(str(args.weights)):
            test = TestSet(cfg, expected_classes=predictor.class_names)
        log_to(args.out / "log.txt")
        prefix = "ema/" if args.use == "ema" else ""
        with building(predictor.source):
            results = test.evaluate(detector, predictor.precision, prefix)
    write_results(args.out, test, str(args.weights), results)
    found = thresholds.chosen(None, thresholds.of_results(results), args.use)
    print(f"threshold {found.text()}")
    print(f"results in {args.out / 'results.json'}")
    return 0


class _Through(nn.Module):
    """What the engine takes for a detector: a predictor that reads the images of a batch itself."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.detector = predictor.detector  # its device and mode are this module's
        self._predictor = predictor

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return {"instances": ...} for each record."""
        results = self._predictor([record["file_name"] for record in batch])
        return [{"instances": result.instances} for result in results]
