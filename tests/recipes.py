"""Every recipe of configs/, loaded and built once for all tests of a process."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from vitdet.config import build_model, load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"


@cache
def rows(family):
    """{name: row} of a table of recipes, such as "paper"."""
    return LazyConfig.load(str(CONFIGS / f"{family}.py"), "recipes").rows


TABLES = sorted({*(path.stem for path in CONFIGS.glob("*.py")), "mini/variants"})
NAMES = sorted(
    [f"{family}/{name}" for family in TABLES for name in rows(family)]
    + [
        path.relative_to(CONFIGS).with_suffix("").as_posix()
        for path in CONFIGS.glob("*/*.py")
        # parts, tables, and backbones for other projects (test_backbone_configs.py)
        if path.parent.name not in ("common", "backbones") and path.stem != "variants"
    ]
)


_FIRST = {name.rpartition("/")[0]: name for name in reversed(NAMES)}  # of each family


def each(names):
    """Parameters of a test: every recipe, all but the first of each family marked as slow."""
    slow = pytest.mark.slow
    return [pytest.param(n, marks=() if n in _FIRST.values() else slow) for n in names]


class Published(NamedTuple):
    """Numbers of the source, a second time: AP as text, "" where there is none; parameters."""

    box_ap: str
    mask_ap: str
    parameters: int


with (ROOT / "tests/published.csv").open(newline="") as _file:
    PUBLISHED = {
        line["recipe"]: Published(line["box AP"], line["mask AP"], int(line["parameters"]))
        for line in csv.DictReader(_file)
    }


@cache
def recipe(name):
    """The recipe: do not change it. What its user has to give is "given"."""
    path = CONFIGS / f"{name}.py"
    missing = OmegaConf.missing_keys(load_config(path)) if name.startswith("own/") else ()
    return load_config(path, [f"{key}=given" for key in missing])


@cache
def model_of(name):
    """Its model on the meta device: do not change it."""
    return build_model(recipe(name).model, device="meta")


def count(model):
    """Number of parameters."""
    return sum(value.numel() for value in model.parameters())
