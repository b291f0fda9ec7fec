"""Switches that detectron2's own heads lack. The heads themselves are detectron2's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detectron2.layers import Conv2d
from detectron2.modeling.proposal_generator import StandardRPNHead
from torch import nn


def rpn_head(
    *,
    in_channels: int,
    num_anchors: int,
    conv_dims: Sequence[int] = (-1, -1),
    norm: Callable[[int], nn.Module] | None = None,
    box_dim: int = 4,
) -> StandardRPNHead:
    """Build detectron2's RPN head, with a norm after each 3x3 convolution if wanted.

    Args:
        in_channels: channels of every level.
        num_anchors: anchors at a position.
        conv_dims: channels of the 3x3 convolutions, -1 for `in_channels`.
        norm: makes a norm from a number of channels. The ViTDet paper (Appendix A.2) has LayerNorm
            here; detectron2's published models have none.
        box_dim: numbers of a box.
    """
    head = StandardRPNHead(
        in_channels=in_channels, num_anchors=num_anchors, conv_dims=conv_dims, box_dim=box_dim
    )
    if norm is not None:
        for conv in head.conv.modules():
            if isinstance(conv, Conv2d):
                conv.norm = norm(conv.out_channels)
                conv.bias = None
    return head
