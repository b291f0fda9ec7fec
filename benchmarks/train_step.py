"""Time a training step of Mask R-CNN on the plain ViT-B against detectron2's.

    python benchmarks/train_step.py [--batch 1] [--dtype bfloat16] [--tiny] [--write]

A step is forward, backward and AdamW of the whole detector, from uint8 images and their objects:
ours by `vitdet.engine.trainer` with the recipe's optimizer, theirs as detectron2's trainer takes it
with the optimizer of its zoo. Weights, images and objects are the same. Before timing, the losses
of every image are compared in float32, with the same anchors and proposals sampled on both sides.
Another type is autocast on both sides. Peak memory is above weights, gradients and the optimizer's
state, "in all" with them; on a CPU each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from common import DTYPES, MIB, Table, Times, in_turn, peak_memory, write
from detector import OURS, RECIPE, THEIRS, Batch, arguments, detector, images, measured
from detectron2 import model_zoo
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from vitdet.config import instantiate, load_config
from vitdet.engine.losses import DetectorLoss
from vitdet.engine.trainer import Trainer
from vitdet.utils.env import random_state, seed_from
from vitdet.utils.quiet import quiet_dependencies

OBJECTS, SEED = 12, 0
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
TOLERANCE = 1e-2  # of a loss: a proposal more or less among equals changes it a little
Losses = dict[str, torch.Tensor]


def training_images(count: int, tiny: bool) -> Batch:
    """Return images with objects, and the position of each in the stream of the run."""
    batch = images(count, tiny)
    generator = torch.Generator().manual_seed(2)
    for position, record in enumerate(batch):
        height, width = record["height"], record["width"]
        size = torch.tensor([width, height])
        corners = (0.7 * size * torch.rand(OBJECTS, 2, generator=generator)).round()
        sides = (size * (0.1 + 0.2 * torch.rand(OBJECTS, 2, generator=generator))).round()
        boxes = torch.cat([corners, corners + sides], 1)
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        objects = Instances((height, width), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        objects.gt_classes = torch.randint(80, (OBJECTS,), generator=generator)
        record |= {"instances": objects, "position": position}
    return batch


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW as the recipe or detectron2's zoo describes it."""
    if name == OURS:
        node = load_config(RECIPE).optimizer
        return instantiate({**node, "model": model})
    node: Any = model_zoo.get_config("common/optim.py").AdamW
    node.params.model = model
    return instantiate(node)


def stepper(
    name: str, model: nn.Module, batch: Batch, args: argparse.Namespace
) -> Callable[[], object]:
    """Return a training step to run without arguments."""
    model.train()
    if name == OURS:
        trainer = Trainer(
            model,
            optimizer(name, model),
            lambda _: 0.0,  # the weights stay what they are
            precision=PRECISIONS[args.dtype],
            seed=SEED,
        )

        def ours() -> None:
            with trainer.statistics:
                trainer.step(batch)

        return ours

    theirs = optimizer(name, model)
    for group in theirs.param_groups:
        group["lr"] = 0.0

    def step() -> None:
        with EventStorage():
            theirs.zero_grad(set_to_none=True)
            with torch.autocast(args.device, DTYPES[args.dtype], args.dtype != "float32"):
                losses = model(batch)
            sum(losses.values()).backward()
            theirs.step()

    return step


def losses_of(name: str, model: nn.Module, record: dict[str, Any]) -> Losses:
    """Return the losses of one image, its anchors and proposals sampled under its own seed."""
    model.train()
    with torch.no_grad(), EventStorage(), torch.backends.cudnn.flags(allow_tf32=False):
        if name == OURS:
            return DetectorLoss(model, seed=SEED)([record])
        with random_state(seed_from(SEED, record["position"])):
            return model([record])


def compare(models: dict[str, nn.Module], batch: Batch) -> str:
    """Return how far the losses are apart; stop where they are others."""
    worst = 0.0
    for record in batch:
        mine, theirs = (losses_of(name, models[name], record) for name in (OURS, THEIRS))
        if mine.keys() != theirs.keys():
            raise SystemExit(f"losses differ: {sorted(mine)}, {sorted(theirs)}")
        for key, value in theirs.items():
            away = ((mine[key] - value).abs() / value.abs().clamp(min=1e-3)).item()
            if not away <= TOLERANCE:
                raise SystemExit(f"{key}: {mine[key].item():.6g} for {value.item():.6g}")
            worst = max(worst, away)
    return f"Losses of every image agree within {worst:.1g} of their value."


def one(name: str, args: argparse.Namespace) -> list[float]:
    """Return the peak of a step above what is held between steps, and in all, in MiB."""
    model = detector(name, args.tiny, args.device)
    step = stepper(name, model, training_images(args.batch, args.tiny), args)
    step()  # gradients and the optimizer's state are there now
    peak = peak_memory(step, args.device)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return [peak / MIB, (peak + 4 * held) / MIB]


def rows(times: dict[str, Times], peaks: dict[str, list[float]], batch: int) -> list[str]:
    """Return the table of both."""
    table = Table(
        "detector", "s a step", "range", "images/s", "over ours", "range", "peak MiB", "in all"
    )
    for name, seen in times.items():
        table.add(
            *(name, f"{seen.median:.3f}", seen.range(digits=3), f"{batch / seen.median:.2f}"),
            *(f"{seen.ratio(times[OURS]):.2f}", seen.ratio_range(times[OURS])),
            *(f"{value:.0f}" for value in peaks[name]),
        )
    return table.lines


def compared(args: argparse.Namespace) -> list[str]:
    """Return the table of ours and detectron2's, and how their losses agree."""
    batch = training_images(args.batch, args.tiny)
    models = {name: detector(name, args.tiny, args.device) for name in (OURS, THEIRS)}
    agreement = compare(models, batch)
    todo = {name: stepper(name, model, batch, args) for name, model in models.items()}
    times = in_turn(todo, args.repeat)
    del models, todo
    peaks = {name: measured(__file__, name, args) for name in times}
    lines = [*rows(times, peaks, args.batch), "", agreement]
    print(agreement)
    return lines


def main() -> None:
    args = arguments(__doc__).parse_args()
    quiet_dependencies()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args.one, args)))
        return
    lines = compared(args)
    if args.write:
        size = "tiny" if args.tiny else "b"
        about = f"A training step of Mask R-CNN, ViT-{size.upper()}, batch {args.batch}, "
        about += f"{args.dtype}, the same weights and images; median of {args.repeat} rounds in "
        about += "turn.\nPeak memory is above weights, gradients and the optimizer's state, which "
        about += '"in all" has too.'
        write(f"train_step_{size}_batch{args.batch}_{args.dtype}", about, lines, device=args.device)


if __name__ == "__main__":
    main()
