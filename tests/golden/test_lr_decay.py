"""Layer-wise lr decay and weight decay equal the published tables, parameter by parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from torch import nn

from vitdet.config import build_model, load_config
from vitdet.optim import parameter_table

from .cases import (
    ABSENT,
    PROJECT,
    Options,
    UnsupportedCase,
    discover,
    folder,
    is_built,
    read_table,
)

ROOT = folder()
NAMES = [name for name in discover(ROOT) if name.startswith("lr_decay/") and is_built(name)]
pytestmark = pytest.mark.skipif(ROOT is None, reason=ABSENT)

_KEYS = {"what", "source", "notes", "config", "columns", "table"}
_COLUMNS = ["lr multiplier", "weight decay"]


def read_case(name: str) -> tuple[Options, dict[str, list[float]]]:
    """Return the config and the table of a case."""
    assert ROOT is not None
    info = read_table(ROOT, name)
    if unknown := sorted(set(info) - _KEYS):
        raise UnsupportedCase(f"{name}: unknown keys {unknown} at the top of the JSON file")
    if info["columns"] != _COLUMNS:
        raise UnsupportedCase(f"{name}: expected columns {_COLUMNS}, got {info['columns']}")
    return Options(info["config"], f"{name}: config"), info["table"]


def recipe(config: Options) -> DictConfig:
    """Return the project's recipe of the same name as the published one."""
    published = Path(config.take("config_file"))
    return load_config(PROJECT / "configs" / published.parent.name / published.name)


def tiny_model(config: Options) -> nn.Module:
    """Build the recipe's detector with the depth and width of the case, shapes only."""
    cfg = recipe(config)
    depth = config.take("depth")
    config.only("num_layers", (depth,))  # vitdet asks the backbone for its number of layers
    windows = config.take("window_block_indexes")
    net = cfg.model.backbone.net
    net.depth, net.embed_dim = depth, config.take("embed_dim")
    net.num_heads = 1  # names do not depend on it, and it divides every width
    net.global_block_indexes = [i for i in range(depth) if i not in windows]
    return build_model(cfg.model, "meta")


def arguments(config: Options) -> dict[str, Any]:
    """Return the arguments of `parameter_table`."""
    overrides = config.section("overrides")
    for name in list(overrides.values):
        override = overrides.section(name)
        override.only("weight_decay", (0.0,))
        override.done()
    overrides.done()
    return {
        "layer_decay_rate": config.take("lr_decay_rate"),
        "weight_decay": config.take("weight_decay"),
        "weight_decay_norm": config.take("weight_decay_norm"),
        "no_decay": tuple(overrides.values),
    }


@pytest.mark.parametrize("name", NAMES)
def test_table(name: str) -> None:
    config, stored = read_case(name)
    table = parameter_table(tiny_model(config), **arguments(config))
    config.inert("base_lr", "betas")  # compared with the recipe below
    config.done()
    assert sorted(table) == sorted(stored)
    got = {key: list(setting) for key, setting in table.items()}
    wrong = {
        key: f"got {got[key]}, stored {stored[key]}"
        for key in stored
        if got[key] != pytest.approx(stored[key], rel=1e-9)
    }
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_the_published_optimizer(name: str) -> None:
    config, _ = read_case(name)
    optimizer = recipe(config).optimizer
    expected = arguments(config) | {"lr": config.take("base_lr"), "betas": config.take("betas")}
    for key, value in expected.items():
        got = optimizer[key]
        assert got == (list(value) if isinstance(value, tuple) else value), key
