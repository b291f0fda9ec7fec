"""The one door to the attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from vitdet.layers.kernels import blocks, eager, sdpa, triton_rel_pos, xformers
from vitdet.layers.rel_pos import RelPos
from vitdet.utils.checks import InputError, nearest

_Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "RelPos | None", float], torch.Tensor]


class Kernel(NamedTuple):
    """A kernel: `run` computes, `can_run` tells whether it can for these inputs.

    `package` is the optional package that it needs, "" for none, `rel_pos` tells whether it can
    compute with relative positions, and without.
    """

    run: _Run
    can_run: Callable[[torch.Tensor, RelPos | None], bool]
    package: str = ""
    rel_pos: tuple[bool, ...] = (True, False)


KERNELS: dict[str, Kernel] = {
    "eager": Kernel(eager.attention, eager.can_run),
    "blocks": Kernel(blocks.attention, blocks.can_run),
    "sdpa": Kernel(sdpa.attention, sdpa.can_run),
    "triton_rel_pos": Kernel(
        triton_rel_pos.attention, triton_rel_pos.can_run, triton_rel_pos.PACKAGE, (True,)
    ),
    "xformers": Kernel(xformers.attention, xformers.can_run, xformers.PACKAGE, (False,)),
}


def check_backend(backend: str, *, rel_pos: bool | None = None) -> None:
    """Raise an InputError unless `backend` is "auto" or the name of a kernel that is installed.

    Where `rel_pos` tells whether there are relative positions, the kernel must suit that. Backbones
    call this when they are built, so that a training run does not stop at its first step.
    """
    names = ["auto", *KERNELS]
    if backend not in names:
        meant = nearest(backend, names)
        raise InputError(
            f"attention backend: expected one of {', '.join(names)}, got {backend!r}. "
            + (f"Did you mean {meant!r}?" if meant else "Take one of these.")
        )
    if backend == "auto":
        return
    kernel = KERNELS[backend]
    if kernel.package and find_spec(kernel.package) is None:
        raise InputError(
            f"attention backend {backend!r}: expected the package {kernel.package}, got no such "
            f"package. Run `pip install {kernel.package}`, or use backend 'auto'."
        )
    if rel_pos is not None and rel_pos not in kernel.rel_pos:
        raise InputError(
            f"attention backend {backend!r}: expected a backbone "
            f"{'without' if rel_pos else 'with'} relative positions, got use_rel_pos={rel_pos}. "
            "Use backend 'auto'."
        )


def automatic(q: torch.Tensor, rel_pos: RelPos | None) -> str:
    """Return the kernel that "auto" means for these inputs.

    benchmarks/attention.py on two cores of an AMD EPYC (AVX-512), torch 2.15: with a bias, blocks
    took 0.4 to 1 of sdpa's time without gradients and 0.34 to 0.77 with them, least for large maps.
    Without a bias neither was ahead, and sdpa was never slower than eager. No GPU was measured.
    """
    on_cpu = q.device.type == "cpu" and rel_pos is not None
    return "blocks" if on_cpu and KERNELS["blocks"].can_run(q, rel_pos) else "sdpa"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    rel_pos: RelPos | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
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

    Raises:
        InputError: no such kernel, or it cannot run for these inputs.
    """
    name = automatic(q, rel_pos) if backend == "auto" else backend
    if name not in KERNELS:
        check_backend(backend)
    kernel = KERNELS[name]
    if not kernel.can_run(q, rel_pos):
        check_backend(name)
        raise InputError(
            f"attention backend {name!r}: expected inputs that it supports, got q "
            f"{tuple(q.shape)} {q.dtype} on {q.device}, {'with' if rel_pos else 'without'} a "
            "position bias. Use backend 'auto' or 'eager'."
        )
    return kernel.run(q, k, v, rel_pos, q.shape[-1] ** -0.5 if scale is None else scale)
