"""Reading, changing, saving and building recipes; test_configs.py builds the published ones."""

import sys

import pytest
from omegaconf import OmegaConf
from torch import nn

from vitdet.config import build_model, instantiate, load_config, save_config, set_num_classes
from vitdet.utils.checks import InputError

RECIPE = """
from detectron2.config import LazyCall as L
from torch import nn

from vitdet.layers.norms import channel_layer_norm

model = L(nn.Linear)(in_features=4, out_features="${data.width}")
norm = L(channel_layer_norm)(eps=1e-5)
data = dict(width=3, lr=1e-4, folder="out", flag=False, steps=[1, 2], clip=None, json="???")
train = dict(num_images=8, seed=1)
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def test_overrides_are_typed(recipe):
    overrides = ["data.width=7", "data.lr=1e-3", "data.folder=7", "data.flag=true"]
    overrides += ["data.steps=[5]", "data.steps.0=6", "data.clip=0.5", "data.json=data.json"]
    overrides += ["model.bias=false", "train.ema_decay=0.9", "train.clip_grad_norm=1"]
    overrides += ["train.patience=2", "train.eval_every=10%", "train.checkpoint_every=500"]
    cfg = load_config(recipe, overrides)
    assert cfg.data == {
        **{"width": 7, "lr": 1e-3, "folder": "7", "flag": True, "steps": [6], "clip": 0.5},
        "json": "data.json",
    }
    model = build_model(cfg.model)
    assert isinstance(model, nn.Linear)
    assert (model.out_features, model.bias) == (7, None)
    assert (cfg.train.seed, cfg.train.ema_decay, cfg.train.clip_grad_norm) == (1, 0.9, 1.0)
    assert (cfg.train.log_every, cfg.train.eval_every) == (None, "10%")
    assert (cfg.train.checkpoint_every, cfg.train.patience) == ("500 images", 2)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.widht=7", r"'data.widht': expected a key of data, got 'widht'. Did you mean data.w"),
        ("dta.width=7", r"expected a key of the recipe, got 'dta'. Did you mean data\?"),
        ("model.out_feature=7", r"Did you mean model.out_features\?"),
        ("data.jsn=7", r"Did you mean data.json\?"),
        ("data.width=big", "expected int, as the recipe's 3, got 'big'"),
        ("data.width=1.5", "expected int, as the recipe's 3, got '1.5'"),
        ("data.flag=7", "expected bool, as the recipe's False, got '7'"),
        ("data.steps=7", r"expected list, as the recipe's \[1, 2\], got '7'"),
        ("data.steps.9=7", "expected a key of data.steps, got '9'"),
        ("data.lr.x=1", r"expected a key of data.lr, got 'x'. It has no keys\."),
        ("data.width", "expected key=value, got data.width"),
        ("train.emadecay=1", r"Did you mean train.ema_decay\?"),
        ("train.ema_decay=a", r"train.ema_decay: Value 'a' of type 'str' could not be converted"),
    ],
)
def test_wrong_overrides(recipe, override, text):
    with pytest.raises(InputError, match=text) as caught:
        load_config(recipe, [override])
    assert "\n" not in str(caught.value)


def test_files_that_do_not_load_are_named(recipe):
    with pytest.raises(
        InputError, match=r"expected a recipe, got .*recipes.py. Did you mean .*recipe.py\?"
    ):
        load_config(recipe.with_name("recipes.py"))
    recipe.write_text("model = (")
    with pytest.raises(InputError, match="expected a recipe that loads, got SyntaxError"):
        load_config(recipe)
    yaml_file = recipe.with_suffix(".yaml")
    yaml_file.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="could not determine a constructor"):
        load_config(yaml_file)


def test_a_recipe_runs_once_until_it_changes(recipe):
    """One that registers a data set of detectron2 cannot run twice."""
    once = "import sys\nassert not hasattr(sys, 'ran'), 'ran before'\nsys.ran = True\n"
    recipe.write_text(once + RECIPE)
    try:
        first, second = load_config(recipe, ["data.width=7"]), load_config(recipe)
        assert (first.data.width, second.data.width) == (7, 3)
        recipe.write_text(RECIPE + once)
        with pytest.raises(InputError, match="AssertionError: ran before"):
            load_config(recipe)
    finally:
        del sys.ran


def test_saved_recipe_loads_again(recipe, tmp_path):
    cfg = load_config(recipe, ["data.lr=1e-3", "data.json=a"])
    save_config(cfg, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml", trust=True)
    assert again.train == cfg.train
    assert again.data == cfg.data
    assert again.model._target_ == "torch.nn.Linear"
    assert build_model(again.model).out_features == 3
    assert instantiate(again.norm)(2).eps == 1e-5
    made = OmegaConf.create({"train": {"made": print}}, flags={"allow_objects": True})
    with pytest.raises(InputError, match=r"config value train\.made: expected numbers"):
        save_config(made, tmp_path / "other.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.py", "saved.yaml"]


def test_number_of_classes():
    cfg = OmegaConf.create(
        {"model": {"roi_heads": {"num_classes": 80, "again": "${.num_classes}"}}}
    )
    set_num_classes(cfg, 3)
    assert cfg.model.roi_heads.again == 3
    cfg = OmegaConf.create({"model": {"num_classes": 80, "parts": [{"num_classes": 80}]}})
    set_num_classes(cfg, 4)
    assert cfg.model == {"num_classes": 4, "parts": [{"num_classes": 4}]}


class Part:
    def __init__(self, size, rate=0.1, name=None):
        self.size, self.rate, self.name = size, rate, name


def anything(**options):
    return options


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"size": 2, "raet": 1}, r"Part: got an unexpected keyword argument 'raet'\. Did you mean"),
        ({"rate": 1}, r"arguments of Part: missing a required argument: 'size'"),
    ],
)
def test_arguments_that_do_not_fit_are_named_when_they_are_built(given, text):
    parts = [{"_target_": "test_config.Part", **each} for each in ({"size": 2}, given)]
    node = OmegaConf.create({"_target_": "test_config.anything", "parts": parts})
    with pytest.raises(InputError, match=text) as caught:
        instantiate(node)
    assert "\n" not in str(caught.value)


def test_parts_take_the_place_of_arguments():
    node = OmegaConf.create({"_target_": "test_config.anything", "a": [1, 2], "b": "???"})
    node.c = {"_target_": "test_config.Part", "size": 2}
    found = instantiate(node, b=7)
    assert (found["a"], found["b"], found["c"].size) == ([1, 2], 7, 2)


def test_a_name_that_cannot_be_imported(tmp_path, monkeypatch):
    node = {"_target_": "vitdet.pyramid.SimpelFeaturePyramid", "net": None}
    with pytest.raises(InputError, match=r"_target_: expected a name that can be imported, got vi"):
        instantiate(node)
    (tmp_path / "interrupted_part.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        instantiate({"_target_": "interrupted_part.Part"})
