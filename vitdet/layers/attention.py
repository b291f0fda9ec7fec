"""The one door to the attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from vitdet.layers.kernels import eager, sdpa, xformers
from vitdet.layers.rel_pos import RelPos
from vitdet.utils.checks import fail, nearest

_Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "RelPos | None", float], torch.Tensor]


class Kernel(NamedTuple):
    """A kernel: `run` computes, `can_run` tells whether it can for these inputs.

    `package` is the optional package that it needs, "" for none, `takes_rel_pos` whether it can
    compute with relative positions at all.
    """

    run: _Run
    can_run: Callable[[torch.Tensor, RelPos | None], bool]
    package: str = ""
    takes_rel_pos: bool = True


KERNELS: dict[str, Kernel] = {
    "eager": Kernel(eager.attention, eager.can_run),
    "sdpa": Kernel(sdpa.attention, sdpa.can_run),
    "xformers": Kernel(xformers.attention, xformers.can_run, xformers.PACKAGE, False),
}


def check_backend(backend: str, *, rel_pos: bool = False) -> None:
    """Raise an InputError unless `backend` is "auto" or the name of a kernel that is installed.

    With `rel_pos` it must also be able to compute with relative positions. Backbones call this when
    they are built, so that a training run does not stop at its first step.
    """
    names = ["auto", *KERNELS]
    if backend not in names:
        meant = nearest(backend, names)
        fail(
            "attention backend",
            expected=f"one of {', '.join(names)}",
            got=repr(backend),
            remedy=f"Did you mean {meant!r}?" if meant else "Take one of these.",
        )
    package = KERNELS[backend].package if backend in KERNELS else ""
    if package and find_spec(package) is None:
        fail(
            f"attention backend {backend!r}",
            expected=f"the package {package}",
            got="no such package",
            remedy=f"Run `pip install {package}`, or use backend 'auto'.",
        )
    if rel_pos and backend in KERNELS and not KERNELS[backend].takes_rel_pos:
        fail(
            f"attention backend {backend!r}",
            expected="a backbone without relative positions",
            got="use_rel_pos=True",
            remedy="Use backend 'auto'.",
        )


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
        backend: name of a kernel in KERNELS, or "auto": sdpa, which was at least as fast as eager
            in every size measured (benchmarks/attention.py) and never holds an L x L matrix in
            inference.

    Returns:
        (B, N, L, D).

    Raises:
        InputError: no such kernel, or it cannot run for these inputs.
    """
    name = "sdpa" if backend == "auto" else backend
    if name not in KERNELS:
        check_backend(backend)
    kernel = KERNELS[name]
    if not kernel.can_run(q, rel_pos):
        check_backend(name)
        bias = "with" if rel_pos else "without"
        fail(
            f"attention backend {name!r}",
            expected="inputs that it supports",
            got=f"q {tuple(q.shape)} {q.dtype} on {q.device}, {bias} a position bias",
            remedy="Use backend 'auto' or 'eager'.",
        )
    return kernel.run(q, k, v, rel_pos, q.shape[-1] ** -0.5 if scale is None else scale)
