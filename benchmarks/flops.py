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

PROPOSALS, MASKS = 1000, 100
Part = tuple[nn.Module, Any]


def written_out(model: DictConfig) -> None:
    """Choose kernels that the counter looks into."""
    for backbone in (model.backbone.get("net"), model.backbone.get("bottom_up")):
        name = "" if backbone is None else str(backbone._target_)
        if "vitdet." in name:  # detectron2's have no such choice
            backbone.attention_backend = "eager"
        if "MsViT" in name:
            backbone.sliding_chunk_backend = "autograd"


def heads(model: Any, levels: list[torch.Tensor]) -> Iterator[Part]:
    """Yield the heads of a detector and what goes into them."""
    if hasattr(model, "head"):  # RetinaNet
        yield model.head, levels
        return
    rpn, rois = model.proposal_generator, model.roi_heads
    yield rpn.rpn_head, [levels[i] for i in range(len(rpn.in_features))]
    channels = levels[0].shape[1]
    box = torch.zeros(PROPOSALS, channels, 7, 7, device="meta")
    if isinstance(rois.box_head, nn.ModuleList):
        pairs = zip(rois.box_head, rois.box_predictor, strict=True)
    else:
        pairs = [(rois.box_head, rois.box_predictor)]
    for head, predictor in pairs:
        yield nn.Sequential(head, predictor), box
    if rois.mask_on:
        layers = nn.Sequential(*rois.mask_head.children())
        yield layers, torch.zeros(MASKS, channels, 14, 14, device="meta")


def count(path: Path) -> tuple[int, float]:
    """Return parameters, and 10^12 multiply-adds for one image."""
    cfg = load_config(path)
    written_out(cfg.model)
    model: Any = build_model(cfg.model, device="meta").eval()
    side = cfg.model.backbone.get("square_pad", 0)
    size = (side, side) if side else (800, 1344)
    image = torch.zeros(1, 3, *size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        levels = list(model.backbone(image).values())
        for part, given in heads(model, levels):
            part(given)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e12


def main() -> None:
    """Print a line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=Path, metavar="FILE")
    for path in parser.parse_args().recipes:
        parameters, flops = count(path)
        print(f"{path}: {parameters / 1e6:.2f} M, {flops:.2f} T", flush=True)


if __name__ == "__main__":
    main()
