"""Layer-wise lr decay and weight decay equal the published tables, parameter by parameter."""

from __future__ import annotations

import pytest

from vitdet.optim import parameter_table

from .cases import ABSENT, Options, UnsupportedCase, discover, folder, is_built, read_table
from .lr_tables import RECIPES, Table, build, has_recipe, recipe

ROOT = folder()
NAMES = [name for name in discover(ROOT) if name.startswith("lr_decay/") and is_built(name)]

_KEYS = {"what", "source", "notes", "config", "columns", "table", "not_in_optimizer"}
_COLUMNS = ["lr multiplier", "weight decay"]


def read_case(name: str) -> tuple[Options, dict[str, list[float]], list[str]]:
    """Return the config and the table of a case, and the parameters that no optimizer has."""
    assert ROOT is not None, ABSENT
    info = read_table(ROOT, name)
    if unknown := sorted(set(info) - _KEYS):
        raise UnsupportedCase(f"{name}: unknown keys {unknown} at the top of the JSON file")
    if info["columns"] != _COLUMNS:
        raise UnsupportedCase(f"{name}: expected columns {_COLUMNS}, got {info['columns']}")
    config = Options(info["config"], f"{name}: config")
    return config, info["table"], info.get("not_in_optimizer", [])


def built(name: str) -> tuple[Table, dict[str, list[float]], list[str]]:
    """Return a case with its model; every key of its config was used."""
    config, stored, left_out = read_case(name)
    table = build(name, config)
    config.done()
    return table, stored, left_out


@pytest.mark.parametrize("name", NAMES)
def test_table(name: str) -> None:
    table, stored, left_out = built(name)
    names = table.names
    found = parameter_table(table.model, **table.arguments)
    got = {names.get(key, key): list(setting) for key, setting in found.items()}
    assert len(got) == len(found)
    assert sorted(got) == sorted(stored)
    frozen = {names.get(k, k) for k, _ in table.model.named_parameters() if k not in found}
    assert sorted(frozen) == sorted(left_out)
    wrong = {
        key: f"got {got[key]}, stored {stored[key]}"
        for key in stored
        if got[key] != pytest.approx(stored[key], rel=1e-9)
    }
    assert not wrong


@pytest.mark.parametrize("name", [name for name in NAMES if has_recipe(name)])
def test_recipe_has_the_published_optimizer(name: str) -> None:
    table, _, _ = built(name)
    assert table.recipe is not None
    for key, value in (table.arguments | table.published).items():
        assert table.recipe.optimizer[key] == value, key


def test_every_published_config_of_eva02_has_a_recipe_of_its_own() -> None:
    found = [recipe(f"projects/ViTDet/configs/any/{name}.py") for name in RECIPES]
    assert len(found) == len(set(RECIPES.values())) == 10
    with pytest.raises(UnsupportedCase, match="no recipe for the published config"):
        recipe("projects/ViTDet/configs/COCO/unheard_of.py")
