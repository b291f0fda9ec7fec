"""One model in several processes: a copy in each (DDP), or its weights sharded (FSDP2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vitdet.utils.distributed import is_main, world_size

PARALLEL = ("ddp", "fsdp")  # train.parallel


def distributed(
    loss: nn.Module,
    device: torch.device,
    options: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return the loss with gradients averaged over the processes; itself in a single one.

    `options` are for DistributedDataParallel (none, if the loss's `detector` is sharded), and
    `fp16_compression`: on GPUs gradients travel in 16 bits where the run computes in 16 bits, that
    is, `dtype` of autocast says so (`compression`).
    """
    if world_size() == 1:
        return loss
    if is_sharded(getattr(loss, "detector", loss)):
        return ShardedLoss(loss)
    options = dict(options)
    compress = options.pop("fp16_compression", False)
    # A training step reads no buffer that it changes: `sync_buffers` is called where they are read.
    # Torch has renamed the argument that says so.
    accepted = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in accepted
    options.setdefault("forward_sync_buffers" if renamed else "broadcast_buffers", False)
    device_ids = None if device.type == "cpu" else [torch.cuda.current_device()]
    wrapped = DistributedDataParallel(loss, device_ids=device_ids, **options)
    hook = compression(dtype)
    if compress and hook is not None and device.type == "cuda":
        wrapped.register_comm_hook(state=None, hook=hook)
    return wrapped


def compression(dtype: torch.dtype | None) -> Callable[..., Any] | None:
    """Return DDP's hook for gradients of a run that computes in `dtype`; None: sent as they are.

    fp16 has a loss scale, which keeps small gradients above fp16's smallest number. Without one
    many would become zero, so bf16, which has none, sends bf16, of float32's range.
    """
    hooks = {torch.float16: default_hooks.fp16_compress_hook}
    return (hooks | {torch.bfloat16: default_hooks.bf16_compress_hook}).get(dtype or torch.float32)


@torch.no_grad()
def sync_buffers(buffers: Iterable[torch.Tensor]) -> None:
    """Give every process the main one's floating-point buffers: BatchNorm's running statistics.

    Each process gathers them over its own images. All must call it (as mmdetection's DistEvalHook).
    """
    for buffer in buffers if world_size() > 1 else ():
        if buffer.is_floating_point():
            dist.broadcast(buffer, src=0)


@contextmanager
def without_sync(module: nn.Module) -> Iterator[None]:
    """Within the block, gradients are added up in each process and not averaged over them.

    It is for all but the last part of a batch. `module` is what `distributed` returned.
    """
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif isinstance(module, ShardedLoss):
        module.detector.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.detector.set_requires_gradient_sync(True)
    else:
        yield


def give_up_step(module: nn.Module) -> None:
    """Forget a forward pass that gets no backward pass; every process must do so."""
    if isinstance(module, ShardedLoss):
        module.detector.reset_iter_state()


def shard(detector: nn.Module) -> None:
    """Shard the weights of a detector over the processes, in place (FSDP2); alone, do nothing.

    Every process keeps its rows of each weight, of its gradient and of its optimizer state. The
    backbone's `units` have whole weights only while they compute, all else from the start of a step
    to the end of its backward pass. The parameters are other objects afterwards, for an optimizer
    that is yet to be made. Names stay, and `load_state_dict` takes whole tensors.
    """
    if world_size() == 1:
        return
    device = next(detector.parameters()).device
    mesh = init_device_mesh(device.type, (world_size(),))
    for backbone in detector.modules():
        units: Any = getattr(backbone, "units", None)
        for unit in units() if units is not None else ():
            fully_shard(unit, mesh=mesh)
    fully_shard(detector, mesh=mesh, reshard_after_forward=False)

    def take_shards(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, parameter in module.named_parameters():
            if prefix + name in state:
                state[prefix + name] = shard_like(parameter, state[prefix + name])

    detector.register_load_state_dict_pre_hook(take_shards)


def is_sharded(detector: nn.Module) -> bool:
    """Whether the detector went through `shard` in several processes."""
    return isinstance(detector, FSDPModule)


class ShardedLoss(nn.Module):
    """The loss of a detector whose weights are sharded.

    FSDP2 fetches the weights when the forward of a module is called. The loss calls the detector's
    parts and never its forward, so here the loss becomes a second forward of the detector.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.detector: Any = loss.detector
        self.detector.training_losses = loss.forward
        register_fsdp_forward_method(self.detector, "training_losses")

    def forward(self, batch: Any) -> Any:
        """Return named losses."""
        return self.detector.training_losses(batch)


@contextmanager
def gathered(detector: nn.Module) -> Iterator[None]:
    """Within the block every process has all weights and the same buffers; all must enter.

    For evaluation: the processes may have different numbers of images.
    """
    sync_buffers(detector.buffers())
    parts = [part for part in detector.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not detector, recurse=False)
            part.reshard()


def cpu_copy(state: Any) -> Any:
    """Return a nested state with whole tensors on the CPU, which later steps cannot change.

    All processes must call it; only the main one gets tensors. Those that share memory still do.
    """
    made: dict[Any, torch.Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, DTensor):
            whole = value.full_tensor().detach()
            return whole.cpu() if is_main() else None
        if isinstance(value, torch.Tensor):
            if not is_main():
                return None
            key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in made:
                made[key] = value.detach().to("cpu", copy=True)
            return made[key]
        if isinstance(value, Mapping):
            return {name: copied(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copied(item) for item in value)
        return value

    return copied(state)


def shard_like(own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a whole tensor when `own` is sharded, else the tensor."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or value.shape != own.shape:
        return value
    value = value.to(own.device, own.dtype)
    # None: every process has the whole tensor, so none needs to send it
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
