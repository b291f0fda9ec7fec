"""Time attention with decomposed relative positions: every kernel on the same inputs, in turn.

    python benchmarks/attention.py [--threads 2] [--repeat 5] [--write]

A row is a window or global block of ViT-B. "none" is torch's fused attention without any bias: the
floor. "factorised" and "blocked" are the two ways of the sdpa kernel, which takes blocked on a CPU
without gradients and factorised otherwise. Before timing, each result is compared with eager.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from vitdet.layers.kernels import eager, sdpa
from vitdet.layers.rel_pos import RelPos

# (windows, height, width) in tokens: 14 x 14 windows of a 1024 px image, global maps of 512 and
# 1024 px, a rectangle
SIZES = [(25, 14, 14), (1, 32, 32), (1, 24, 48), (1, 64, 64)]
HEADS, HEAD_DIM = 12, 64
TOLERANCE = 2e-5


def inputs(size: tuple[int, int, int], gradients: bool) -> list[torch.Tensor]:
    batch, height, width = size
    torch.manual_seed(0)
    L = height * width
    shapes = [(batch, HEADS, L, HEAD_DIM)] * 3
    shapes += [(batch, HEADS, L, height), (batch, HEADS, L, width)]
    return [torch.randn(shape, requires_grad=gradients) for shape in shapes]


def kernels() -> dict[str, Callable[..., torch.Tensor]]:
    scale = HEAD_DIM**-0.5

    def with_bias(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda q, k, v, h, w: kernel(q, k, v, RelPos(h, w), scale)

    return {
        "none": lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, scale=scale),
        "eager": with_bias(eager.attention),
        "factorised": with_bias(sdpa.factorised),
        "blocked": with_bias(sdpa.blocked),
    }


def measure(size: tuple[int, int, int], gradients: bool, repeat: int) -> dict[str, float]:
    """Return the median seconds of each kernel, run in turn so that drift hits all alike."""
    tensors = inputs(size, gradients)
    todo = kernels()
    times: dict[str, list[float]] = {name: [] for name in todo}

    def run(name: str) -> torch.Tensor:
        out = todo[name](*tensors)
        if gradients:
            out.sum().backward()
        return out.detach()

    with torch.set_grad_enabled(gradients):
        expected = run("eager")
        for name in ("factorised", "blocked"):
            error = (run(name) - expected).abs().max().item()
            if error > TOLERANCE:
                raise SystemExit(f"{name} differs from eager by {error}")
        run("none")
        for _ in range(repeat):
            for name, seen in times.items():
                started = time.perf_counter()
                run(name)
                seen.append(time.perf_counter() - started)
    return {name: statistics.median(seen) for name, seen in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["| blocks x grid | gradients | " + " | ".join(kernels()) + " | eager / sdpa |"]
    lines.append("| --- | --- |" + " ---: |" * 5)
    for gradients in (False, True):
        for size in SIZES:
            seconds = measure(size, gradients, args.repeat)
            chosen = seconds["factorised" if gradients else "blocked"]
            cells = [f"{1e3 * value:.1f}" for value in seconds.values()]
            cells.append(f"{seconds['eager'] / chosen:.2f}")
            grid = f"{size[0]} x {size[1]}x{size[2]}"
            lines.append(f"| {grid} | {'yes' if gradients else 'no'} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if args.write:
        today = datetime.date.today().isoformat()
        path = Path(__file__).parent / "results" / f"attention_cpu{args.threads}_{today}.md"
        head = f"Attention with relative positions, ViT-B ({HEADS} heads of {HEAD_DIM}), float32, "
        head += f"milliseconds, median of {args.repeat}.\n{args.threads} threads of "
        head += f"{processor()}, torch {torch.__version__}, {today}.\n"
        head += "Made by `python benchmarks/attention.py --write`.\n\n"
        path.write_text(head + "\n".join(lines) + "\n")
        print(path)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
