"""Seeds and versions: what a run needs in order to be repeated."""

from __future__ import annotations

import hashlib
import platform
import random
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

_PACKAGES = ("torch", "torchvision", "numpy", "timm", "fvcore", "pycocotools", "faster-coco-eval")
_States = tuple[tuple, dict, torch.Tensor, torch.Tensor | None]


def seed_from(*numbers: int) -> int:
    """Mix integers into one seed in [0, 2**63), the same on every machine and Python version."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_all(seed: int) -> None:
    """Seed `random`, NumPy's global generator and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RandomStream:
    """Random numbers (random, NumPy, torch) of their own, drawn from inside `with` blocks.

    Every block goes on where the one before stopped, and leaves the states outside as they were.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inside: _States | None = None

    def __enter__(self) -> None:
        self._outside = _states()
        if self._inside is None:
            seed_all(self._seed)
        else:
            _restore(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = _states()
        _restore(self._outside)


random_state = RandomStream  # for a single block


def _states() -> _States:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda


def _restore(states: _States) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])


def describe() -> dict[str, str]:
    """Return versions, device and the git commit of this checkout, for a run's record."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["threads"] = str(torch.get_num_threads())
    root = Path(__file__).resolve().parents[2]
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*"]
    found["git"] = "not a git checkout"
    if (root / ".git").exists() and shutil.which("git"):
        words.append("--dirty= with local changes")
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        found["git"] = done.stdout.strip() or "no commit yet"
    return found
