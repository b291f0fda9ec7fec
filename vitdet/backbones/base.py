"""What every backbone of this project offers beyond detectron2's `Backbone`."""

from __future__ import annotations

from abc import abstractmethod

from detectron2.modeling import Backbone


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
