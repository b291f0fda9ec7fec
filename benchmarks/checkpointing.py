"""Peak memory of a training step of a backbone with and without activation checkpointing.

    python benchmarks/checkpointing.py [--backbone eva02_b] [--size 512 512] [--batch 1] [--write]

A row is a choice of `checkpoint_blocks`. "predicted" is computed from shapes: what autograd keeps
of every block, and what a backward pass needs beside it. "kept" counts the tensors that autograd
does keep after a forward pass. "measured" is the peak during forward and backward above the memory
of model, gradients and images: of the process in its own process on a CPU, of torch's allocator on
CUDA. `--device meta` only predicts, for sizes that fit nowhere. Predicted is attention without an
L x L matrix and without relative positions.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT

MIB = 2**20
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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


class Sizes(NamedTuple):
    """What the memory of a block depends on, in numbers of a tensor's entries."""

    tokens: int  # entries of the residual stream: B * H * W * C
    attended: int  # the same with the padding of windows
    hidden: int  # entries between the MLP's layers
    swiglu: bool


def block_sizes(net: Any, batch: int, size: tuple[int, int]) -> list[Sizes]:
    """Return the sizes of every block of a ViT or EVA-02 for images of `size` (height, width)."""
    height, width = (-(-side // net.patch_size) for side in size)
    found = []
    for block in net.blocks:
        window = block.window_size
        rows, columns = (
            -(-side // window) * window if window else side for side in (height, width)
        )
        dim = block.norm1.normalized_shape[0]
        first = getattr(block.mlp, "w1", None) or block.mlp.fc1
        found.append(
            Sizes(
                tokens=batch * height * width * dim,
                attended=batch * rows * columns * dim,
                hidden=batch * height * width * first.out_features,
                swiglu=hasattr(block.mlp, "w1"),
            )
        )
    return found


def kept_entries(sizes: Sizes) -> int:
    """Return how many numbers autograd keeps of a block without checkpointing.

    Inputs of both norms and of the MLP, the input of the three projections, q, k, v and the output
    of attention; SwiGLU: the gate before and after SiLU, the other half, their product and the
    norm's output; a plain MLP: GELU's input and output. Statistics of norms and of softmax are
    smaller by the width of a head and left out.
    """
    attention = 5 * sizes.attended  # input, q, k, v, output
    return 3 * sizes.tokens + attention + (5 if sizes.swiglu else 2) * sizes.hidden


def predicted_entries(blocks: list[Sizes], checkpointed: frozenset[int]) -> tuple[int, int]:
    """Return (kept after forward, peak) of all blocks, in numbers.

    A checkpointed block keeps its input. In the backward pass one block at a time is computed again
    and has gradients: of the residual stream twice, and of what its MLP has between its layers.
    """
    kept = [
        sizes.tokens if i in checkpointed else kept_entries(sizes) for i, sizes in enumerate(blocks)
    ]
    peak = 0
    for i, sizes in enumerate(blocks):
        again = kept_entries(sizes) if i in checkpointed else 0
        gradients = 2 * sizes.tokens + (3 if sizes.swiglu else 2) * sizes.hidden
        peak = max(peak, sum(kept[: i + 1]) + again + gradients)
    return sum(kept), peak


@contextlib.contextmanager
def counting(net: nn.Module) -> Iterator[dict[int, int]]:
    """Yield {storage: bytes} of the tensors that autograd keeps, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a storage that is freed may come back under the same address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


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


def measure(net: Any, images: torch.Tensor) -> int:
    """Return the peak of a step above what model, gradients and images take, in bytes."""
    small = images[..., : 2 * net.patch_size, : 2 * net.patch_size]
    step(net, small)  # threads, workspaces and gradients are there now
    if images.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(net, images)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = process_memory("VmRSS")
    step(net, images)
    return process_memory("VmHWM") - before


def process_memory(key: str) -> int:
    """Return a size of this process in bytes: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {key} in /proc/self/status: process memory is measured on Linux only")


def one(args: argparse.Namespace, every: int) -> dict[str, int]:
    """Return predicted, kept and measured bytes of one choice."""
    size, dtype = (args.size[0], args.size[1]), TYPES[args.dtype]
    with torch.device(args.device):
        net = build(args.backbone, size, every, args.attention).to(dtype)
        images = torch.randn(args.batch, 3, *size, dtype=dtype)
    sizes = block_sizes(net, args.batch, size)
    kept, peak = (n * dtype.itemsize for n in predicted_entries(sizes, net.checkpoint_blocks))
    found = {"predicted_kept": kept, "predicted": peak}
    if args.device != "meta":
        found["measured"] = measure(net, images)
        with counting(net) as counted:
            out = net(images)["last_feat"].square().mean()
        del out
        found["kept"] = sum(counted.values())
    return found


def in_own_process(every: int) -> dict[str, int]:
    """Run `one` in a fresh process, whose memory is that of this choice alone."""
    words = [sys.executable, __file__, "--one", str(every), *sys.argv[1:]]
    # glibc: every tensor of some size is a mapping of its own, which goes back when it is freed.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    malloc |= {"MALLOC_MMAP_MAX_": "1000000", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | malloc
    )
    return json.loads(done.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", choices=BACKBONES, default="eva02_b")
    parser.add_argument("--size", type=int, nargs=2, default=[512, 512], metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--every", type=int, nargs="+", default=[0, 2, 1], help="0: none")
    parser.add_argument("--dtype", choices=TYPES, default="float32")
    parser.add_argument("--attention", default="auto", help="kernel of attention")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.one is not None:
        print(json.dumps(one(args, args.one)))
        return
    lines = [
        "| recomputed blocks | kept: predicted | counted | peak: predicted | measured | share |"
    ]
    lines.append("| --- |" + " ---: |" * 5)
    first: dict[str, int] = {}
    for every in args.every:
        found = in_own_process(every)
        first = first or found
        peak = "measured" if "measured" in found else "predicted"
        keys = ("predicted_kept", "kept", "predicted", "measured")
        cells = [f"{found[key] / MIB:.0f}" if key in found else "" for key in keys]
        cells.append(f"{found[peak] / first[peak]:.2f}")
        name = {0: "none", 1: "all"}.get(every, f"every {every}.")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print("\n".join(lines) if every == args.every[0] else lines[-1], flush=True)
    if args.write:
        print(write(args, lines))


def write(args: argparse.Namespace, lines: list[str]) -> Path:
    """Write the table with its circumstances and return its path."""
    today = datetime.date.today().isoformat()
    kind = args.device.partition(":")[0]
    devices = {"cuda": torch.cuda.get_device_name, "meta": lambda: "from shapes alone"}
    device = devices.get(kind, platform.machine)()
    size = f"{args.size[0]}x{args.size[1]}"
    name = f"checkpointing_{args.backbone}_{size}_{kind}_{today}.md"
    path = Path(__file__).parent / "results" / name
    head = f"Memory of a training step of {args.backbone}, {args.batch} x {size} pixels, "
    head += f"{args.dtype}, attention {args.attention!r}, in MiB above model and gradients.\n"
    head += f"{device}, torch {torch.__version__}, {today}.\n"
    head += f"Made by `python benchmarks/checkpointing.py {' '.join(sys.argv[1:])}`.\n\n"
    path.write_text(head + "\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    main()
