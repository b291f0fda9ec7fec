"""Time the plain ViT against other projects' with the same weights: in turn, one table.

    python benchmarks/backbone.py --peers [--size 1024] [--batch 1] [--backward] [--write]

Before timing, the maps of tokens are compared in float32, with --backward also the gradients of the
images and the norm of all gradients. GFLOP/s counts for everybody the matrix products that
detectron2's backbone computes, padding of windows included, and "share" is that over the rate of
one matrix product, the first layer of an MLP, timed in the same rounds: the faster of two ways to
compute it. Peak memory is what a process of its own takes above the weights, gradients of the
weights included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import peers
import torch
from common import (
    DTYPES,
    EXACT_MALLOC,
    MIB,
    MatrixProduct,
    Table,
    count_flops,
    in_own_process,
    in_turn,
    parser,
    peak_memory,
    write,
)
from peers import OURS, PEERS, Peer, Sizes

# name: whether it is written as a convolution, for which a CPU has another library
PRODUCTS = {"matrix product": False, "the same as a convolution": True}


# --- what is run ---------------------------------------------------------------------------------


def contender(name: str, args: argparse.Namespace) -> Peer:
    """Return a backbone on the device, in float32."""
    peer = peers.build(name, peers.MODELS[args.model](args.size))
    peer.net.to(args.device).train(args.backward)
    return peer


def images(args: argparse.Namespace) -> torch.Tensor:
    """Return the same random images for everybody, in float32."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
    return drawn.to(args.device)


def step(peer: Peer, x: torch.Tensor, backward: bool) -> Callable[[], torch.Tensor]:
    """Return a forward pass, or forward and backward, to run without arguments."""

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return peer.tokens(x)

    def both() -> torch.Tensor:
        peer.net.zero_grad(set_to_none=True)
        out = peer.tokens(x)
        out.float().square().mean().backward()
        return out

    return both if backward else forward


def results(peer: Peer, x: torch.Tensor, backward: bool) -> dict[str, torch.Tensor]:
    """Return what is compared."""
    x = x.clone().requires_grad_(backward)
    found = {"tokens": step(peer, x, backward)().detach()}
    if backward:
        assert x.grad is not None
        gradients = [p.grad for p in peer.net.parameters() if p.grad is not None]
        found["gradient of the images"] = x.grad
        found["norm of the gradients"] = torch.stack([g.norm() for g in gradients]).norm()
        peer.net.zero_grad(set_to_none=True)
    return found


def compare(todo: dict[str, Peer], x: torch.Tensor, backward: bool) -> dict[str, float]:
    """Return how far each peer is from ours; stop where one computes something else."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        got = {name: results(peer, x, backward) for name, peer in todo.items()}
    return {
        name: max(peers.check(f"{name}, {what}", found[what], got[OURS][what]) for what in found)
        for name, found in got.items()
        if name != OURS
    }


def flops(sizes: Sizes, batch: int, backward: bool) -> float:
    """Return the operations of detectron2's matrix products, counted without computing them."""
    peer = peers.build("detectron2", sizes)
    peer.net.to("meta")
    x = torch.zeros(batch, 3, sizes.size, sizes.size, device="meta")
    if backward:
        return count_flops(step(peer, x, True))
    with torch.no_grad():
        return count_flops(lambda: peer.tokens(x))


def matrix_products(sizes: Sizes, args: argparse.Namespace) -> dict[str, MatrixProduct]:
    """Return the product of the first layer of an MLP in every way to compute it."""
    tokens, dim = args.batch * (args.size // sizes.patch_size) ** 2, sizes.embed_dim
    dtype = DTYPES[args.dtype]
    return {
        name: MatrixProduct(
            tokens, dim, 4 * dim, device=args.device, dtype=dtype, convolution=convolution
        )
        for name, convolution in PRODUCTS.items()
        if args.device == "cpu" or not convolution
    }


# --- one process each ----------------------------------------------------------------------------


def one(name: str, args: argparse.Namespace) -> float:
    """Return the peak above the weights in MiB."""
    dtype = DTYPES[args.dtype]
    peer = contender(name, args)
    peer.net.to(dtype)
    return peak_memory(step(peer, images(args).to(dtype), args.backward), args.device) / MIB


def measured(name: str, args: argparse.Namespace) -> float:
    """Run `one` in a fresh process with exact accounts of memory."""
    words = [__file__, "--one", name, "--size", str(args.size), "--model", args.model]
    words += ["--batch", str(args.batch), "--dtype", args.dtype, "--device", args.device]
    words += ["--threads", str(args.threads), *["--backward"] * args.backward]
    return in_own_process(*words, environment=EXACT_MALLOC)


# --- tables --------------------------------------------------------------------------------------


def compared(args: argparse.Namespace) -> list[str]:
    """Return the table of ours and the peers at one size."""
    sizes, dtype = peers.MODELS[args.model](args.size), DTYPES[args.dtype]
    x = images(args)
    todo = {name: contender(name, args) for name in (OURS, *args.peers)}
    differences = compare(todo, x, args.backward)
    x = x.to(dtype)
    for peer in todo.values():
        peer.net.to(dtype)
    products = matrix_products(sizes, args)
    runs: dict[str, Callable[[], torch.Tensor]] = dict(products)
    runs |= {name: step(peer, x, args.backward) for name, peer in todo.items()}
    times = in_turn(runs, args.repeat)
    rates = {name: each.flops / times[name].median for name, each in products.items()}
    work = flops(sizes, args.batch, args.backward)
    del todo, runs, products
    names = ("backbone", "s", "range", "over ours", "range", "GFLOP/s", "share", "peak MiB")
    table = Table(*names, "difference")
    for name, rate in rates.items():
        table.add(name, f"{times[name].median:.4f}", *[""] * 3, f"{rate / 1e9:.0f}", *[""] * 3)
    for name in (OURS, *args.peers):
        seen = times[name]
        reached = work / seen.median
        table.add(
            *(name, f"{seen.median:.3f}", seen.range(digits=3)),
            *(f"{seen.ratio(times[OURS]):.2f}", seen.ratio_range(times[OURS])),
            *(f"{reached / 1e9:.0f}", f"{reached / max(rates.values()):.2f}"),
            f"{measured(name, args):.0f}",
            f"{differences[name]:.1g}" if name in differences else "",
        )
    notes = f"{work / 1e9:.1f} GFLOP. A difference is a share of the largest entry."
    return [*table.lines, "", notes]


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--model", choices=peers.MODELS, default="b")
    made.add_argument("--size", type=int, default=1024, help="pixels of a side")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--dtype", choices=DTYPES, default="float32")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--backward", action="store_true", help="forward and backward")
    made.add_argument("--peers", nargs="*", choices=PEERS, metavar="NAME", help="none named: all")
    made.add_argument("--one", choices=[OURS, *PEERS], help=argparse.SUPPRESS)
    args = made.parse_args()
    args.peers = list(PEERS) if args.peers == [] else args.peers or []
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args.one, args)))
        return
    lines = compared(args)
    if args.write:
        way = "forward and backward" if args.backward else "forward"
        what = f"backbone_{args.model}" + f"_{args.size}"
        what += f"_batch{args.batch}" * (args.batch > 1) + "_backward" * args.backward
        what += f"_{args.dtype}" * (args.dtype != "float32")
        about = f"ViT-{args.model.upper()} with relative positions, {way}, batch {args.batch}, "
        about += f"{args.dtype}, the same weights; median of {args.repeat} rounds in turn."
        write(what, about, lines, device=args.device)


if __name__ == "__main__":
    main()
