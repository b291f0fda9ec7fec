"""Count parameters and multiply-adds of recipes, without a GPU, weights or memory.

    python benchmarks/flops.py configs/COCO/mask_rcnn_vitdet_b_100ep.py [FILE ...]

The model is built on the meta device and its parts are run there under torch's FlopCounterMode:
convolutions and matrix products, attention written out; no norms and activations. One image of the
recipe's test size (padded to a square where the recipe pads, 800 x 1344 for ViL), 1000 proposals
for every box head, 100 for the mask head. `vitdet plan` counts the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vitdet import costs
from vitdet.config import load_config


def count(path: Path) -> tuple[int, float]:
    """Return parameters, and 10^12 multiply-adds for one image."""
    parameters, multiply_adds = costs.count(load_config(path).model)
    return parameters, multiply_adds / 1e12


def main() -> None:
    """Print a line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Path, metavar="FILE")
    for path in parser.parse_args().recipes:
        parameters, flops = count(path)
        print(f"{path}: {parameters / 1e6:.2f} M, {flops:.2f} T", flush=True)


if __name__ == "__main__":
    main()
