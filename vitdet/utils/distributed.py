"""What the other rooms ask of the process group. Every function also works without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from vitdet.utils.checks import InputError


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 without a group."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if _active() else 1


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


def gather_object(item: Any) -> list[Any]:
    """Return every process's `item`, in the order of ranks, in the main process; [] in others."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size() if is_main() else None
    dist.gather_object(item, items)
    return [item, *items[1:]] if items else []  # its own, not a copy


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


def broadcast_object(item: Any) -> Any:
    """Return the main process's `item` in every process."""
    if world_size() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]


def main_only(function: Callable[[], Any]) -> Any:
    """Return in every process what `function` returns in the main one, where alone it is called.

    Raises:
        InputError: the one of the main process, in every process.
    """
    result, error = None, None
    if is_main():
        try:
            result = function()
        except InputError as raised:
            error = str(raised)
    result, error = broadcast_object((result, error))
    if error is not None:
        raise InputError(error)
    return result


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in at least one process; every process must ask, and gets the same.

    The processes wait for each other on the CPU (`launch` gives every group a backend there), so
    a GPU is not held up.
    """
    if world_size() == 1:
        return flag
    group: Any = dist.group.WORLD
    devices = {device.type for device in group._device_types}
    value = torch.tensor(int(flag), device="cpu" if "cpu" in devices else "cuda")
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
