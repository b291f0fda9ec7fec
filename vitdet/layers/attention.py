"""The one door to the attention kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from vitdet.layers.kernels import blocks, eager, flex, sdpa, triton_rel_pos, xformers
from vitdet.layers.rel_pos import RelPos
from vitdet.utils.checks import fail, nearest

logger = logging.getLogger(__name__)

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
    "flex": Kernel(flex.attention, flex.can_run, rel_pos=(True,)),
    "triton_rel_pos": Kernel(
        triton_rel_pos.attention, triton_rel_pos.can_run, triton_rel_pos.PACKAGE, (True,)
    ),
    "xformers": Kernel(xformers.attention, xformers.can_run, xformers.PACKAGE, (False,)),
}


class Choice(NamedTuple):
    """A line of the table behind "auto"; None stands for all.

    `most` is the largest number of tokens.
    """

    kernel: str
    device: str | None = None
    rel_pos: bool | None = None
    types: tuple[torch.dtype, ...] | None = None
    gradients: bool | None = None
    most: int | None = None


_TOLD: set[tuple[object, ...]] = set()
# "auto" is the first line that fits and whose kernel can run. Only what was measured stands here:
# triton_rel_pos joins it with the first table of benchmarks/gpu.py.
CHOICES = (
    # benchmarks/attention.py on two cores of an AMD EPYC (AVX-512), torch 2.15: with a bias, blocks
    # took 0.4 to 1 of sdpa's time without gradients and 0.34 to 0.77 with them, least for large
    # maps. Without a bias neither was ahead.
    Choice("blocks", "cpu", rel_pos=True),
    # Never slower than eager on a CPU.
    Choice("sdpa"),
)


def check_backend(backend: str, *, rel_pos: bool | None = None) -> None:
    """Raise an InputError unless `backend` is "auto" or the name of a kernel that is installed.

    Where `rel_pos` tells whether there are relative positions, the kernel must suit that. Backbones
    call this when they are built, so that a training run does not stop at its first step.
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
    if rel_pos is not None and backend in KERNELS and rel_pos not in KERNELS[backend].rel_pos:
        fail(
            f"attention backend {backend!r}",
            expected=f"a backbone {'without' if rel_pos else 'with'} relative positions",
            got=f"use_rel_pos={rel_pos}",
            remedy="Use backend 'auto'.",
        )


def automatic(q: torch.Tensor, rel_pos: RelPos | None) -> str:
    """Return the kernel that "auto" means for these inputs: the first of CHOICES that fits."""
    gradients = torch.is_grad_enabled() and q.requires_grad
    for choice in CHOICES:
        if (
            choice.device in (None, q.device.type)
            and choice.rel_pos in (None, rel_pos is not None)
            and (choice.types is None or q.dtype in choice.types)
            and choice.gradients in (None, gradients)
            and (choice.most is None or q.shape[-2] <= choice.most)
            and KERNELS[choice.kernel].can_run(q, rel_pos)
        ):
            _tell(choice.kernel, q.device.type, q.dtype, rel_pos is not None, gradients)
            return choice.kernel
    raise AssertionError("the last of CHOICES fits everything")


@torch.compiler.assume_constant_result  # a compiler runs it instead of cutting its graph here
def _tell(*choice: object) -> bool:
    """Log a choice once; return whether it was the first time."""
    if choice in _TOLD:
        return False
    _TOLD.add(choice)
    kernel, device, dtype, bias, gradients = choice
    logger.info(
        "attention on %s, %s, %s position bias, %s gradients: %s",
        device,
        str(dtype).removeprefix("torch."),
        "with" if bias else "without",
        "with" if gradients else "without",
        kernel,
    )
    return True


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
        backend: name of a kernel in KERNELS, or "auto": the fastest known, see CHOICES.

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
        bias = "with" if rel_pos else "without"
        fail(
            f"attention backend {name!r}",
            expected="inputs that it supports",
            got=f"q {tuple(q.shape)} {q.dtype} on {q.device}, {bias} a position bias",
            remedy="Use backend 'auto' or 'eager'.",
        )
    return kernel.run(q, k, v, rel_pos, q.shape[-1] ** -0.5 if scale is None else scale)
