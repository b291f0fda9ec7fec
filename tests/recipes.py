"""Every recipe of configs/, loaded and built once for all tests of a process."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vitdet.config import build_model, load_config

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for path in sorted((ROOT / "configs").rglob("*.py"))
    # parts, and backbones for other projects (test_backbone_configs.py), are no recipes
    if not {"common", "backbones"}.intersection(path.relative_to(ROOT).parts)
]


@cache
def recipe(name: str) -> DictConfig:
    """The recipe: do not change it. What its user has to give is "given"."""
    path = ROOT / "configs" / f"{name}.py"
    missing = OmegaConf.missing_keys(load_config(path)) if name.startswith("own/") else ()
    return load_config(path, [f"{key}=given" for key in missing])


@cache
def model_of(name: str) -> nn.Module:
    """Its model on the meta device: do not change it."""
    return build_model(recipe(name).model, device="meta")


@cache
def text_of(name: str) -> str:
    """The recipe's file."""
    return (ROOT / "configs" / f"{name}.py").read_text()


@cache
def header(name: str) -> str:
    """Its docstring in one line."""
    return " ".join((ast.get_docstring(ast.parse(text_of(name))) or "").split())


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(value.numel() for value in model.parameters())


def shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{name: (shape, dtype)} of a model's state."""
    return {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
