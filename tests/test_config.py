"""Reading, changing, saving and building recipes; test_configs.py builds the published ones."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from vitdet.config import build_model, instantiate, load_config, save_config, set_num_classes
from vitdet.utils.checks import InputError

RECIPE = """
from detectron2.config import LazyCall as L
from torch import nn

from vitdet.layers.norms import channel_layer_norm

model = L(nn.Linear)(in_features=4, out_features="${train.width}")
norm = L(channel_layer_norm)(eps=1e-5)
train = dict(width=3, lr=1e-4, output_dir="out", flag=False, steps=[1, 2], clip=None)
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def test_overrides_are_typed(recipe):
    cfg = load_config(
        recipe,
        [
            "train.width=7",
            "train.lr=1e-3",
            "train.output_dir=7",
            "train.flag=true",
            "train.steps=[5]",
            "train.steps.0=6",
            "train.clip=0.5",
            "model.bias=false",
        ],
    )
    assert cfg.train == {
        "width": 7,
        "lr": 1e-3,
        "output_dir": "7",
        "flag": True,
        "steps": [6],
        "clip": 0.5,
    }
    model = build_model(cfg.model)
    assert isinstance(model, nn.Linear)
    assert (model.out_features, model.bias) == (7, None)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "train.widht=7",
            r"'train.widht': expected a key of train, got 'widht'. Did you mean train.width\?",
        ),
        ("trian.width=7", r"expected a key of the recipe, got 'trian'. Did you mean train\?"),
        ("model.out_feature=7", r"Did you mean model.out_features\?"),
        ("train.width=big", "expected int, as the recipe's 3, got 'big'"),
        ("train.width=1.5", "expected int, as the recipe's 3, got '1.5'"),
        ("train.lr=fast", "expected float, as the recipe's 0.0001, got 'fast'"),
        ("train.flag=7", "expected bool, as the recipe's False, got '7'"),
        ("train.steps=7", "expected a list, got '7'"),
        ("train.steps.9=7", "expected a key of train.steps, got '9'"),
        ("train.width", "expected key=value, got train.width"),
    ],
)
def test_wrong_overrides(recipe, override, text):
    with pytest.raises(InputError, match=text) as caught:
        load_config(recipe, [override])
    assert "\n" not in str(caught.value)


def test_a_value_left_open_can_be_given(recipe):
    recipe.write_text(RECIPE + '\ndata = dict(json="???")\n')
    assert load_config(recipe, ["data.json=train.json"]).data.json == "train.json"
    with pytest.raises(InputError, match=r"Did you mean data.json\?"):
        load_config(recipe, ["data.jsn=train.json"])


def test_missing_file_names_the_nearest(recipe):
    with pytest.raises(
        InputError, match=r"expected a recipe, got .*recipes.py. Did you mean .*recipe.py\?"
    ):
        load_config(recipe.with_name("recipes.py"))


def test_a_file_that_does_not_load_says_why(recipe):
    recipe.write_text("model = (")
    with pytest.raises(InputError, match="expected a recipe that loads"):
        load_config(recipe)
    yaml_file = recipe.with_suffix(".yaml")
    yaml_file.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="could not determine a constructor"):
        load_config(yaml_file)


