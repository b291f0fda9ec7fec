"""Where a run computes, and in which number format."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from vitdet.utils.checks import InputError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the type that autocast uses on a device, or None for no autocast.

    "auto" is bf16 where the device multiplies in bf16 itself, else fp32.

    Raises:
        InputError: another precision.
    """
    if precision not in PRECISIONS:
        names = ", ".join(PRECISIONS)
        raise InputError(f"precision: expected one of {names}, got {precision}. auto chooses.")
    if precision == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """Return a device that is here: "cpu", "cuda", "cuda:1" or "1", "mps", "auto" (CUDA or CPU).

    Raises:
        InputError: torch has no such device, or none on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if str(name).isdigit():
        name = f"cuda:{name}"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:200]
        text = f"torch cannot use it ({reason}). Choose auto, cpu, cuda, cuda:N, mps"
        raise InputError(f"device {name}: {text}, or install a torch for your GPU.") from error
    return device


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type to sum in: float32 for half precision, else that of x."""
    return torch.promote_types(x.dtype, torch.float32)


def no_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which products on the device of x have the types of their factors."""
    if x.device.type == "meta":  # has no autocast
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
