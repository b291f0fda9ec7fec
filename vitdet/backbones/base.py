"""What every backbone of this project offers beyond detectron2's `Backbone`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

from detectron2.modeling import Backbone

from vitdet.utils.checks import fail


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


def check_block_indexes(what: str, indexes: Collection[int], depth: int) -> None:
    """Raise an InputError unless all `indexes` (the argument `what`) are numbers of blocks."""
    wrong = [i for i in indexes if not 0 <= i < depth]
    if wrong:
        fail(
            what,
            expected=f"block numbers from 0 to {depth - 1}",
            got=str(wrong),
            remedy="The first block is 0.",
        )
