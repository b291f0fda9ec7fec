"""Windows of a token map (ViTDet, Sec. 3, "window attention": no overlap)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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


def whole_windows(size: tuple[int, int], window_size: int) -> tuple[int, int]:
    """Return the largest size in whole windows that fits into (H, W), at least one window."""
    height, width = (max(side // window_size, 1) * window_size for side in size)
    return height, width


def resize_map(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a map (B, H, W, C) to `size` bilinearly, corners not aligned."""
    if (x.shape[1], x.shape[2]) == size:
        return x
    y = F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    return y.permute(0, 2, 3, 1)
