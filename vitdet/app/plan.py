"""`vitdet plan CONFIG`: what a training of a recipe takes, and which way of it fits this machine.

Memory is that of `vitdet.costs`: every tensor of a step is followed without being computed. The
time is what the step's matrix products take at the rate that one product reaches here.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vitdet import costs
from vitdet.config import build_model, load_config
from vitdet.layers.linear import linear
from vitdet.utils.checks import fail
from vitdet.utils.precision import autocast_dtype

_GIB = 2**30
_STATE = 3  # weights, and the two averages of AdamW
_SIZES = {"cpu": (4096, 768, 3072), "cuda": (8192, 8192, 8192)}  # of the timed matrix product
_ROUNDS = 3
# A step's products reach about this share of the rate of one large product; norms, activations,
# sampling and losses take the rest of the time.
_SHARE = {"cpu": 0.5, "cuda": 0.3}


@dataclass(frozen=True)
class Way:
    """A way to train: which blocks are computed again, and what that takes.

    Attributes:
        name: "none", "every second" or "all".
        setting: the override of the recipe, "" for none.
        fixed: bytes of a step whatever the batch, all state included.
        image: bytes that every image adds.
        flops: operations of an image.
    """

    name: str
    setting: str
    fixed: int
    image: int
    flops: float

    def memory(self, batch: int) -> int:
        """Return the bytes of a step with so many images."""
        return self.fixed + batch * self.image

    def largest(self, free: int, most: int) -> int:
        """Return the largest batch that fits into `free` bytes and divides `most`, 0 for none."""
        fitting = (n for n in range(most, 0, -1) if most % n == 0 and self.memory(n) <= free)
        return next(fitting, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("config", type=Path, help="a recipe")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to it"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--processes", type=int, default=1, help="that share the batch")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of each; left out: what is free here"
    )
    parser.add_argument(
        "--rate", type=float, metavar="GFLOPS", help="matrix rate; left out: measured here"
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; return 0, or 1 when not even one image fits.

    Raises:
        InputError: a recipe that does not load, a wrong option.
    """
    cfg = load_config(args.config, args.overrides)
    _check(args, cfg)
    device = _device(args.device)
    dtype = autocast_dtype(cfg.train.precision, torch.device(device))
    total = cfg.dataloader.train.total_batch_size
    free = int(args.memory * _GIB) if args.memory else free_memory(device)
    rate = args.rate * 1e9 if args.rate else matrix_rate(device, dtype)
    found = ways(cfg, dtype, device)
    share = total // args.processes
    lines = [*_head(args, cfg, device, dtype, free, rate), ""]
    lines += _table(found, free, share, rate * _SHARE[device])
    best = max(found, key=lambda way: way.largest(free, share))  # of equals the first
    print("\n".join([*lines, "", _advice(best, free, share)]))
    return 0 if best.largest(free, share) else 1


def ways(cfg: DictConfig, dtype: torch.dtype | None, device: str) -> list[Way]:
    """Return the ways to train a recipe, from the fastest to the one with the least memory."""
    detector = build_model(cfg.model, device="meta")
    name = costs.checkpointed(detector)
    backbone: Any = detector.get_submodule(name)
    depth = backbone.num_layers if name else 0
    choices = {"none": range(0), "every second": range(1, depth, 2), "all": range(depth)}
    found = []
    for kind, blocks in choices.items():
        if depth == 0 and kind != "none":
            continue
        chosen = list(blocks) if depth else None
        one, two = (
            costs.training_memory(
                cfg.model, batch=n, dtype=dtype, checkpoint_blocks=chosen, device=device
            )
            for n in (1, 2)
        )
        image = two.peak - one.peak
        fixed = one.peak - image + _state(cfg)
        setting = f'"model.{name}.checkpoint_blocks={chosen}"' if chosen else ""
        found.append(Way(kind, setting, fixed, image, one.flops))
    return found


