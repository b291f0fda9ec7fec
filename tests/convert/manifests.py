"""Published names and shapes, as tensors without data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[2]
CHECKPOINTS = Path(os.environ.get("VITDET_CHECKPOINTS", _ROOT / "../shared/checkpoints"))
GOLDEN = Path(os.environ.get("VITDET_GOLDEN", _ROOT / "../shared/golden"))


@dataclass(frozen=True)
class Published:
    """One published file: names and shapes of its tensors, and how they are nested."""

    family: str
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


def published(*families: str) -> Iterator[Published]:
    """Give every file of the manifests, of all families when none is named."""
    return (item for item in _all() if not families or item.family in families)


@cache
def _all() -> tuple[Published, ...]:
    paths = sorted(CHECKPOINTS.glob("*.json"))
    entries = [(path.stem, json.loads(path.read_text())["checkpoints"]) for path in paths]
    return tuple(_expand(family, entry) for family, found in entries for entry in found)


def _expand(family: str, entry: dict[str, Any]) -> Published:
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
    return Published(family, entry["name"], nest["key"] or "", beside, tensors)


def find(name: str) -> Published:
    """Return one file of the manifests by its name."""
    return next(item for item in published() if item.name == name)
