"""Count parameters and multiply-adds of recipes, without a GPU, weights or memory.

    python benchmarks/flops.py configs/COCO/mask_rcnn_vitdet_b_100ep.py [FILE ...]

The model is built on the meta device and its parts are run there under torch's FlopCounterMode:
convolutions and matrix products, attention written out; no norms and activations. One image of the
recipe's test size (padded to a square where the recipe pads, 800 x 1344 for ViL), 1000 proposals
for every box head, 100 for the mask head.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitdet.config import build_model, load_config

PROPOSALS, MASKS = 1000, 100  # an image in inference
_OPEN_SIZE = (800, 1344)  # of a recipe that pads to no square


def count(path: Path) -> tuple[int, float]:
    """Return parameters, and 10^12 multiply-adds for one image."""
    model = load_config(path).model
    _write_out(model)
    detector: Any = build_model(model, device="meta").eval()
    side = model.backbone.get("square_pad", 0)
    size = (side, side) if side else _OPEN_SIZE
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        levels = list(detector.backbone(torch.zeros(1, 3, *size, device="meta")).values())
        for layers, given in _heads(detector, levels):
            layers(given)
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    return parameters, counter.get_total_flops() / 2e12


def _write_out(model: DictConfig) -> None:
    """Choose kernels that the counter looks into."""
    for backbone in (model.backbone.get("net"), model.backbone.get("bottom_up")):
        if backbone is None:
            continue
        target = backbone._target_
        if target.__module__.startswith("vitdet."):  # detectron2's have no such choice
            backbone.attention_backend = "eager"
        if target.__name__ == "MsViT":
            backbone.sliding_chunk_backend = "autograd"


def _heads(detector: Any, levels: list[torch.Tensor]) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the heads of a detector and what goes into them."""
    if hasattr(detector, "head"):  # RetinaNet
        yield detector.head, levels
        return
    rpn, rois, channels = detector.proposal_generator, detector.roi_heads, levels[0].shape[1]
    yield rpn.rpn_head, levels[: len(rpn.in_features)]
    boxes = levels[0].new_empty(PROPOSALS, channels, 7, 7)
    cascade = isinstance(rois.box_head, nn.ModuleList)
    stages = (rois.box_head, rois.box_predictor)
    for stage in zip(*stages, strict=True) if cascade else [stages]:
        yield nn.Sequential(*stage), boxes
    if rois.mask_on:
        yield nn.Sequential(*rois.mask_head.children()), boxes.new_empty(MASKS, channels, 14, 14)


def main() -> None:
    """Print a line for each recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Path, metavar="FILE")
    for path in parser.parse_args().recipes:
        parameters, flops = count(path)
        print(f"{path}: {parameters / 1e6:.2f} M, {flops:.2f} T", flush=True)


if __name__ == "__main__":
    main()
