"""What every backbone of this project offers beyond detectron2's `Backbone`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence

from detectron2.modeling import Backbone
from torch import nn

from vitdet.utils.checks import InputError, nearest


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


def init_linear(model: nn.Module) -> None:
    """Initialise linear layers as published: weights from a truncated normal, 0.02, biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_block_indexes(what: str, indexes: Collection[int], depth: int) -> None:
    """Raise an InputError unless all `indexes` (the argument `what`) are numbers of blocks."""
    wrong = [i for i in indexes if not 0 <= i < depth]
    if wrong:
        raise InputError(
            f"{what}: expected block numbers from 0 to {depth - 1}, got {wrong}. The first is 0."
        )


def check_word(what: str, word: object, known: Collection[object]) -> None:
    """Raise an InputError unless `word` (the argument `what`) is among `known`."""
    if word not in known:
        words = [str(each) for each in known]
        meant = nearest(str(word), words)
        raise InputError(
            f"{what}: expected one of {', '.join(words)}, got {word!r}. "
            + (f"Did you mean {meant!r}?" if meant else "Take one of these.")
        )
