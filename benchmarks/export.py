"""Compare exported detectors in onnxruntime with PyTorch: what they find, and how long they take.

    python benchmarks/export.py [--weights FILE] [--images FOLDER] [--write]

It takes a trained detector, exports it once for images of any size (without padding to a square)
and runs it on real photographs at several sizes, one image after the other in both runtimes, in the
image's turn; PyTorch runs the model itself with the kernels it takes on a CPU. By default with one
thread, in seconds of the processor, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Table, parser, write
from detectron2.data import transforms as T
from torch import nn

from vitdet import export
from vitdet.data.datasets import coco_mini
from vitdet.export import LIMITS, Report, Run, compare
from vitdet.export.graph import Graph, example_image
from vitdet.predict.predictor import Predictor, find_files, open_inputs
from vitdet.utils.checks import quiet_dependencies

COLUMNS = (
    *("part", "longest side", "images", "detections", "found by both", "at the edge"),
    *("by one alone", "box (px)", "score", "mask (1 - IoU)", "level", "torch s", "onnxruntime s"),
    "torch / onnxruntime",
)


def pictures(folder: Path | None, count: int) -> Iterator[np.ndarray]:
    """Yield photographs of a folder, or of coco-mini: uint8 RGB (height, width, 3)."""
    files, _ = find_files(folder or Path(coco_mini("train").records[0]["file_name"]).parent)
    found = [picture.pixels() for picture in open_inputs(files[:count])[1]]
    yield from found


def resized(pixels: np.ndarray, side: int) -> torch.Tensor:
    """Return the image as (3, H, W), its longer side `side` pixels."""
    given: Any = T.AugInput(pixels)
    T.ResizeShortestEdge([side], side, "choice")(given)
    return torch.from_numpy(np.ascontiguousarray(given.image.transpose(2, 0, 1)))


class Timed:
    """Runs the model and a file of it in turn, and adds up the seconds of each."""

    def __init__(self, model: Any, graph: Graph, run: Run) -> None:
        self.model, self.graph, self.run = model, graph, run
        self.torch_seconds = self.file_seconds = 0.0

    def __call__(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return what the file finds."""
        first = time.process_time()
        with torch.inference_mode():
            if self.graph.detector:
                self.model([{"image": image}])
            else:
                self.model.backbone(self.model.preprocess_image([{"image": image}]).tensor)
        second = time.process_time()
        found = self.run(image)
        self.torch_seconds += second - first
        self.file_seconds += time.process_time() - second
        return found


def row(table: Table, side: int, report: Report, timed: Timed) -> None:
    """Add a line to the table."""
    whole = timed.graph.detector
    counts = (report.detections, report.matched, report.at_the_edge, report.extra)
    largest = report.largest
    table.add(
        "detector" if whole else "backbone",
        side,
        len(report.sizes),
        *(counts if whole else "----"),
        *(f"{largest[name]:.1e}" if name in largest else "-" for name in LIMITS),
        f"{timed.torch_seconds / len(report.sizes):.2f}",
        f"{timed.file_seconds / len(report.sizes):.2f}",
        f"{timed.torch_seconds / timed.file_seconds:.2f}",
    )


def measure(model: nn.Module, part: str, sides: list[int], folder: Path, count: int) -> list[str]:
    """Export a part of the model once and compare it at every size; return the table's lines."""
    table = Table(*COLUMNS)
    faults: list[str] = []
    graph = Graph(model, part)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "model.onnx"
        export.write(graph, out, example_image(graph))
        run = export.load(out)
        for side in sides:
            images = [resized(pixels, side) for pixels in pictures(folder, count)]
            if count > 1:
                run(images[0])  # warm-up
            timed = Timed(model, graph, run)
            report = compare(graph, timed, images)
            row(table, side, report, timed)
            faults += [f"{part}, {side}: {fault}" for fault in report.faults]
    good = "All differences are within an export's limits (a pixel of each mask may differ)."
    return [*table.lines, "", *(faults or [good])]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    quiet_dependencies()
    settings = ["model.backbone.square_pad=0"]
    loaded = Predictor.from_checkpoint(args.weights, overrides=settings, device="cpu")
    lines: list[str] = []
    for part in args.parts:
        lines += [*measure(loaded.detector, part, args.sizes, args.images, args.num_images), ""]
    if args.write:
        about = f"Trained detector ({args.what}), one file for all sizes"
        about += ", ONNX in onnxruntime against PyTorch on real photographs of coco-mini. Largest "
        about += "differences of all images (masks: 1 - IoU); seconds of the processor an image."
        write("export", about, lines[:-1])


def arguments() -> argparse.Namespace:
    made = parser(__doc__, repeat=1, threads=1)
    made.add_argument("--weights", type=Path, default=Path("output/overfit/model_final.pth"))
    made.add_argument("--what", default="ViT of 192 channels, 6 blocks", help="words about it")
    made.add_argument("--images", type=Path, metavar="FOLDER", help="default: coco-mini")
    made.add_argument("--num-images", type=int, default=20)
    made.add_argument(
        "--sizes", type=int, nargs="+", default=[512, 768, 1024], help="longest sides"
    )
    made.add_argument("--parts", nargs="+", default=["detector", "backbone"])
    return made.parse_args()


if __name__ == "__main__":
    main()
