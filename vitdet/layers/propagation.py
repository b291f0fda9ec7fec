"""Convolutions that carry information across windows (ViTDet, Sec. 3: propagation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.layers.norms import ChannelLayerNorm


class BottleneckPropagation(nn.Module):
    """Residual bottleneck 1x1, 3x3, 1x1 with LayerNorm and GELU (Table 2b, "bottleneck").

    The last norm starts at zero, so a new block is the identity. Names and behaviour as
    facebookresearch/detectron2, backbone/vit.py ResBottleneckBlock.

    Args:
        dim: channels of the map; the middle has half of them.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        middle = dim // 2
        self.conv1 = nn.Conv2d(dim, middle, 1, bias=False)
        self.norm1 = ChannelLayerNorm(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, padding=1, bias=False)
        self.norm2 = ChannelLayerNorm(middle)
        self.conv3 = nn.Conv2d(middle, dim, 1, bias=False)
        self.norm3 = ChannelLayerNorm(dim)
        for conv in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C)."""
        y = x.permute(0, 3, 1, 2)  # (B, C, H, W)
        y = F.gelu(self.norm1(self.conv1(y)))
        y = F.gelu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return x + y.permute(0, 2, 3, 1)
