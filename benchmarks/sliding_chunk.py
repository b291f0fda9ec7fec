"""Time and memory of the Vision Longformer's attention on a CPU.

    python benchmarks/sliding_chunk.py [--part kernels | kinds] [--repeat 3] [--write]

"kernels": every kernel of the sliding chunks and "rolled", the published algorithm in its einsum
form: the map of keys is rolled to each of the nine neighbours, the nine products are put together,
and the same again for the values. On the same inputs, in turn, in one run; results are compared
first. "kinds": a backbone of the tiny size with one kind of attention in all stages, one image of
256 to 1344 pixels, forward and backward, each in its own process, and the same with "rolled". Its
"growth" is the power of the number of pixels with which time and memory grow from the second size
to the last that was measured: 1 is linear, 2 quadratic.

Times are seconds of processor time on one thread, so that other programs disturb them little.
"kept" is what autograd holds between forward and backward, "peak" the growth of the process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from common import MIB, Table, in_own_process, parser, peak_memory, write

from vitdet.backbones.msvit import MsViT
from vitdet.backbones.msvit.sliding_chunk import (
    KERNELS,
    ChunkGrid,
    Chunks,
    sliding_chunk_attention,
)

WINDOW, HEAD_DIM = 7, 32
# what, heads, height, width in tokens: ViL-Small on 800 x 1344 pixels, and a quarter of it
MAPS = [
    ("stage 1, 400 x 672 px", 3, 100, 168),
    ("stage 1, 800 x 1344 px", 3, 200, 336),
    ("stage 3, 800 x 1344 px", 6, 50, 84),
]
COMPARED = ("rolled", "strips", "autograd")
TOLERANCE = 2e-4

# name: attention, its size in the four stages, and the longest side that is measured
KINDS: dict[str, tuple[str, list[int], int]] = {
    "vil": ("vil", [7, 7, 7, 7], 1344),
    "vil, rolled": ("vil", [7, 7, 7, 7], 1344),
    "only_global": ("only_global", [1, 1, 1, 1], 1344),
    "srformer 32": ("srformer", [8, 4, 2, 1], 1344),
    "linformer": ("linformer", [256, 256, 256, 256], 1344),
    "performer": ("performer", [256, 256, 256, 256], 1344),
    "full": ("full", [1, 1, 1, 1], 800),
}
SIDES = (256, 512, 800, 1024, 1344)

Tensors = list[torch.Tensor]


# --- kernels -----------------------------------------------------------------------------------


def inputs(heads: int, height: int, width: int) -> Tensors:
    """Return q, k, v, keys and values of one global token, table, bias of the global token."""
    torch.manual_seed(0)
    maps = [torch.randn(1, heads, height, width, HEAD_DIM) for _ in range(3)]
    over = [torch.randn(1, heads, 1, HEAD_DIM) for _ in range(2)]
    side = 4 * WINDOW - 1
    tensors = [*maps, *over, torch.randn(heads, side, side), torch.randn(heads, 1)]
    return [tensor.requires_grad_() for tensor in tensors]


def rolled(x: Chunks, grid: ChunkGrid) -> torch.Tensor:
    """Attend by rolling the map of chunks to its nine neighbours, all scores at once."""
    B, N, _, _, area, _ = x.q.shape
    # (B * N, D, rows, columns, w * w), and (B * N, G, D)
    q, k, v = (chunks.flatten(0, 1).movedim(-1, 1) for chunks in (x.q, x.k, x.v))
    k_global, v_global = x.k_global.flatten(0, 1), x.v_global.flatten(0, 1)
    shifts = [(-row, -column) for row, column in grid.slots]

    def neighbours(chunks: torch.Tensor) -> Tensors:
        return [torch.roll(chunks, shift, (2, 3)) for shift in shifts]

    over = torch.einsum("ncxyi,ngc->nxyig", q, k_global)
    scores = [torch.einsum("ncxyi,ncxyj->nxyij", q, near) for near in neighbours(k)]
    scores = torch.cat([over, *scores], -1)
    if x.bias is not None:
        scores = scores + x.bias.expand(N, -1, -1).repeat(B, 1, 1)[:, None, None]
    num_global = k_global.shape[1]
    unseen = torch.nn.functional.pad(grid.unseen(q.device), (num_global, 0))
    weights = scores.masked_fill(unseen[None, :, :, None], -torch.inf).softmax(-1)
    out = torch.einsum("nxyig,ngc->ncxyi", weights[..., :num_global], v_global)
    parts = weights[..., num_global:].split(area, -1)
    for part, near in zip(parts, neighbours(v), strict=True):
        out = out + torch.einsum("nxyij,ncxyj->ncxyi", part, near)
    return out.movedim(1, -1).unflatten(0, (B, N))


KERNELS["rolled"] = rolled


def kernel(name: str) -> Callable[..., torch.Tensor]:
    def run(*tensors: torch.Tensor) -> torch.Tensor:
        *five, table, bias = tensors
        grid = ChunkGrid(tensors[0].shape[2], tensors[0].shape[3], WINDOW)
        return sliding_chunk_attention(*five, grid, table=table, global_bias=bias, backend=name)

    return run


def kept(run: Callable[..., torch.Tensor], tensors: Tensors) -> int:
    """Return the bytes that autograd holds after a forward pass, beside the inputs."""
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    held: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run(*tensors)
    del out
    return sum(size for place, size in held.items() if place not in given)


def compare_kernels(heads: int, height: int, width: int, repeat: int) -> dict[str, list[float]]:
    """Return forward seconds, forward and backward seconds, MiB kept of every kernel."""
    tensors = inputs(heads, height, width)
    todo = {name: kernel(name) for name in COMPARED}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
    expected: Tensors = []

    def once(name: str) -> tuple[float, float]:
        started = time.process_time()
        out = todo[name](*tensors)
        forward = time.process_time() - started
        found = [out.detach(), *torch.autograd.grad(out.square().mean(), tensors)]
        both = time.process_time() - started
        expected.extend(found if not expected else [])
        for got, want in zip(found, expected, strict=True):
            error = float((got - want).norm() / want.norm())
            if error > TOLERANCE:
                raise SystemExit(f"{name} differs from rolled by {error} of the norm")
        return forward, both

    for name in todo:
        once(name)
    for _ in range(repeat):
        for name, seen in times.items():
            seen.append(once(name))
    columns = {name: zip(*seen, strict=True) for name, seen in times.items()}
    medians = {name: [statistics.median(each) for each in both] for name, both in columns.items()}
    return {name: [*medians[name], kept(todo[name], tensors) / MIB] for name in todo}


def kernels_table(repeat: int) -> list[str]:
    names = ("map", "kernel", "forward s", "forward + backward s", "kept MiB", "rolled / it")
    table = Table(*names, left=2)
    for what, *size in MAPS:
        found = compare_kernels(*size, repeat)
        for name, (forward, both, memory) in found.items():
            ratio = found["rolled"][1] / both
            seconds = (f"{forward:.2f}", f"{both:.2f}")
            table.add(what, name, *seconds, f"{memory:.0f}", f"{ratio:.2f}")
    return table.lines


# --- kinds -------------------------------------------------------------------------------------


def measure_kind(name: str, side: int) -> tuple[float, float]:
    """Return seconds and MiB of a forward and backward pass of one image, in this process."""
    kind, sizes, _ = KINDS[name]
    torch.manual_seed(0)
    net = MsViT(
        embed_dim=[48, 96, 192, 384],
        depth=[1, 1, 9, 1],
        num_heads=[1, 3, 3, 6],
        patch_size=[4, 2, 2, 2],
        num_global_tokens=[1, 1, 1, 1],
        attention=kind,
        attention_size=sizes,
        use_abs_pos=True,
        img_size=1344,
        sliding_chunk_backend="rolled" if name.endswith("rolled") else "auto",
    )
    image = torch.randn(1, 3, side, side)

    def step() -> None:
        sum(level.square().mean() for level in net(image).values()).backward()

    started = time.process_time()
    peak = peak_memory(step)
    return time.process_time() - started, peak / MIB


def kinds_table() -> list[str]:
    table = Table("attention", *(f"{side} px: s, MiB" for side in SIDES), "growth: s, MiB")
    for name, (_, _, largest) in KINDS.items():
        found: dict[int, tuple[float, float]] = {}
        for side in (side for side in SIDES if side <= largest):
            found[side] = in_own_process(__file__, "--one", name, str(side))
        cells = [
            f"{found[side][0]:.2f}, {found[side][1]:.0f}" if side in found else "-"
            for side in SIDES
        ]
        small, large = SIDES[1], max(found)
        pixels = math.log((large / small) ** 2)
        ratios = [after / before for before, after in zip(found[small], found[large], strict=True)]
        cells.append(", ".join(f"{math.log(ratio) / pixels:.2f}" for ratio in ratios))
        table.add(name, *cells)
    return table.lines


def main() -> None:
    made = parser(__doc__, repeat=3, threads=1)
    made.add_argument("--part", choices=["kernels", "kinds"], default="kernels")
    made.add_argument("--one", nargs=2, metavar=("KIND", "SIDE"), help=argparse.SUPPRESS)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure_kind(args.one[0], int(args.one[1]))))
        return
    lines = kernels_table(args.repeat) if args.part == "kernels" else kinds_table()
    if args.write:
        about = "Attention of the Vision Longformer, float32, processor time."
        write(f"sliding_chunk_{args.part}", about, lines)


if __name__ == "__main__":
    main()
