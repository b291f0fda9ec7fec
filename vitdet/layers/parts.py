"""Small parts of transformers: linear layers, patches, windows, MLPs, convolutions, DropPath."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

from vitdet.layers.norms import ChannelLayerNorm

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
FeedForward = Literal["mlp", "swiglu", "swiglu_norm"]
PropagationKind = Literal["naive", "basic", "bottleneck"]
PropagationNorm = Literal["LN", "BN"]

# Products of fewer multiply-adds are no slower as F.linear.
_WORK = 2**24
# Sides of the convolutions of each kind.
_SIDES: dict[str, tuple[int, ...]] = {"naive": (3,), "basic": (3, 3), "bottleneck": (1, 3, 1)}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute what `F.linear` computes.

    torch sends float32 matrix products on a CPU to MKL, which leaves half of an AMD processor
    unused, and convolutions to oneDNN, which does not (benchmarks/linear.py). So a product is
    written as a convolution with a 1 x 1 kernel there. Elsewhere it is `F.linear`; so it is under
    tracing and compilation, which have their own ways to fast code and want plain graphs.
    """
    if not _as_convolution(x, weight.shape[0]):
        return F.linear(x, weight, bias)
    y = F.conv2d(_pixels(x), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def transposed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a^T b for a (L, M) and b (L, N): the weight gradient of a linear layer.

    Without gradients of its own; by the same route as `linear`.
    """
    if not _as_convolution(a, b.shape[1]):
        return a.T @ b
    size = (a.shape[1], b.shape[1], 1, 1)
    return conv2d_weight(_pixels(b), size, _pixels(a))[:, :, 0, 0]


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """View rows (..., C) as an image (1, C, L, 1), channels last."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _as_convolution(x: torch.Tensor, columns: int) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() * columns >= _WORK
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
    )


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., C) to (..., C out)."""
        return linear(input, self.weight, self.bias)


class PatchEmbed(nn.Module):
    """Cut an image into squares of `patch_size` pixels and project each (ViT, Sec. 3.1)."""

    def __init__(
        self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, h, w) to tokens (B, H, W, C), H = ceil(h / patch_size).

        A side that is no multiple of the patch size is filled with zeros on the right or below, so
        that no pixel is lost.
        """
        height, width = images.shape[-2:]
        right, below = -width % self.patch_size, -height % self.patch_size
        if right or below:
            images = F.pad(images, (0, right, 0, below))
        return self.proj(images).permute(0, 2, 3, 1)


def window_partition(x: torch.Tensor, window_size: int) -> torch.Tensor:
    """Cut a map into windows, with zeros on the right and below where it does not divide.

    x (B, H, W, C) becomes (B * number of windows, S, S, C), windows in row-major order.
    """
    B, H, W, C = x.shape
    below, right = -H % window_size, -W % window_size
    # Compiled, both cases are one graph: otherwise each would be made for the sizes that need it.
    if torch.compiler.is_compiling() or below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    rows, columns = (H + below) // window_size, (W + right) // window_size
    x = x.reshape(B, rows, window_size, columns, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window_size, window_size, C)


def window_reverse(windows: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Undo `window_partition` for a map of `size` (H, W): put together and cut the padding off."""
    window_size, C = windows.shape[1], windows.shape[-1]
    H, W = size
    # Not -(-H // window_size): ONNX divides whole numbers towards zero.
    rows, columns = ((side + window_size - 1) // window_size for side in size)
    x = windows.reshape(-1, rows, columns, window_size, window_size, C)
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * window_size, columns * window_size, C)
    return x[:, :H, :W]


class Mlp(nn.Module):
    """Two linear layers with a GELU between (ViT, Sec. 3.1).

    "gelu" is the exact one (erf), "gelu_tanh" its approximation (SigLIP), "quick_gelu" x *
    sigmoid(1.702 x), of OpenAI's CLIP (openai/CLIP, clip/model.py).
    """

    def __init__(self, dim: int, hidden_dim: int, act_layer: Activation = "gelu") -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)
        self.act_layer = act_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., C) to (..., C)."""
        x = self.fc1(x)
        if self.act_layer == "quick_gelu":
            return self.fc2(x * torch.sigmoid(1.702 * x))
        return self.fc2(F.gelu(x, approximate="tanh" if self.act_layer == "gelu_tanh" else "none"))


class SwiGLU(nn.Module):
    """Gated feed-forward layer with an inner norm: w3 LN(silu(w1 x) * w2 x) (EVA-02, Sec. 2.1).

    Names as baaivision/EVA, EVA-02/det, backbone/vit.py SwiGLU with `subln`. Without the norm it is
    that of DINOv2 and DINOv3 (facebookresearch/dinov3, layers/ffn_layers.py SwiGLUFFN).
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


class ConvPropagation(nn.Module):
    """Convolutions that carry information across windows (ViTDet, Sec. 3, Table 2b): a residual
    block of one to three, each with a norm.

    With LayerNorm: GELU between the convolutions and none after the sum. The last norm starts at
    zero, so a new block is the identity. A bottleneck has C / 2 channels in its middle. Names and
    behaviour of the bottleneck as facebookresearch/detectron2, backbone/vit.py ResBottleneckBlock;
    the paper says of the two others how many convolutions they have and no more.

    With BatchNorm: ReLU between the convolutions and after the sum, C / 4 channels in the middle of
    a bottleneck, as alibaba/EasyCV before v0.7, models/backbones/vitdet.py. The last norm starts at
    zero here too, but the last ReLU makes a new block cut negative values off.
    """

    def __init__(
        self, dim: int, kind: PropagationKind = "bottleneck", norm: PropagationNorm = "LN"
    ) -> None:
        super().__init__()
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


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch (Touvron et al., CaiT, Eq. 4)."""

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale x (..., C)."""
        return x * self.gamma


class DropPath(nn.Module):
    """Leave a residual branch out for a random part of the batch, in training only.

    Stochastic depth (Huang et al., "Deep Networks with Stochastic Depth", Sec. 3): `rate` is the
    probability in [0, 1) that a sample's branch is left out. What stays is divided by 1 - rate.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate: expected a number in [0, 1), got {rate}")
        self.rate = rate
        # A tensor, since a number would be a constant of compiled code, made again for every rate.
        # On the CPU: a scalar there meets tensors of every device.
        self.keep = torch.tensor(1.0 - rate, device="cpu")
        self.active = rate > 0.0

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Return branch (B, ...) with some samples zeroed and the others rescaled."""
        if not self.active or not self.training:
            return branch
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        kept = torch.rand(shape, device=branch.device) < self.keep
        return branch * (kept / self.keep).to(branch.dtype)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the rates of `depth` blocks, growing linearly from 0 to `rate`."""
    return [rate * i / (depth - 1) if depth > 1 else 0.0 for i in range(depth)]
