"""What the other rooms ask of the process group. Every function also works without one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def active() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 without a group."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def all_gather_object(item: Any) -> list[Any]:
    """Return every process's `item`, in the order of ranks."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def reduce_mean(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Average scalar tensors over the processes; every process must bring the same names."""
    names = sorted(values)
    if not names:
        return {}
    stacked = torch.stack([values[name].detach().float() for name in names])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(names, stacked.tolist(), strict=True))
