"""One model in several processes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vitdet.utils.distributed import world_size


def distributed(loss: nn.Module, device: torch.device, options: dict[str, Any]) -> nn.Module:
    """Return the loss with gradients averaged over the processes; itself in a single one.

    Args:
        loss: a module that returns named losses.
        device: of its parameters.
        options: for DistributedDataParallel, and `fp16_compression`.
    """
    if world_size() == 1:
        return loss
    options = dict(options)
    compress = options.pop("fp16_compression", False)
    # Buffers (pixel mean, anchors) are constants. Torch has renamed the argument that says so.
    accepted = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in accepted
    options.setdefault("forward_sync_buffers" if renamed else "broadcast_buffers", False)
    device_ids = None if device.type == "cpu" else [torch.cuda.current_device()]
    wrapped = DistributedDataParallel(loss, device_ids=device_ids, **options)
    if compress and device.type == "cuda":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        wrapped.register_comm_hook(state=None, hook=fp16_compress_hook)
    return wrapped
