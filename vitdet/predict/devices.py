"""Where a predictor computes."""

from __future__ import annotations

import torch

from vitdet.utils.checks import fail


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """Return a device that is here.

    Args:
        name: "auto" (the GPU that CUDA offers, else the CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises:
        InputError: no such device, or none of this kind on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return device
    if device.type == "cuda":
        _check_cuda(device)
        return device
    if device.type != "mps":
        remedy = "auto takes the GPU where there is one."
        fail("device", expected="auto, cpu, cuda, cuda:N or mps", got=repr(name), remedy=remedy)
    if not torch.backends.mps.is_available():
        remedy = "It is the GPU of Apple's processors; use device=auto or cpu."
        fail("device mps", expected="a torch that can use it", got="none here", remedy=remedy)
    return device


def _check_cuda(device: torch.device) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        remedy = "Use device=auto or cpu, or install a torch build for your GPU's driver."
        fail(f"device {device}", expected="a GPU that torch can use", got="none", remedy=remedy)
    if device.index is not None and device.index >= count:
        expected = f"a number below {count}, the GPUs that torch sees"
        fail(f"device {device}", expected=expected, got=device.index, remedy="Take one of them.")