def test_saved_recipe_loads_again(recipe, tmp_path):
    cfg = load_config(recipe, ["train.lr=1e-3"])
    save_config(cfg, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml", trust=True)
    assert OmegaConf.to_container(again.train) == OmegaConf.to_container(cfg.train)
    assert again.model._target_ == "torch.nn.Linear"
    assert build_model(again.model).out_features == 3
    assert instantiate(again.norm)(2).eps == 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.py", "saved.yaml"]


def test_what_cannot_be_saved_is_named_and_leaves_no_file(recipe, tmp_path):
    cfg = OmegaConf.create({"train": {"made": print}}, flags={"allow_objects": True})
    with pytest.raises(InputError, match=r"config value train\.made: expected numbers"):
        save_config(cfg, tmp_path / "saved.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.py"]


def test_number_of_classes():
    cfg = OmegaConf.create(
        {"model": {"roi_heads": {"num_classes": 80, "again": "${.num_classes}"}}}
    )
    set_num_classes(cfg, 3)
    assert cfg.model.roi_heads.again == 3
    cfg = OmegaConf.create({"model": {"num_classes": 80}})
    set_num_classes(cfg, 4)
    assert cfg.model.num_classes == 4


def test_meta_device_takes_constructors_that_read_a_linspace():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
            self.layer = nn.Linear(2, 2)

    model = build_model(
        OmegaConf.create({"_target_": Reads}, flags={"allow_objects": True}), "meta"
    )
    assert model.rates == [0, 0.5, 1]
    assert model.layer.weight.is_meta


# --- arguments of the callables ------------------------------------------------------------------


class Part:
    def __init__(self, size: int, rate: float = 0.1, name: str | None = None, on: bool = True):
        self.size, self.rate, self.name, self.on = size, rate, name, on


def anything(**options: int) -> dict[str, int]:
    return options


PARTS = """
from detectron2.config import LazyCall as L
from test_config import Part, anything

model = dict(parts=[L(Part)(size=2), L(Part)({arguments})])
free = L(anything)(whatever=1)
train = dict(size=3)
"""


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            "size=2, raet=0.2",
            "expected an argument of Part, got 'raet'. Did you mean model.parts.1",
        ),
        ("size=2, xyz=1", "expected an argument of Part, got 'xyz'. It has size, rate, name, on."),
        ("rate=1", r"model.parts.1.size: expected a value, as Part asks for, got none. Add it to"),
        ("size=2.0", "model.parts.1.size: expected int, got 2.0. Give a value of that type."),
        ("size='big'", "model.parts.1.size: expected int, got 'big'"),
        ("size=True", "model.parts.1.size: expected int, got True"),
        ("size=2, rate='1e-4 '", "model.parts.1.rate: expected float, got '1e-4 '"),
        ("size=2, name=3", "model.parts.1.name: expected str | None, got 3"),
        ("size=2, on=0", "model.parts.1.on: expected bool, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path, arguments, text, suffix):
    path = tmp_path / f"recipe{suffix}"
    if suffix == ".py":
        path.write_text(PARTS.replace("{arguments}", arguments))
    else:
        values = eval(f"dict({arguments})")
        parts = [{"_target_": "test_config.Part", **each} for each in ({"size": 2}, values)]
        OmegaConf.save(OmegaConf.create({"model": {"parts": parts}}), path)
        text = text.replace("Part ", "test_config.Part ").replace("Part,", "test_config.Part,")
    with pytest.raises(InputError) as caught:
        load_config(path, trust=True)
    assert text in str(caught.value)
    assert str(caught.value).startswith("model.parts.1.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    ["size='???'", "size='${train.size}'", "size=2, rate=1", "size=2, name=None", "size=[1, 2]"],
)
def test_arguments_that_may_fit_pass(tmp_path, arguments):
    path = tmp_path / "recipe.py"
    path.write_text(PARTS.replace("{arguments}", arguments))
    assert load_config(path).free.whatever == 1


def test_a_name_that_cannot_be_imported_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {_target_: vitdet.pyramid.SimpelFeaturePyramid, net: null}\n")
    with pytest.raises(InputError, match=r"model\._target_: expected a name that can be imported"):
        load_config(path, trust=True)


def test_an_interrupt_while_a_part_is_imported_is_one(tmp_path, monkeypatch):
    (tmp_path / "interrupted_part.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text('model = {"_target_": "interrupted_part.Part"}')
    with pytest.raises(KeyboardInterrupt):
        load_config(recipe)


def test_notes_stand_at_the_top_of_a_saved_recipe(recipe, tmp_path):
    save_config(load_config(recipe), tmp_path / "saved.yaml", ["first: 1", "second"])
    assert (tmp_path / "saved.yaml").read_text().startswith("# first: 1\n# second\nmodel:")
    assert load_config(tmp_path / "saved.yaml", trust=True).train.width == 3
