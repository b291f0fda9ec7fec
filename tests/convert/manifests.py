"""Published names and shapes, as tensors without data; and small models of ours."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from vitdet.backbones.vit import ViT
from vitdet.convert.names import shapes_of
from vitdet.pyramid import SimpleFeaturePyramid

Weights = dict[str, torch.Tensor]
_SHARED = Path(__file__).parents[2] / "../shared"
CHECKPOINTS = [
    Path(os.environ.get(f"VITDET_{name.upper()}", _SHARED / name))
    for name in ("checkpoints", "checkpoints2")
]
needs_manifests = pytest.mark.skipif(
    not all(folder.is_dir() for folder in CHECKPOINTS),
    reason=f"no manifests: VITDET_CHECKPOINTS, VITDET_CHECKPOINTS2 are {CHECKPOINTS}",
)


@dataclass(frozen=True)
class Published:
    """One published file: names and shapes of its tensors, and how they are nested."""

    name: str
    nested_under: str
    beside: tuple[str, ...]
    tensors: Weights

    def content(self):
        """Return what reading the file would give, on the meta device."""
        if not self.nested_under:
            return dict(self.tensors)
        return {self.nested_under: dict(self.tensors)} | dict.fromkeys(self.beside, 0)

    def shapes(self):
        """Return {name: shape}."""
        return shapes_of(self.tensors)


@cache
def published():
    """Return every file of the manifests under its name."""
    paths = sorted(path for folder in CHECKPOINTS for path in folder.glob("*.json"))
    entries = [each for path in paths for each in json.loads(path.read_text())["checkpoints"]]
    return {entry["name"]: _expand(entry) for entry in entries}


def find(name):
    """Return one file of the manifests by its name."""
    return published()[name]


def _expand(entry):
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


# --- small models --------------------------------------------------------------------------------

SIZES = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2}
RECIPE = f"""
from detectron2.config import LazyCall as L
from vitdet.backbones.vit import ViT
from vitdet.pyramid import SimpleFeaturePyramid

net = L(ViT)(**{SIZES}, pretrain_img_size=64)
model = L(SimpleFeaturePyramid)(net=net, out_channels=8, scale_factors=(1.0,))
"""


def vit(**changes):
    """Return a ViT of two blocks of 16 channels for 4 x 4 patches."""
    return ViT(**SIZES | {"pretrain_img_size": 64} | changes)


def pyramid(net, levels=1):
    """Return the pyramid that `RECIPE` has, or one with more levels."""
    scales = [1.0] if levels == 1 else [4.0, 2.0, 1.0, 0.5, 0.25][:levels]
    how = {"downsample": "conv", "square_pad": 0} if levels > 1 else {}
    return SimpleFeaturePyramid(net, out_channels=8, scale_factors=scales, **how)


def random(model):
    """Return random weights for a model, a buffer's among them."""
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def mae(**changes):
    """Return random weights as MAE saves them."""
    weights = random(vit(**changes))
    tokens = {"cls_token": torch.randn(1, 1, 16), "norm.weight": torch.randn(16)}
    return weights | tokens | {"norm.bias": torch.randn(16)}
