"""Normalisation of feature maps (B, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of every position of a map (ViTDet, Sec. 3, "LN").

    Equal to detectron2's `get_norm("LN")` (facebookresearch/detectron2, layers/batch_norm.py), but
    computed by torch's fused kernel on a channels-last view. It is a class of its own, not an
    `nn.LayerNorm`, so that the published weight decay rules treat it as they did.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (B, C, H, W); the result has the same shape."""
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def channel_layer_norm(eps: float = 1e-6) -> Callable[[int], ChannelLayerNorm]:
    """Return a factory of `ChannelLayerNorm`, for arguments that want a norm by its channels."""
    return partial(ChannelLayerNorm, eps=eps)


def layer_norm(eps: float = 1e-6) -> Callable[[int], nn.LayerNorm]:
    """Return a factory of torch's LayerNorm, over the last axis of tokens (B, H, W, C)."""
    return partial(nn.LayerNorm, eps=eps)


def group_norm(num_groups: int = 1, eps: float = 1e-5) -> Callable[[int], nn.GroupNorm]:
    """Return a factory of torch's GroupNorm, for arguments that want a norm by its channels.

    With one group it normalises over a whole map (C, H, W) of an image. That is no LayerNorm over
    the channels of each position, though their weights have the same names and shapes.
    """
    return partial(nn.GroupNorm, num_groups, eps=eps)
