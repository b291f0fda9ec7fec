"""Layer-wise lr decay and weight decay equal the published tables, parameter by parameter."""

from __future__ import annotations

import fnmatch

import pytest

from vitdet.optim import parameter_table

from .cases import ABSENT, Options, UnsupportedCase, discover, folder, is_built, read_table
from .lr_models import RECIPES, WITHOUT_RECIPE, build, recipe

ROOT = folder()
NAMES = [name for name in discover(ROOT) if name.startswith("lr_decay/") and is_built(name)]

_KEYS = {"what", "source", "notes", "config", "columns", "table", "not_in_optimizer"}
_COLUMNS = ["lr multiplier", "weight decay"]


@pytest.mark.parametrize("name", NAMES)
def test_table_and_the_optimizer_of_the_recipe(name: str) -> None:
    assert ROOT is not None, ABSENT
    info = read_table(ROOT, name)
    if set(info) - _KEYS or info["columns"] != _COLUMNS:
        raise UnsupportedCase(f"{name}: keys {sorted(info)}, columns {info['columns']}")
    config = Options(info["config"], f"{name}: config")
    left_out = info.get("not_in_optimizer", [])
    table = build(name, config, [*info["table"], *left_out])
    config.done()
    found = parameter_table(table.model, **table.arguments)
    stored = {table.names.get(key, key): value for key, value in info["table"].items()}
    assert len(stored) == len(info["table"])
    assert sorted(found) == sorted(stored)
    frozen = {key for key, _ in table.model.named_parameters()} - found.keys()
    assert frozen == {table.names.get(key, key) for key in left_out}
    wrong = {
        key: f"got {list(found[key])}, stored {value}"
        for key, value in stored.items()
        if list(found[key]) != pytest.approx(value, rel=1e-9)
    }
    assert not wrong
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in WITHOUT_RECIPE):
        assert table.recipe is not None
        for key, value in (table.arguments | table.published).items():
            assert table.recipe.optimizer[key] == value, key


def test_every_published_config_of_eva02_has_a_recipe_of_its_own() -> None:
    found = [recipe(f"projects/ViTDet/configs/any/{name}.py") for name in RECIPES]
    assert len(found) == len(set(RECIPES.values())) == 10
    with pytest.raises(UnsupportedCase, match="no recipe for the published config"):
        recipe("projects/ViTDet/configs/COCO/unheard_of.py")
