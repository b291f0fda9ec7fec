"""Train every tiny variant of configs/mini/variants for the same number of images; a table of AP.

    python benchmarks/variants.py [--images 6000] [--seeds 0] [--processes 2] [--only NAME ...]
        [--write]

Each training is `train_net.py` as a user runs it, on the embedded data set of drawn shapes, with
the recipe's optimizer and schedule, one variant after the other. The AP are of 200 held-out images.
With several seeds a cell is the mean and, behind +-, the standard deviation. Seconds are processor
time of all processes, so that other programs disturb them little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from common import Table, write
from detectron2.config import LazyConfig

from vitdet.config import build_model, load_config

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs/mini/variants"
FIRST = "global_attention"  # what the others change in one place
COLUMNS = (("box AP", "bbox", "AP"), ("AP50", "bbox", "AP50"), ("mask AP", "segm", "AP"))


class Run(NamedTuple):
    """What a training gave: numbers in the order of COLUMNS, and seconds of processor time."""

    scores: tuple[float, ...]
    seconds: float


def names() -> list[str]:
    """Return the variants, the one that the others change first."""
    found = LazyConfig.load(f"{FOLDER}.py", "recipes").rows
    return [FIRST, *(name for name in found if name != FIRST)]


def train(name: str, seed: int, images: int, processes: int) -> Run:
    """Train one variant and return its scores; its own output is shown where it fails."""
    before = _seconds_of_children()
    with tempfile.TemporaryDirectory(prefix="variant-") as folder:
        command = [sys.executable, "train_net.py", "--config-file", str(FOLDER / f"{name}.py")]
        command += ["--num-gpus", str(processes), f"train.output_dir={folder}"]
        command += [f"train.num_images={images}", f"train.checkpoint_every={images}"]
        command += [f"train.seed={seed}", f"schedule.warmup={min(800, images // 4)}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        results = json.loads((Path(folder) / "results.json").read_text())["results"]
    scores = tuple(float(results[task][key]) for _, task, key in COLUMNS)
    return Run(scores, _seconds_of_children() - before)


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def parameters(name: str) -> int:
    """Return the parameters of a variant."""
    model = build_model(load_config(FOLDER / f"{name}.py").model, device="meta")
    return sum(value.numel() for value in model.parameters())


def row(name: str, runs: list[Run]) -> list[str]:
    """Return the cells of a variant's line of the table."""
    cells = [f"`{name}`"]
    for values in zip(*(run.scores for run in runs), strict=True):
        cell = f"{statistics.mean(values):.1f}"
        if len(values) > 1:
            cell += f" +- {statistics.stdev(values):.1f}"
        cells.append(cell)
    cells.append(f"{parameters(name) / 1e6:.2f}")
    cells.append(f"{statistics.mean(run.seconds for run in runs):.0f}")
    return cells


def main() -> None:
    """Train, print, and write benchmarks/results/ where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6000, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    table = Table("variant", *(column[0] for column in COLUMNS), "parameters [M]", "processor s")
    for name in args.only:
        table.add(
            *row(name, [train(name, seed, args.images, args.processes) for seed in args.seeds])
        )
    if args.write:
        seeds = ", ".join(map(str, args.seeds))
        about = f"Tiny variants after {args.images} drawn images, seeds {seeds}, "
        about += f"{args.processes} process(es)."
        write(f"variants_shapes_{args.images}", about, table.lines)


if __name__ == "__main__":
    main()
