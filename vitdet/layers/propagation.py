"""Convolutions that carry information across windows (ViTDet, Sec. 3: propagation, Table 2b)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.layers.norms import ChannelLayerNorm
from vitdet.utils.checks import check_word

PropagationKind = Literal["naive", "basic", "bottleneck"]
PropagationNorm = Literal["LN", "BN"]

# Sides of the convolutions of each kind.
_SIDES: dict[str, tuple[int, ...]] = {"naive": (3,), "basic": (3, 3), "bottleneck": (1, 3, 1)}


class ConvPropagation(nn.Module):
    """Residual block of one to three convolutions, each with a norm.

    With LayerNorm: GELU between the convolutions and none after the sum. The last norm starts at
    zero, so a new block is the identity. A bottleneck has C / 2 channels in its middle. Names and
    behaviour of the bottleneck as facebookresearch/detectron2, backbone/vit.py ResBottleneckBlock;
    the paper says of the two others how many convolutions they have and no more.

    With BatchNorm: ReLU between the convolutions and after the sum, C / 4 channels in the middle of
    a bottleneck, as alibaba/EasyCV before v0.7, models/backbones/vitdet.py. The last norm starts at
    zero here too, but the last ReLU makes a new block cut negative values off.

    Raises:
        InputError: a kind or norm that does not exist.
    """

    def __init__(
        self, dim: int, kind: PropagationKind = "bottleneck", norm: PropagationNorm = "LN"
    ) -> None:
        super().__init__()
        check_propagation(kind, norm)
        self.rectified = norm == "BN"
        kernels = _SIDES[kind]
        self.count = len(kernels)
        narrow = dim // 4 if self.rectified else dim // 2
        middle = narrow if kind == "bottleneck" else dim
        widths = [dim] + [middle] * (self.count - 1) + [dim]
        for i, kernel in enumerate(kernels):
            conv = nn.Conv2d(widths[i], widths[i + 1], kernel, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.add_module(f"conv{i + 1}", conv)
            make_norm = nn.BatchNorm2d if self.rectified else ChannelLayerNorm
            self.add_module(f"norm{i + 1}", make_norm(widths[i + 1]))
        nn.init.zeros_(self.get_parameter(f"norm{self.count}.weight"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C)."""
        activation = F.relu if self.rectified else F.gelu
        y = x.permute(0, 3, 1, 2)  # (B, C, H, W)
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.count:
                y = activation(y)
        x = x + y.permute(0, 2, 3, 1)
        return F.relu(x) if self.rectified else x


def check_propagation(kind: str, norm: str) -> None:
    """Raise an InputError unless both are among those that exist."""
    check_word("propagation", kind, _SIDES)
    check_word("propagation_norm", norm, ("LN", "BN"))


def parallel_convolutions(dim: int, hidden_dim: int, groups: int) -> nn.Sequential:
    """Return ViTAE-B's branch: two grouped 3x3 convolutions, BatchNorm and SiLU between them."""
    return nn.Sequential(
        nn.Conv2d(dim, hidden_dim, 3, padding=1, groups=groups),
        nn.BatchNorm2d(hidden_dim),
        nn.SiLU(),
        nn.Conv2d(hidden_dim, dim, 3, padding=1, groups=groups),
    )
