"""`vitdet replay FILE`: run the batch of a bad step again, as a whole and image by image."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vitdet import checkpoint
from vitdet.config import build_model, load_config
from vitdet.engine.bad_steps import file_names, read_step, step_seed
from vitdet.engine.checkpoints import last_checkpoint
from vitdet.engine.examine import Finding, examine
from vitdet.engine.losses import Batch, DetectorLoss, cut
from vitdet.engine.trainer import HeadStatistics
from vitdet.utils.checks import fail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("file", type=Path, help="a file of a run's folder bad_steps")
    parser.add_argument("--config-file", type=Path, help="recipe; by default the run's config.yaml")
    parser.add_argument(
        "--weights", type=Path, help="by default those in FILE, or the run's last checkpoint"
    )


def run(args: argparse.Namespace) -> int:
    """Print what is found; 1 when all is finite with these weights."""
    content, batch = read_step(args.file)
    loss, source = _loss(args, content)
    print(f"{args.file}: {content['reason']}")
    print(f"weights of {source}, computed in {content['autocast'] or 'float32'}")
    found = []
    for name, each in replay(loss, content, batch):
        found.append(bool(each))
        print(f"{name}: {line(each)}", flush=True)
    return 0 if any(found) else 1


def replay(
    loss: DetectorLoss, content: dict[str, Any], batch: Batch
) -> Iterator[tuple[str, Finding]]:
    """Yield ("the batch", what the step gives), then the name of every image and what it gives.

    The step has the random numbers that it had in the run. An image alone has others where the
    model draws some (stochastic depth), not for its proposals.

    Args:
        loss: of the detector, in training mode.
        content: of the file.
        batch: its images.
    """
    seed = step_seed(content["seed"], content["images_seen"], content["rank"])
    dtype = _dtype(content)
    with HeadStatistics():
        yield "the batch", examine(loss, cut(batch, content["accumulate"]), seed, dtype)
        for name, record in zip(file_names(batch), batch, strict=True):
            yield name, examine(loss, [[record]], seed, dtype)


def line(found: Finding) -> str:
    """Return the losses, the norm of the gradient, and what is not finite, in a line."""
    parts = [f"{name}={value:.4g}" for name, value in found.losses.items()]
    if found:
        return ", ".join(parts) + f"; {found.text({})}"
    return ", ".join([*parts, f"norm of the gradient {found.grad_norm:.4g}"])


def _loss(args: argparse.Namespace, content: dict[str, Any]) -> tuple[DetectorLoss, Path]:
    folder = args.file.resolve().parent.parent
    cfg = load_config(args.config_file or folder / "config.yaml")
    detector = build_model(cfg.model, device="cuda" if torch.cuda.is_available() else "cpu")
    source = args.weights or (args.file if "model" in content else last_checkpoint(folder))
    if source is None:
        fail(
            f"weights to replay {args.file}",
            expected="--weights, weights in the file, or a checkpoint of its run",
            got=f"none in {folder}",
            remedy="Only the first bad step of a run has weights: give --weights.",
        )
    state, _ = checkpoint.weights_of(
        content if source == args.file else checkpoint.read(source), source=str(source)
    )
    checkpoint.load_weights(detector, state, source=str(source))
    return DetectorLoss(detector.train(), seed=content["seed"]), source


def _dtype(content: dict[str, Any]) -> torch.dtype | None:
    return getattr(torch, content["autocast"]) if content["autocast"] else None
