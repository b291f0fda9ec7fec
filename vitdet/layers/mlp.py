"""Feed-forward layers of transformer blocks."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.layers.linear import Linear

Activation = Literal["gelu", "quick_gelu"]
FeedForward = Literal["mlp", "swiglu", "swiglu_norm"]


class Mlp(nn.Module):
    """Two linear layers with a GELU between (ViT, Sec. 3.1).

    Args:
        dim: channels of input and output.
        hidden_dim: channels between.
        act_layer: "gelu", the exact one (erf), or "quick_gelu", x * sigmoid(1.702 x), of OpenAI's
            CLIP (openai/CLIP, clip/model.py).
    """

    def __init__(self, dim: int, hidden_dim: int, act_layer: Activation = "gelu") -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)
        self.quick = act_layer == "quick_gelu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., C) to (..., C)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class SwiGLU(nn.Module):
    """Gated feed-forward layer with an inner norm: w3 LN(silu(w1 x) * w2 x) (EVA-02, Sec. 2.1).

    Names as baaivision/EVA, EVA-02/det, backbone/vit.py SwiGLU with `subln`. Without the norm it is
    that of DINOv2 and DINOv3 (facebookresearch/dinov3, layers/ffn_layers.py SwiGLUFFN).

    Args:
        dim: channels of input and output.
        hidden_dim: channels between.
        norm_eps: epsilon of the inner LayerNorm.
        inner_norm: whether there is one.
    """

    def __init__(
        self, dim: int, hidden_dim: int, norm_eps: float = 1e-6, inner_norm: bool = True
    ) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden_dim)
        self.w2 = Linear(dim, hidden_dim)
        self.ffn_ln = nn.LayerNorm(hidden_dim, eps=norm_eps) if inner_norm else nn.Identity()
        self.w3 = Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., C) to (..., C)."""
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


def make_feed_forward(
    kind: FeedForward, dim: int, hidden_dim: int, act_layer: Activation, norm_eps: float
) -> Mlp | SwiGLU:
    """Build the feed-forward layer of a name; `norm_eps` is that of "swiglu_norm"."""
    if kind == "mlp":
        return Mlp(dim, hidden_dim, act_layer)
    return SwiGLU(dim, hidden_dim, norm_eps, inner_norm=kind == "swiglu_norm")


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch (Touvron et al., CaiT, Eq. 4)."""

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale x (..., C)."""
        return x * self.gamma
