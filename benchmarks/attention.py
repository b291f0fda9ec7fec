"""Time attention with decomposed relative positions: every kernel on the same inputs, in turn.

    python benchmarks/attention.py [--backward] [--dtype bfloat16] [--write]
    python benchmarks/attention.py --growth [--backward] [--write]

A row is a window or global block of ViT-B (12 heads of 64): blocks x height x width in tokens.
"no bias" is torch's fused attention without positions: the floor, on CUDA flash attention.
Before timing, values and with --backward gradients are compared with eager in float32. "share" is
the rate of the matrix products that a pass needs (two forward, seven with the backward pass) over
that of one large product timed in the same rounds. "--growth" attends over whole images of 512 to
2048 pixels, as 4096 tokens at 1024, each in a process of its own: ours, what the references do, and
the floor; its last column is the power of the number of tokens with which time and memory grow.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    EXACT_MALLOC,
    MIB,
    MatrixProduct,
    Table,
    free_memory,
    in_own_process,
    in_turn,
    parser,
    peak_memory,
    process_memory,
    write,
)

from vitdet.layers.attention import KERNELS, attention, can_run
from vitdet.layers.positions import RelPos

# (blocks, height, width): the 14 x 14 windows of a 1024 px image, whole images, a rectangle
SIZES = ["25x14x14", "1x32x32", "1x24x48", "1x64x64"]
SIDES = (512, 768, 1024, 1536, 2048)
HEADS, HEAD_DIM, PATCH = 12, 64, 16
FLOOR, MATRIX = "no bias", "one matrix product"
# Of the largest entry.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
Tensors = list[torch.Tensor]
Run = Callable[[], Tensors]


# --- what is run ---------------------------------------------------------------------------------


def inputs(size: tuple[int, int, int], args: argparse.Namespace) -> Tensors:
    """Return qkv (B, L, 3, N, D) as the layer makes it, the terms of the bias, and a gradient."""
    B, H, W = size
    L = H * W
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, L, 3, HEADS, HEAD_DIM), (B, HEADS, L, H), (B, HEADS, L, W)]
    shapes += [(B, HEADS, L, HEAD_DIM)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    *leaves, gradient = (x.to(args.device, DTYPES[args.dtype]) for x in made)
    return [*(x.requires_grad_(args.backward) for x in leaves), gradient]


def attend(name: str, qkv: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Run one contender."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if name == FLOOR:
        return F.scaled_dot_product_attention(q, k, v)
    return attention(q, k, v, rel_pos=RelPos(h, w), backend=name)


def runner(name: str, tensors: Tensors, backward: bool) -> Run:
    """Return a pass to run without arguments; it returns the output and the gradients."""
    *leaves, gradient = tensors

    def run() -> Tensors:
        if not backward:
            with torch.no_grad():
                return [attend(name, *leaves)]
        out = attend(name, *leaves)
        wanted = leaves[:1] if name == FLOOR else leaves
        return [out.detach(), *torch.autograd.grad(out, wanted, gradient)]

    return run


def contenders(tensors: Tensors, args: argparse.Namespace) -> list[str]:
    """Return the names of all that can run for these inputs, the floor first."""
    qkv, h, w, _ = tensors
    q = qkv.permute(2, 0, 3, 1, 4)[0]
    with torch.set_grad_enabled(args.backward):
        able = [name for name in KERNELS if can_run(name, q, RelPos(h, w))]
    return [FLOOR, *able]


def compare(name: str, tensors: Tensors, args: argparse.Namespace) -> float:
    """Return the largest difference from eager in float32; stop where it is another result."""
    exact = [x.detach().float().requires_grad_(x.requires_grad) for x in tensors]
    expected = runner("eager", exact, args.backward)()
    found = runner(name, tensors, args.backward)()
    away = max(
        ((a.float() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(found, expected, strict=True)
    )
    if not away <= TOLERANCES[args.dtype]:
        raise SystemExit(f"{name} differs from eager by {away:.2g} of the largest entry")
    return away


def flops(size: tuple[int, int, int], backward: bool) -> float:
    """Return the operations of the matrix products of a pass."""
    B, H, W = size
    return (7 if backward else 2) * 2.0 * B * HEADS * (H * W) ** 2 * HEAD_DIM


def matrix_product(args: argparse.Namespace) -> MatrixProduct:
    """Return a product of the size of a global block's first MLP layer, larger on a GPU."""
    size = (4096, HEADS * HEAD_DIM, 4 * HEADS * HEAD_DIM)
    return MatrixProduct(*size, device=args.device, dtype=DTYPES[args.dtype])


# --- all kernels at some sizes -------------------------------------------------------------------


