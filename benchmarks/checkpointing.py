"""Peak memory of a training step of a backbone with and without activation checkpointing.

    python benchmarks/checkpointing.py [--backbone eva02_b] [--size 512 512] [--batch 1] [--write]

A row is a choice of `checkpoint_blocks`. The peak is that above the memory of model, gradients and
images: of the process in its own process on a CPU, of torch's allocator on CUDA.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

import torch
from common import DTYPES, EXACT_MALLOC, MIB, Table, in_own_process, parser, peak_memory, write
from torch import nn

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT

L: dict[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
# name: class and arguments
BACKBONES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "vit_b": (ViT, {"window_size": 14, "global_block_indexes": [2, 5, 8, 11]}),
    "eva02_b": (EVA02ViT, {"window_size": 16, "global_block_indexes": [2, 5, 8, 11]}),
    "eva02_l": (EVA02ViT, L | {"window_size": 16, "global_block_indexes": [5, 11, 17, 23]}),
    "streampetr_l": (
        EVA02ViT,
        L
        | {"window_size": 16, "global_window_size": 20}
        | {"global_block_indexes": list(range(2, 24, 3))},
    ),
}


def build(name: str, size: tuple[int, int], every: int, attention: str) -> Any:
    """Build a backbone that recomputes every n-th block, none for 0."""
    kind, arguments = BACKBONES[name]
    depth = arguments.get("depth", 12)
    blocks = list(range(every - 1, depth, every)) if every else []
    torch.manual_seed(0)
    net = kind(
        **arguments,
        img_size=min(size),
        checkpoint_blocks=blocks,
        attention_backend=attention,
    )
    return net.train()


def step(net: nn.Module, images: torch.Tensor) -> None:
    """Run forward and backward."""
    net(images)["last_feat"].square().mean().backward()


def one(args: argparse.Namespace, every: int) -> float:
    """Return the MiB of one choice."""
    size, dtype = (args.size[0], args.size[1]), DTYPES[args.dtype]
    with torch.device(args.device):
        net = build(args.backbone, size, every, args.attention).to(dtype)
        images = torch.randn(args.batch, 3, *size, dtype=dtype)
    # threads, workspaces and gradients are there after a step on a corner of the images
    step(net, images[..., : 2 * net.patch_size, : 2 * net.patch_size])
    return peak_memory(partial(step, net, images), args.device) / MIB


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--backbone", choices=BACKBONES, default="eva02_b")
    made.add_argument("--size", type=int, nargs=2, default=[512, 512], metavar=("H", "W"))
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--every", type=int, nargs="+", default=[0, 2, 1], help="0: none")
    made.add_argument("--dtype", choices=DTYPES, default="float32")
    made.add_argument("--attention", default="auto", help="kernel of attention")
    cuda = torch.cuda.is_available()
    made.add_argument("--device", default="cuda" if cuda else "cpu")
    made.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        print(json.dumps(one(args, args.one)))
        return
    table = Table("recomputed blocks", "peak", "share")
    first = 0.0
    for every in args.every:
        found = in_own_process(
            __file__, "--one", str(every), *sys.argv[1:], environment=EXACT_MALLOC
        )
        first = first or found
        name = {0: "none", 1: "all"}.get(every, f"every {every}.")
        table.add(name, f"{found:.0f}", f"{found / first:.2f}")
    if args.write:
        size = f"{args.size[0]}x{args.size[1]}"
        about = f"Memory of a training step of {args.backbone}, {args.batch} x {size} pixels, "
        about += f"{args.dtype}, attention {args.attention!r}, in MiB above model and gradients."
        write(f"checkpointing_{args.backbone}_{size}", about, table.lines, device=args.device)


if __name__ == "__main__":
    main()
