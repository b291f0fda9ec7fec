"""What every backbone of this project offers beyond detectron2's `Backbone`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from detectron2.modeling import Backbone
from torch import nn

from vitdet.utils.checks import InputError


class LayeredBackbone(Backbone):
    """A backbone that knows which of its layers a parameter belongs to.

    `vitdet.optim` asks this for layer-wise lr decay. Layer 0 is the embedding, layer i the i-th
    block, layer `num_layers + 1` everything that learns at the full rate.
    """

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Number of blocks."""

    @abstractmethod
    def layer_id(self, name: str) -> int:
        """Return the layer, 0 to num_layers + 1, of the parameter `name` of this module."""

    @abstractmethod
    def units(self) -> Sequence[nn.Module]:
        """Return the modules that the forward pass calls one after the other, in order.

        FSDP2 shards each on its own.
        """

    # detectron2 declares forward() without arguments.
    @abstractmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Map images x (B, 3, h, w) to {output: (B, C, H, W)}."""

    def set_outputs(self, outputs: Mapping[str, tuple[int, int]]) -> None:
        """Tell detectron2's `output_shape` {output: (channels, stride)}."""
        self._out_features = list(outputs)
        self._out_feature_channels = {name: channels for name, (channels, _) in outputs.items()}
        self._out_feature_strides = {name: stride for name, (_, stride) in outputs.items()}


def init_linear(model: nn.Module) -> None:
    """Initialise linear layers as published: weights from a truncated normal, 0.02, biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_indexes(what: str, indexes: Collection[int], allowed: range) -> None:
    """Raise an InputError unless all `indexes` (the argument `what`) are in a range."""
    if wrong := [i for i in indexes if i not in allowed]:
        raise InputError(
            f"{what}: expected numbers from {allowed.start} to {allowed.stop - 1}, got {wrong}. "
            f"The first is {allowed.start}."
        )