def compared(args: argparse.Namespace) -> list[str]:
    """Return the table of all kernels at all sizes."""
    table = Table("size", "kernel", "ms", "range", "over no bias", "share", "difference", left=2)
    product, rate = matrix_product(args), 0.0
    for text in args.sizes:
        size = parse_size(text)
        tensors = inputs(size, args)
        names = contenders(tensors, args)
        away = {name: compare(name, tensors, args) for name in names if name != FLOOR}
        runs: dict[str, Callable[[], object]] = {MATRIX: product}
        runs |= {name: runner(name, tensors, args.backward) for name in names}
        times = in_turn(runs, args.repeat)
        rate = product.flops / times[MATRIX].median
        for name in names:
            seen = times[name]
            table.add(
                *(text, name, f"{1e3 * seen.median:.2f}", seen.range(1e3)),
                f"{seen.ratio(times[FLOOR]):.2f}",
                f"{flops(size, args.backward) / seen.median / rate:.2f}",
                f"{away[name]:.1g}" if name in away else "",
            )
    note = f"The matrix product reached {rate / 1e12:.2f} TFLOP/s."
    print(note)
    return [*table.lines, "", note]


def parse_size(text: str) -> tuple[int, int, int]:
    """Return (blocks, height, width) of "1x64x64"."""
    blocks, height, width = map(int, text.split("x"))
    return blocks, height, width


# --- growth --------------------------------------------------------------------------------------


def one(name: str, args: argparse.Namespace) -> list[float]:
    """Return the median seconds of a pass and its peak memory in MiB above the inputs."""
    runner(name, inputs((1, 8, 8), args), args.backward)()  # threads and workspaces are there now
    run = runner(name, inputs(parse_size(args.sizes[0]), args), args.backward)
    peak = peak_memory(run, args.device) / MIB
    times = in_turn({name: run}, args.repeat, warm_up=0) if args.repeat else None
    return [times[name].median if times else 0.0, peak]


def measured(name: str, args: argparse.Namespace, side: int) -> tuple[float, float]:
    """Run `one` in fresh processes: one for the time, one with exact accounts for memory."""
    places = side // PATCH
    words = [__file__, "--one", name, "--sizes", f"1x{places}x{places}", "--dtype", args.dtype]
    words += ["--device", args.device, "--threads", str(args.threads)]
    words += ["--backward"] * args.backward
    seconds, _ = in_own_process(*words, "--repeat", str(args.repeat))
    _, peak = in_own_process(*words, "--repeat", "0", environment=EXACT_MALLOC)
    return seconds, peak


def fits(name: str, args: argparse.Namespace, side: int) -> bool:
    """Whether the L x L matrices of eager fit: three at a time forward, five with gradients."""
    matrix = HEADS * (side // PATCH) ** 4 * DTYPES[args.dtype].itemsize
    return name != "eager" or (5 if args.backward else 3) * matrix < free_memory(args.device)


def growth_table(
    names: Mapping[str, str],
    sides: Sequence[int],
    measure: Callable[[str, int], tuple[float, float] | None],
) -> list[str]:
    """Return a table of the ms and MiB that `measure` gives, None for what does not fit."""
    table = Table("", *(f"{side} px: ms, MiB" for side in sides), "power: ms, MiB")
    for name, title in names.items():
        found = {side: seen for side in sides if (seen := measure(name, side))}
        cells = [
            "{:.2f}, {:.0f}".format(*found[s]) if s in found else "does not fit" for s in sides
        ]
        first, last = min(found), max(found)
        tokens = 2 * math.log(last / first)  # how much their logarithm grows
        ends = zip(found[first], found[last], strict=True)
        powers = [f"{math.log(b / a) / tokens:.2f}" for a, b in ends if a and b and tokens]
        table.add(title, *cells, ", ".join(powers))
    return table.lines


def growth(args: argparse.Namespace) -> list[str]:
    """Return the table of image sizes."""

    def measure(name: str, side: int) -> tuple[float, float] | None:
        if not fits(name, args, side):
            return None
        seconds, peak = measured(name, args, side)
        return 1e3 * seconds, peak

    names = {"auto": "vitdet", "eager": "L x L bias", FLOOR: FLOOR}
    lines = growth_table(names, args.sides, measure)
    free = process_memory("MemTotal", "/proc/meminfo") / MIB / 1024
    note = f"Memory is above the inputs. This machine has {free:.0f} GiB"
    if args.device == "cuda":
        note += f", its GPU {torch.cuda.mem_get_info()[1] / MIB / 1024:.0f}"
    return [*lines, "", f"{note}."]


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--sizes", nargs="+", default=SIZES, metavar="BxHxW")
    made.add_argument("--dtype", choices=DTYPES, default="float32")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--backward", action="store_true", help="forward and backward")
    made.add_argument("--growth", action="store_true", help="several image sizes instead")
    made.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of --growth")
    made.add_argument("--one", help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args.one, args)))
        return
    mode = "growth" if args.growth else "kernels"
    lines = growth(args) if args.growth else compared(args)
    if args.write:
        way = "forward and backward" if args.backward else "forward"
        what = f"attention_{mode}" + "_backward" * args.backward
        what += f"_{args.dtype}" * (args.dtype != "float32")
        about = f"Attention with relative positions, {HEADS} heads of {HEAD_DIM}, {way}, "
        about += f"{args.dtype}; median of {args.repeat} rounds in turn."
        write(what, about, lines, device=args.device)


if __name__ == "__main__":
    main()
