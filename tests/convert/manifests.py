"""Published names and shapes, as tensors without data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

_ROOT = Path(__file__).parents[2]
CHECKPOINTS = Path(os.environ.get("VITDET_CHECKPOINTS", _ROOT / "../shared/checkpoints"))
needs_manifests = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)


@dataclass(frozen=True)
class Published:
    """One published file: names and shapes of its tensors, and how they are nested."""

    name: str
    nested_under: str
    beside: tuple[str, ...]
    tensors: dict[str, torch.Tensor]

    def content(self) -> dict[str, Any]:
        """Return what reading the file would give, on the meta device."""
        if not self.nested_under:
            return dict(self.tensors)
        return {self.nested_under: dict(self.tensors)} | dict.fromkeys(self.beside, 0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name: shape}."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


@cache
def published() -> dict[str, Published]:
    """Return every file of the manifests under its name."""
    paths = sorted(CHECKPOINTS.glob("*.json"))
    entries = [each for path in paths for each in json.loads(path.read_text())["checkpoints"]]
    return {entry["name"]: _expand(entry) for entry in entries}


def find(name: str) -> Published:
    """Return one file of the manifests by its name."""
    return published()[name]


def _expand(entry: dict[str, Any]) -> Published:
    described = dict(entry["tensors"])
    for group in entry["blocks"]:
        for index in group["indexes"]:
            for suffix, value in group["tensors"].items():
                described[f"{group['prefix']}{index}.{suffix}"] = value
    assert len(described) == entry["count"]
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in described.items()
    }
    nest = entry["top_level"]
    beside = tuple(name for name in nest.get("other", ()) if name.isidentifier())
    return Published(entry["name"], nest["key"] or "", beside, tensors)
