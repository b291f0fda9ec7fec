"""Everything that a GPU is needed for, in one call: check the kernels, then time them and training.

    python benchmarks/gpu.py [--write]
    python benchmarks/gpu.py --tiny [--only attention.py]    # the same on a CPU, in small

First the tests of tests/gpu, which compare every kernel with eager on the device. Then attention
with positions beside flash attention without any bias, forward and with its backward pass, and its
growth with the image; ViT-B's backbone, detector and training step beside detectron2's. Every step
is a benchmark with its own table and checks, in bfloat16, with its share of the rate of a large
matrix product. One that fails does not stop the others. With --write they write
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from vitdet.utils.env import describe

ROOT = Path(__file__).resolve().parents[1]
BF16 = ["--dtype", "bfloat16"]
PEER = ["--peers", "detectron2"]
# The windows and the map of one image of 1024 pixels, and of four.
SIZES = ["--sizes", "25x14x14", "1x64x64", "100x14x14", "4x64x64"]


def steps(tiny: bool) -> list[list[str]]:
    """Return the commands, words after `python benchmarks/`."""
    small = ["--device", "cpu", "--threads", "1", "--repeat", "1"] if tiny else []
    sizes = ["--sizes", "2x5x5", "1x8x4"] if tiny else SIZES
    sides = ["--sides", "64"] if tiny else []
    net = ["--model", "tiny", "--size", "64"] if tiny else []
    detector = ["--tiny"] if tiny else []
    found = []
    for backward in ([], ["--backward"]):
        found.append(["attention.py", *BF16, *backward, *small, *sizes])
        if not (tiny and backward):
            found.append(["attention.py", "--growth", *BF16, *backward, *small, *sides])
    for backward in ([], ["--backward"]):
        found.append(["backbone.py", *PEER, *BF16, *backward, *small, *net])
    for mode in ([], ["--train"]):
        found.append(["detector.py", *BF16, *mode, *small, *detector])
    return found


def run(*words: str) -> list[str]:
    """Run Python with these words; return the command if it failed."""
    command = f"python {' '.join(words)}"
    print(f"\n$ {command}", flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], check=False, cwd=ROOT, env=environment)
    return [command] if done.returncode else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    parser.add_argument("--only", help="steps of this script alone")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --tiny runs the same steps on a CPU")
    print(describe(), flush=True)
    failed = [] if args.tiny else run("-m", "pytest", "-q", "tests/gpu")
    for script, *words in steps(args.tiny):
        if args.only in (None, script):
            failed += run(f"benchmarks/{script}", *words, *(["--write"] if args.write else []))
    if failed:
        raise SystemExit("\n".join(["", "Failed:", *failed]))


if __name__ == "__main__":
    main()
