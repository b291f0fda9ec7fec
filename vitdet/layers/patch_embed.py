"""Images to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PatchEmbed(nn.Module):
    """Cut an image into squares and project each to a token (ViT, Sec. 3.1).

    Args:
        patch_size: side of a square in pixels, which is also the stride.
        in_chans: channels of the image.
        embed_dim: channels of a token.
    """

    def __init__(self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

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
