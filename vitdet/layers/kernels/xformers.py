"""xformers' memory-efficient attention, for machines where it is faster than torch's.

It is an optional package and runs on CUDA only. It takes no decomposed position bias.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from vitdet.layers.rel_pos import RelPos

PACKAGE = "xformers"
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_run(q: torch.Tensor, rel_pos: RelPos | None) -> bool:
    """Whether the package is installed, on CUDA, without a bias."""
    fits = q.device.type == "cuda" and q.dtype in _TYPES and rel_pos is None
    return fits and find_spec(PACKAGE) is not None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_pos: RelPos | None, scale: float
) -> torch.Tensor:
    """Compute what `eager.attention` computes; see there for arguments and shapes."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    assert rel_pos is None, "can_run() refuses a bias"
    # It wants (B, L, N, D).
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return memory_efficient_attention(q, k, v, scale=scale).transpose(1, 2)
