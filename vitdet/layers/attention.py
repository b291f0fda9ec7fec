"""The one door to the attention kernels, and those that are a few calls of torch.

`eager` is the definition, with the whole L x L matrix in memory; the others hold none.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from vitdet.layers import blocks
from vitdet.layers.positions import RelPos
from vitdet.utils.checks import InputError, check_word

Tensor = torch.Tensor


def eager(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, scale: float) -> Tensor:
    """Compute softmax(scale * q k^T + bias) v; for the shapes see `attention`."""
    logits = (q * scale) @ k.transpose(-2, -1)  # (B, N, L, L)
    if rel_pos is not None:
        B, N, L = logits.shape[:3]
        grid = logits.view(B, N, L, rel_pos.h.shape[-1], rel_pos.w.shape[-1])
        logits = (grid + rel_pos.h[..., :, None] + rel_pos.w[..., None, :]).view(B, N, L, -1)
    return logits.softmax(dim=-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, scale: float) -> Tensor:
    """Compute the same by torch's fused kernel, without an L x L bias in memory.

    The bias h[q, row of k] + w[q, column of k] is factorised: it is the inner product of [h[q],
    w[q]] with two one-hot vectors that tell the row and the column of k, so attention of [scale *
    q, h, w] with [k, onehot_row, onehot_column] is the biased attention, exactly.
    """
    if rel_pos is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    B, N, L, D = q.shape
    height, width = rel_pos.h.shape[-1], rel_pos.w.shape[-1]
    place = torch.arange(L, device=q.device)
    onehot = torch.zeros(L, height + width, dtype=k.dtype, device=k.device)
    onehot[place, place // width] = 1
    onehot[place, height + place % width] = 1
    q = torch.cat([q * scale, rel_pos.h, rel_pos.w], dim=-1)  # (B, N, L, D + H + W)
    k = torch.cat([k, onehot.expand(B, N, -1, -1)], dim=-1)
    # torch's fused kernels want q, k and v of one width, and on CUDA a multiple of 8; for others it
    # would hold an L x L matrix.
    spare = -(D + height + width) % 8
    q, k, v = F.pad(q, (0, spare)), F.pad(k, (0, spare)), F.pad(v, (0, height + width + spare))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :D]


def xformers(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, scale: float) -> Tensor:
    """Compute the same by xformers' memory-efficient attention, an optional package; no bias."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    assert rel_pos is None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it wants (B, L, N, D)
    return memory_efficient_attention(q, k, v, scale=scale).transpose(1, 2)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, RelPos | None, float], Tensor]] = {
    "eager": eager,
    "blocks": blocks.attention,
    "sdpa": sdpa,
    "xformers": xformers,
}


def can_run(name: str, q: Tensor, rel_pos: RelPos | None) -> bool:
    """Whether the kernel of this name can compute with these inputs."""
    if name == "blocks":
        return blocks.can_run(q)
    if name == "xformers":
        types = (torch.float32, torch.float16, torch.bfloat16)
        fits = q.device.type == "cuda" and q.dtype in types and rel_pos is None
        return fits and find_spec("xformers") is not None
    return name in KERNELS


def check_backend(backend: str, *, rel_pos: bool = False) -> None:
    """Raise an InputError unless `backend` is "auto" or the name of a kernel that is installed.

    Backbones call this when they are built, so that a training run does not stop at its first step;
    `rel_pos` says whether they have relative positions.
    """
    check_word("attention backend", backend, ["auto", *KERNELS])
    if backend == "xformers" and find_spec("xformers") is None:
        raise InputError(
            "attention backend 'xformers': there is no such package. Run `pip install xformers`, "
            "or use backend 'auto'."
        )
    if backend == "xformers" and rel_pos:
        raise InputError(
            "attention backend 'xformers': expected a backbone without relative positions, got "
            "use_rel_pos=True. Use backend 'auto'."
        )


def automatic(q: Tensor, rel_pos: RelPos | None) -> str:
    """Return the kernel that "auto" means for these inputs.

    benchmarks/attention.py on two cores of an AMD EPYC (AVX-512), torch 2.15: with a bias, blocks
    took 0.4 to 1 of sdpa's time without gradients and 0.34 to 0.77 with them, least for large maps.
    Without a bias neither was ahead, and sdpa was never slower than eager. No GPU was measured.
    """
    return "blocks" if rel_pos is not None and blocks.can_run(q) else "sdpa"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rel_pos: RelPos | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax(scale * q k^T + bias) v, exactly, with the chosen kernel.

    Args:
        q: (B, N, L, D) queries.
        k: (B, N, L, D) keys.
        v: (B, N, L, D) values.
        rel_pos: terms of the relative-position bias on the H x W grid of the keys (L = H * W), not
            scaled; None for no bias.
        scale: factor on q k^T, D ** -0.5 when None.
        backend: name of a kernel in KERNELS, or "auto", see `automatic`.

    Returns:
        (B, N, L, D).
    """
    name = automatic(q, rel_pos) if backend == "auto" else backend
    if not can_run(name, q, rel_pos):
        check_backend(backend)
        raise InputError(
            f"attention backend {name!r}: expected inputs that it supports, got q "
            f"{tuple(q.shape)} {q.dtype} on {q.device}, {'with' if rel_pos else 'without'} a "
            "position bias. Use backend 'auto' or 'eager'."
        )
    return KERNELS[name](q, k, v, rel_pos, q.shape[-1] ** -0.5 if scale is None else scale)
