"""`make demo`: draw a data set, train a small detector on it, evaluate, draw its predictions."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from vitdet.config import instantiate, load_config
from vitdet.drawing import draw_instances, save_image
from vitdet.engine.launch import launch
from vitdet.engine.run import train
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import exit_status

RECIPE = "configs/mini/mask_rcnn_eva02_shapes.py"
_SIDE, _PICTURES = 320, 8  # pixels of a picture, and how many


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default=RECIPE, help=f"default {RECIPE}")
    # One process a core: on a CPU that is faster than one process with several threads.
    processes = max(1, min(2, os.cpu_count() or 1))
    parser.add_argument("--num-processes", type=int, default=processes, metavar="N")
    text = "train.num_images=500"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)
    return exit_status(lambda: _run(parser.parse_intermixed_args(arguments)))


def _run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    cfg = load_config(args.config_file, args.overrides)
    launch(_train, args.num_processes, args=(args.config_file, args.overrides))
    folder = Path(cfg.train.output_dir)
    predictor = Predictor.from_checkpoint(
        folder / "model_final.pth", precision="fp32", threshold=0.5
    )
    pictures = []  # held-out images: the truth, and the predictions
    for record in instantiate(cfg.dataloader.test.dataset).records[:_PICTURES]:
        found = predictor(record["file_name"])
        truth = record["annotations"]
        drawn = draw_instances(found.image, truth, predictor.class_names, min_side=_SIDE)
        pictures += [drawn, found.plot(min_side=_SIDE)]
    rows = [np.hstack(pictures[first : first + 4]) for first in range(0, len(pictures), 4)]
    save_image(np.vstack(rows), folder / "predictions.png")
    results = json.loads((folder / "results.json").read_text())["results"]
    box, mask = results["bbox"]["AP"], results["segm"]["AP"]
    print(f"box AP {box:.1f}, mask AP {mask:.1f} after {time.perf_counter() - started:.0f} s")
    print(f"predictions, each right of the truth: {folder / 'predictions.png'}")
    return 0


def _train(config_file: str, overrides: list[str]) -> None:
    """Run in each process."""
    train(load_config(config_file, overrides), resume=True)


if __name__ == "__main__":
    sys.exit(main())
