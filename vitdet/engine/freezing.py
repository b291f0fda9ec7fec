"""Freezing the first blocks of a backbone."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitdet.utils.checks import fail


def freeze_blocks(detector: nn.Module, blocks: int) -> list[str]:
    """Stop the embeddings (patches, positions) and the first `blocks` blocks from learning.

    Their parameters get no gradient, so a step keeps nothing of them for the backward pass. Call
    it before optimizer, average and parallel wrapper are made. BatchNorm among them keeps its
    running statistics and uses them. Names of weights stay; propagation blocks, which no
    pretraining has, learn on. Stochastic depth stays as the recipe says.

    Args:
        detector: its `backbone` tells the layer of a parameter (`vitdet.backbones.base`).
        blocks: 0 freezes nothing, not even the embeddings.

    Returns:
        The names of the frozen parameters.

    Raises:
        InputError: a number outside the backbone's blocks, or a backbone that does not know them.
    """
    if blocks == 0:
        return []
    backbone: Any = getattr(detector, "backbone", None)
    depth = _depth(backbone)
    if not 0 <= blocks <= depth:
        fail(
            "train.freeze_blocks",
            expected=f"0 to {depth}, the blocks of the backbone",
            got=blocks,
            remedy="0 freezes nothing.",
        )
    frozen = []
    for name, module in backbone.named_modules():
        own = dict(module.named_parameters(name, recurse=False))
        names = [each for each in own if backbone.layer_id(each) <= blocks]
        for each in names:
            own[each].requires_grad_(False)
        if names and isinstance(module, _BatchNorm):
            _keep_statistics(module)
        frozen += [f"backbone.{each}" for each in names]
    return frozen


def _depth(backbone: Any) -> int:
    """Return the number of blocks. A pyramid passes the question on to its network."""
    try:
        depth = backbone.num_layers
    except AttributeError:
        depth = None
    if not isinstance(depth, int) or not hasattr(backbone, "layer_id"):
        net = getattr(backbone, "net", backbone)
        fail(
            "train.freeze_blocks",
            expected="a backbone with layer_id() and num_layers",
            got=type(net).__name__,
            remedy="Set it to 0 for this backbone.",
        )
    return depth


def _keep_statistics(norm: Any) -> None:
    norm.eval()
    norm.train = lambda *_: norm  # what trains or evaluates the whole detector passes by