def _state(cfg: DictConfig) -> int:
    """Return the bytes of weights, AdamW's averages and the moving average of the weights."""
    model = build_model(cfg.model, device="meta")
    copies = _STATE + (cfg.train.get("ema_decay") is not None)
    return copies * sum(p.numel() * p.element_size() for p in model.parameters())


def matrix_rate(device: str, dtype: torch.dtype | None) -> float:
    """Return the operations a second of one large matrix product here."""
    rows, inner, columns = _SIZES[device]
    kind = dtype or torch.float32
    x = torch.randn(rows, inner, device=device, dtype=kind)
    weight = torch.randn(columns, inner, device=device, dtype=kind)
    times = []
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):
            started = time.perf_counter()
            linear(x, weight)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return 2.0 * rows * inner * columns / min(times[1:])


def free_memory(device: str) -> int:
    """Return the bytes of memory that are free on the device.

    Raises:
        InputError: a system that does not tell.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    table = Path("/proc/meminfo")
    text = table.read_text() if table.is_file() else ""
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    fail("free memory", expected="/proc/meminfo", got="none", remedy="Add --memory GIB.")


def _check(args: argparse.Namespace, cfg: DictConfig) -> None:
    for key in ("model", "dataloader", "train"):
        if key not in cfg:
            remedy = "Choose a recipe of a detector; those of configs/backbones train nothing."
            fail(str(args.config), expected=f"a key {key!r}", got=str(list(cfg)), remedy=remedy)
    for name in ("memory", "rate"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            fail(f"--{name}", expected="more than 0", got=value, remedy="Leave it out to measure.")
    total = cfg.dataloader.train.total_batch_size
    if args.processes < 1 or total % args.processes:
        remedy = "Change one of them."
        expected = f"a number that divides dataloader.train.total_batch_size ({total})"
        fail("--processes", expected=expected, got=args.processes, remedy=remedy)


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device", expected="a GPU", got="none here", remedy="Use --device cpu.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


# --- text -----------------------------------------------------------------------------------------


def _head(
    args: argparse.Namespace,
    cfg: DictConfig,
    device: str,
    dtype: torch.dtype | None,
    free: int,
    rate: float,
) -> list[str]:
    parameters, multiply_adds = costs.count(cfg.model)
    height, width = costs.image_size(cfg.model)
    what = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {_threads()}"
    kind = str(dtype or torch.float32).removeprefix("torch.")
    total = cfg.dataloader.train.total_batch_size
    return [
        f"recipe       {args.config}",
        f"parameters   {parameters / 1e6:.2f} M; {_state(cfg) / _GIB:.2f} GiB with the optimizer's "
        "averages",
        f"inference    {multiply_adds / 1e12:.3f} T multiply-adds an image of {height} x {width}",
        f"device       {what}, {kind}: {rate / 1e9:.0f} GFLOP/s, {free / _GIB:.2f} GiB free",
        f"batch        {total} images a step, {total // args.processes} a process",
    ]


def _threads() -> str:
    threads = torch.get_num_threads()
    return f"{threads} thread" + "s" * (threads > 1)


def _table(found: list[Way], free: int, share: int, speed: float) -> list[str]:
    names = ("recomputed", "GiB with 1 image", "an image more", "batch that fits", "in parts")
    rows: list[tuple[Any, ...]] = [(*names, "s a step, about")]
    for way in found:
        batch = way.largest(free, share)
        rows.append(
            (
                way.name,
                f"{way.memory(1) / _GIB:.3f}",
                f"{way.image / _GIB:.3f}",
                batch or "none",
                share // batch if batch else "-",
                f"{way.flops * share / speed:.2f}",
            )
        )
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(names) + 1)]
    return [
        "  ".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _advice(best: Way, free: int, share: int) -> str:
    batch = best.largest(free, share)
    if not batch:
        return f"Not even one image fits into {free / _GIB:.2f} GiB."
    text = f"Fits: {batch} of {share} images at once" + f" with {best.setting}" * bool(best.setting)
    if batch < share:
        parts = share // batch
        text += f"; {parts} times as many processes, or {parts} parts one after the other, for all"
    return text + "."
