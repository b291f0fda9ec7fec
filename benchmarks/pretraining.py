"""Measure what a pretrained backbone is worth on own data, and what it costs to tune all of it.

    python benchmarks/pretraining.py --data FOLDER --weights FILE --out DIR [--epochs 6] [--write]

Trains `--size light` from the weights with `--tune` all, lora and head, and from random weights,
where every part learns at the full rate; each from seed 0 with the same images. A training that is
in DIR already is not repeated. Each is evaluated on the validation and the test part. The picture
DIR/outlines.png shows what they find on one image of the test part, without its pixels.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from common import Table, write
from PIL import Image

from vitdet import Predictor
from vitdet.app import cli
from vitdet.data.formats import find_data

RUNS = {  # {row and folder: options of `vitdet train`}
    "all": ("--tune", "all"),
    "lora": ("--tune", "lora"),
    "head": ("--tune", "head"),
    "random": ("optimizer.backbone_lr_multiplier=1.0", "optimizer.layer_decay_rate=1.0"),
}
COLOURS = ((0, 140, 230), (70, 70, 200), (150, 90, 30))  # BGR of the first classes
WIDTH, HEAD = 480, 40  # pixels of a panel, and of its title


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="with parts train, val and test")
    parser.add_argument("--weights", required=True, help="of the pretrained backbone")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trainings")
    parser.add_argument("--epochs", default="6")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    return parser.parse_args()


def train(row: str, args: argparse.Namespace) -> None:
    """Train and evaluate one row, unless that is done."""
    place = args.out / row
    if not (place / "model_final.pth").exists():
        weights = () if row == "random" else ("--weights", args.weights)
        words = ("--data", args.data, "--size", "light", "--epochs", args.epochs, *weights)
        run("train", *words, "--out", str(place), *RUNS[row])
    if not (place / "test/results.json").exists():
        weights = ("--weights", str(place / "model_final.pth"))
        run("val", *weights, "--data", args.data, "--part", "test", "--out", str(place / "test"))


def run(*words: str) -> None:
    if status := cli.main(words):
        raise SystemExit(status)


def average_precision(path: Path) -> list[str]:
    """Return AP and AP50 of boxes, in percent."""
    found = json.loads(path.read_text())["results"]["bbox"]
    return [f"{found[key]:.1f}" for key in ("AP", "AP50")]


def outlines(titles: dict[str, str], args: argparse.Namespace) -> np.ndarray:
    """Draw labels, and what the model of each {row: title} finds with its own threshold.

    The image is the one of the test part with most objects.
    """
    found = find_data(Path(args.data), splits=("test",)).parts["test"]
    objects: dict[Any, list[Any]] = defaultdict(list)
    for each in found.content["annotations"]:
        objects[each["image_id"]].append((each["category_id"] - 1, each["bbox"]))
    image = max(found.content["images"], key=lambda each: len(objects[each["id"]]))
    size = (image["width"], image["height"])
    panels = [panel("labels", size, objects[image["id"]])]
    for row, title in titles.items():
        predictor = Predictor.from_checkpoint(args.out / row / "model_final.pth")
        result = predictor(found.images / image["file_name"])
        sides = [[x, y, right - x, bottom - y] for x, y, right, bottom in result.boxes.tolist()]
        panels.append(panel(title, size, list(zip(result.classes, sides, strict=True))))
    return np.concatenate(panels, axis=1)


def panel(title: str, size: tuple[int, int], objects: list[tuple[int, list[float]]]) -> np.ndarray:
    """Draw objects, (class index, box XYWH in pixels), each as the ellipse inside its box."""
    scale = WIDTH / size[0]
    drawn = np.full((round(size[1] * scale) + HEAD, WIDTH, 3), 255, np.uint8)
    cv2.putText(drawn, title, (8, HEAD - 13), cv2.FONT_HERSHEY_SIMPLEX, 0.7, 0, 1, cv2.LINE_AA)
    for label, box in objects:
        x, y, width, height = (value * scale for value in box)
        inside = ((x + width / 2, y + height / 2 + HEAD), (width, height), 0)
        cv2.ellipse(drawn, inside, COLOURS[label % len(COLOURS)], 2, cv2.LINE_AA)
    return cv2.copyMakeBorder(drawn, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(200, 200, 200))


def main() -> None:
    args = options()
    table = Table("backbone", "val AP", "AP50", "test AP", "AP50")
    for row in RUNS:
        train(row, args)
        place = args.out / row
        paths = (place / "results.json", place / "test/results.json")
        table.add(row, *(cell for path in paths for cell in average_precision(path)))
    drawn = outlines({"all": "pretrained", "random": "random weights"}, args)
    few = Image.fromarray(drawn[..., ::-1].copy()).quantize(64)  # colours
    few.save(args.out / "outlines.png", optimize=True)
    if args.write:
        about = (
            f"Box AP after {args.epochs} epochs of `--size light`, pretrained and random weights."
        )
        write("pretraining", about, table.lines)


if __name__ == "__main__":
    main()
