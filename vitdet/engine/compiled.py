"""torch.compile of a backbone's transformer blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitdet.utils.checks import fail

# Compiled versions of the one function that all blocks share: window or global attention, with or
# without stochastic depth, training or evaluation, one size or any. torch's limit is 8, beyond
# which it goes on uncompiled.
_VERSIONS = 64


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of a detector or a backbone, in order."""
    lists = [getattr(module, "blocks", None) for module in model.modules()]
    return [block for each in lists if isinstance(each, nn.ModuleList) for block in each]


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile every block of the model's backbone in place; names of weights stay.

    A block is compiled when it first runs: once for the first size of image, once more for all
    others. Blocks of the same kind share the work.

    Args:
        model: a detector or a backbone.
        options: of `torch.compile`.

    Returns:
        The number of blocks.

    Raises:
        InputError: no module of the model has a list of `blocks`.
    """
    blocks = blocks_of(model)
    if not blocks:
        fail(
            "train.compile",
            expected="a backbone with blocks: ViT, EVA-01, EVA-02 or ViTAE",
            got=f"none in {type(model).__name__}",
            remedy="Set train.compile=False.",
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS)
    for block in blocks:
        block.compile(fullgraph=True, **options)
    return len(blocks)
