"""`make demo`: draw a data set, train a small detector on it, evaluate, draw its predictions."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from omegaconf import DictConfig
from torch import nn

from vitdet import checkpoint
from vitdet.config import build_model, instantiate, load_config
from vitdet.drawing import contact_sheet, draw_instances, save_image
from vitdet.engine.launch import launch
from vitdet.engine.run import train
from vitdet.utils.checks import InputError

RECIPE = Path("configs/mini/mask_rcnn_eva02_shapes.py")
NUM_PICTURES = 8
THRESHOLD = 0.5


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default=str(RECIPE), help=f"default {RECIPE}")
    parser.add_argument(
        "--num-processes", type=int, default=max(1, min(2, os.cpu_count() or 1)), metavar="N"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="train.num_images=500")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        cfg = load_config(args.config_file, args.overrides)
        # One process a core: on a CPU that is faster than one process with several threads.
        launch(_train, args.num_processes, args=(args.config_file, args.overrides))
        picture = draw(cfg)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = json.loads((Path(cfg.train.output_dir) / "results.json").read_text())["results"]
    box, mask = results["bbox"]["AP"], results["segm"]["AP"]
    print(f"box AP {box:.1f}, mask AP {mask:.1f} after {time.perf_counter() - started:.0f} s")
    print(f"predictions beside the truth: {picture}")
    return 0


def _train(config_file: str, overrides: list[str]) -> None:
    """Run in each process."""
    train(load_config(config_file, overrides), resume=True)


def draw(cfg: DictConfig) -> Path:
    """Draw the truth and the final model's predictions on held-out images; return the file."""
    folder = Path(cfg.train.output_dir)
    dataset = instantiate(cfg.dataloader.test.dataset)
    weights = folder / "model_final.pth"
    detector = build_model(cfg.model)
    state, _ = checkpoint.weights_of(checkpoint.read(weights), source=str(weights))
    checkpoint.load_weights(detector, state, source=str(weights))
    pairs = [
        _pair(detector.eval(), record, dataset.class_names)
        for record in dataset.records[:NUM_PICTURES]
    ]
    half = NUM_PICTURES // 2
    rows = [[*left, *right] for left, right in zip(pairs[:half], pairs[half:], strict=True)]
    path = folder / "predictions.png"
    save_image(contact_sheet(rows, titles=["truth", "prediction"] * 2), path)
    return path


def _pair(
    detector: nn.Module, record: dict, class_names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of the truth and of the prediction on one image."""
    image = read_image(record["file_name"], format="RGB")
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    with torch.inference_mode():
        inputs = [{"image": tensor, "height": image.shape[0], "width": image.shape[1]}]
        found = detector(inputs)[0]["instances"]
    truth = draw_instances(image, record["annotations"], class_names)
    return truth, draw_instances(image, found, class_names, THRESHOLD)


if __name__ == "__main__":
    sys.exit(main())
