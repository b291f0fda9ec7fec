"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vitdet.engine.parallel import shard_like
from vitdet.utils.checks import InputError


class Ema:
    """average <- decay * average + (1 - decay) * weights, once a step.

    Everything in the state dict is averaged: the parameters that learn, and buffers, so that it is
    a whole model; what is not a floating-point number is copied. Every process of a run has the
    same parameters after a step, and so the same average of them. BatchNorm's running statistics
    differ until `Trainer.state_dict` or an evaluation gives all those of the main process.

    Args:
        module: the model; the average starts as a copy of its weights.
        decay: 0 <= decay < 1; 0.9999 in the recipes of EVA-02.

    Raises:
        InputError: a decay outside its range.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InputError(
                f"train.ema_decay: expected 0 <= decay < 1, or null for no average, got {decay}. "
                "0.9999 is usual for trainings of tens of thousands of steps."
            )
        self.module = module
        self.decay = decay
        self.state: dict[str, torch.Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are now."""
        self.state = {name: value.clone() for name, value in self.module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        pairs: dict[type, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():  # parameters that are sharded are of another type
                pairs.setdefault(type(value), []).append((self.state[name], value))
            else:
                self.state[name].copy_(value)
        for of_type in pairs.values():
            averages, values = zip(*of_type, strict=True)
            torch._foreach_lerp_(averages, values, 1 - self.decay)

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from the average of a checkpoint, with the same names and shapes."""
        for name, value in self.state.items():
            value.copy_(shard_like(value, state[name]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within the block; afterwards it has its own again."""
        own = self.module.state_dict()
        kept = {name: value.clone() for name, value in own.items()}
        _copy(self.state, own)
        try:
            yield
        finally:
            _copy(kept, own)


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
