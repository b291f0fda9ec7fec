"""A recipe that came from elsewhere is plain data: no place in it runs, opens or asks for anything.

Each attack changes the recipe of a real checkpoint. It stands in every file that a command takes a
recipe from, and a canary says whether it ran.
"""

import copy
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import converter
import train_net
from vitdet import checkpoint
from vitdet.app import cli
from vitdet.config import config_text
from vitdet.plain_recipes import plain_recipe, recipe_of_file
from vitdet.predict.loading import load
from vitdet.utils.checks import InputError

RECIPE = Path(__file__).resolve().parents[1] / "configs/mini/mask_rcnn_eva02_shapes.py"


# --- attacks ----------------------------------------------------------------------------------


def _set(recipe, path, value, command=""):
    """Return a copy with a value at a path; COMMAND in it touches the canary."""
    found = copy.deepcopy(recipe)
    *parents, last = path.split(".")
    node = found
    for part in parents:
        node = node[part]
    node[last] = yaml.safe_load(json.dumps(value).replace("COMMAND", command))
    return found


RUN = {"_target_": "os.system", "command": "COMMAND"}
CREATE = "${oc.create:{_target_:os.system,command:'COMMAND'}}"
MAPPER = "dataloader.test.mapper.image_format"
NETWORK = {"_target_": "vitdet.data.images.read_image"}
NETWORK |= {"record": {"file_name": "http://localhost:9/x.jpg"}}
LARGE = {"_target_": "torch.nn.Linear", "in_features": 200_000, "out_features": 200_000}
# the ones that run code, open a file or ask the network today, one of each kind
RUNNING = {
    "a target": ("model.anything", RUN),
    "a target as a target": (MAPPER, {"_target_": RUN}),
    "a target that is made": ("model._target_", {"_target_": "pydoc.locate", "path": "os.system"}),
    "a target in train": ("train.seed", RUN),
    "a target as the evaluator": ("dataloader.evaluator", RUN),
    "oc.create": (MAPPER, CREATE),
    "oc.create in a key": ("model", {CREATE: 1, "_target_": "detectron2.modeling.FPN"}),
    "oc.env": ("model.input_format", "${oc.env:TRUST_SECRET}"),
    "an image of the network": (MAPPER, NETWORK),
}
# ... and what else a saved recipe could not have
ODD = {
    "a known name in another place": ("model.x", {"_target_": "vitdet.optim.adamw"}),
    "a module": ("model.x", {"_target_": "vitdet.heads"}),
    "a target of no text": ("model.x", {"_target_": 3}),
    "a class of torch": (MAPPER, LARGE),
    "oc.decode": ("model.input_format", "${oc.decode:${train.device}}"),
    "an address": ("dataloader.test.dataset.json", "http://example.org/a.json"),
    "a path in the model": ("model.input_format", "/etc/passwd"),
    "a long text": ("model.input_format", "x" * 5_000),
    "a line break": ("train.output_dir", "a\nb"),
    "a large number": ("model.backbone.square_pad", 10**9),
    "many workers": ("dataloader.test.num_workers", 10_000),
    "depth": ("model.backbone.net.depth", 100_000),
    "a long list": ("model.pixel_mean", [1.0] * 1_000),
    "a key of two words": ("model", {"a b": 1}),
}
LINE = "train:\n"
# ... as text: what stands in `train`, and what becomes of the whole text
IN_TRAIN = {
    "an object of Python": "x: !!python/object/apply:os.getcwd []",
    "an alias": "a: &a [1, 2]\n  b: *a",
    "deep": f"a: {'[' * 20_000}{']' * 20_000}",
    "many nodes": f"a: [{'1,' * 40_000}]",
    "a number of many digits": f"a: {'9' * 6_000}",
    "an infinite number": "a: -.inf",
    "a number as a key": "7: 1",
    "a date": "a: 2020-01-01",
    "an empty number": "a: !!int ''",
    "bytes": "a: !!binary aGk=",
    "a key that is a list": "? [a]\n  : 1",
    "a zero character": "a: \0",
}
TEXTS = {
    "merged keys": lambda t: (
        t
        + "a0: &a0 {x: 1}\n"
        + "".join(f"a{i + 1}: &a{i + 1}\n  <<: [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
    ),
    "long": lambda t: t + "#" * 10_000_000,
    "nothing": lambda _: "",
    "no YAML": lambda _: "a: [",
    "parts that are no groups": lambda _: "model: a\ndataloader: b\n",
}
TEXTS |= {
    name: lambda t, line=line: t.replace(LINE, f"{LINE}  {line}\n")
    for name, line in IN_TRAIN.items()
}


@pytest.fixture(scope="module")
def whole(drawn_run):
    return config_text(drawn_run.cfg)


@pytest.mark.parametrize("name", [*RUNNING, *ODD, *TEXTS])
def test_an_attack_is_one_line_at_once(whole, name):
    if name in TEXTS:
        text = TEXTS[name](whole)
    else:
        changed = _set(yaml.safe_load(whole), *(RUNNING | ODD)[name], "exit")
        text = yaml.safe_dump(changed, sort_keys=False)
    readers = [recipe_of_file] + [plain_recipe] * (name != "parts that are no groups")
    for read in readers:
        started = time.process_time()
        with pytest.raises(InputError) as caught:
            read(text, "theirs.pth")
        assert time.process_time() - started < 10
        assert "theirs.pth" in str(caught.value)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2_000


# --- every command and every file ---------------------------------------------------------------


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A folder that stays empty: code, imports and drawn data would leave something in it."""
    folder = tmp_path / "canary"
    folder.mkdir()
    place = tmp_path / "cwd"
    place.mkdir()
    (place / "trust_canary.py").write_text(f"open({str(folder / 'imported')!r}, 'w')\n")
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("TRUST_SECRET", "s3cr3t")
    yield folder
    assert list(folder.iterdir()) == []


def _texts(whole, canary):
    """Return the recipe's text with one attack of each kind; readers refuse others alike."""
    attacks = (RUNNING[name] for name in ("a target", "oc.create"))
    changed = [_set(yaml.safe_load(whole), *each, f"touch {canary}/ran") for each in attacks]
    return [yaml.safe_dump(each, sort_keys=False) for each in changed]


def _refused(command, capsys):
    assert command() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "s3cr3t" not in error
    return error


def _train_net(*words):
    try:
        train_net.main(train_net.parse([str(word) for word in words]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _commands(folder, image, weights, *config):
    """Every command that takes a recipe out of weights, or a config beside them."""
    given, out = ["--weights", weights, *config], folder / "out"
    words = {
        "predict": ["predict", image, *given, "--out", out],
        "val": ["val", *given, "--out", out],
        "serve": ["serve", *given, "--port", "0"],
        "strip": ["strip", weights, folder / "slim.safetensors", *config],
        "export": ["export", *given, "--out", folder / "x.onnx"],
    }
    return {
        name: lambda each=each: cli.main([str(word) for word in each])
        for name, each in words.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_command_runs_what_a_checkpoint_says(drawn_run, whole, canary, capsys, suffix):
    content = checkpoint.read(drawn_run.weights)
    theirs = canary.parent / f"theirs{suffix}"
    for text in _texts(whole, canary):
        note = {**content["vitdet"], "config": text}
        checkpoint.write(theirs, {"model": content["model"], "vitdet": note})
        for run in _commands(canary.parent, drawn_run.images[0], theirs).values():
            assert str(theirs) in _refused(run, capsys)
    assert sorted(path.name for path in canary.parent.iterdir()) == ["canary", "cwd", theirs.name]
    # what reads weights alone does not look at the recipe
    assert cli.main(["inspect", str(theirs), "--no-recipes"]) == 0
    _train_net(
        *("--eval-only", "--config-file", RECIPE, *_data(drawn_run, canary.parent / "out")),
        f"train.init_checkpoint={theirs}",
    )


def _data(drawn_run, out):
    root = drawn_run.annotations.parents[1]
    parts = [f"dataloader.{part}.dataset" for part in ("train", "test")]
    words = [f"{part}.{key}" for part in parts for key in (f"root={root}", "num_images=6")]
    words += ["dataloader.train.dataset.split=val", "dataloader.test.num_workers=0"]
    return [*words, f"train.output_dir={out}", "train.device=cpu"]


@pytest.mark.slow
def test_no_command_runs_what_a_yaml_or_a_runs_folder_says(drawn_run, whole, canary, capsys):
    folder, weights = canary.parent / "run", drawn_run.weights
    folder.mkdir()
    theirs = folder / "config.yaml"
    results = {"checkpoint": str(weights), "results": {"bbox": {"AP": 1.0}}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "coco_instances_results.json").write_text("[]")
    config = ("--config-file", theirs)
    source = ("--source-model", weights, "--output-model", canary.parent / "o.pth", *config)
    commands = _commands(canary.parent, drawn_run.images[0], weights, *config) | {
        "convert": lambda: converter.main([str(word) for word in source]),
        "report": lambda: cli.main(["report", str(folder)]),
        "train_net": lambda: _train_net(*config, "--eval-only"),
        "resume": lambda: _train_net(*config, "--resume"),
    }
    for text in _texts(whole, canary):
        theirs.write_text(text)
        for run in commands.values():
            assert str(theirs) in _refused(run, capsys)
    left = sorted(path.name for path in canary.parent.rglob("*"))
    ours = ["coco_instances_results.json", "config.yaml", "cwd", "results.json", "run"]
    assert left == ["canary", *ours, "trust_canary.py"]


class _Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.slow
def test_no_command_runs_the_code_in_a_pickle(drawn_run, canary, capsys):
    theirs, run = canary.parent / "theirs.pth", canary.parent / "run"
    content = checkpoint.read(drawn_run.weights)
    torch.save({**content, "extra": _Runs(f"touch {canary}/ran")}, theirs)
    run.mkdir()
    shutil.copy(theirs, run / "model_000000004.pth")
    (run / "last_checkpoint").write_text("model_000000004.pth")
    data, config = _data(drawn_run, canary.parent / "out"), ("--config-file", RECIPE)
    source = ("--source-model", theirs, "--output-model", canary.parent / "o.pth", *config)
    start = (*config, *data, f"train.init_checkpoint={theirs}")
    commands = _commands(canary.parent, drawn_run.images[0], theirs) | {
        "inspect": lambda: cli.main(["inspect", str(theirs), "--no-recipes"]),
        "convert": lambda: converter.main([str(word) for word in source]),
        "eval-only": lambda: _train_net(*start, "--eval-only"),
        "init_checkpoint": lambda: _train_net(*start),
    }
    for name, command in commands.items():
        assert "posix.system" in _refused(command, capsys), name
    # a run's own file: it is passed over, or it is an error
    _train_net(*config, "--resume", *data, f"train.output_dir={run}", "--eval-only")


# --- what it leaves ----------------------------------------------------------------------------


def test_nothing_of_the_training_and_no_output_folder_is_taken_out_of_a_file(whole):
    recipe = yaml.safe_load(whole)
    recipe["dataloader"]["evaluator"]["output_dir"] = "/somewhere"
    recipe["dataloader"]["train"]["mapper"]["augmentations"] = [RUN]  # their own: not looked at
    recipe["train"] |= {"output_dir": "/somewhere", "init_checkpoint": "weights/b.pth", "seed": 7}
    found = recipe_of_file(yaml.safe_dump(recipe), "a.pth")
    assert set(found) == {"model", "dataloader", "train"}
    assert set(found["dataloader"]) == {"test", "evaluator"}
    assert "output_dir" not in found["dataloader"]["evaluator"]
    assert found["train"]["seed"] == 7
    assert {"output_dir", "init_checkpoint", "ddp"} & set(found["train"]) == set()
    assert found["model"] == recipe["model"]


def test_an_author_who_is_trusted_may_use_anything(whole):
    part = {"_target_": "os.getcwd", "x": "${train.seed}"}
    recipe = _set(yaml.safe_load(whole), "model.anything", part)
    found = recipe_of_file(yaml.safe_dump(recipe), "a.pth", trust=True)
    assert found["model"]["anything"] == part
    assert plain_recipe(yaml.safe_dump(recipe), "a.yaml", trust=True) == recipe
    with pytest.raises(InputError, match="could not determine a constructor"):
        plain_recipe("!!python/name:os.system", "a.yaml", trust=True)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("model.roi_heads.box_head.fc_dims", [19_999] * 150, "far more elements than its weights"),
        ("model.backbone.net.depth", 256, "file has 4 blocks, model 256|far more modules"),
        ("model.backbone.net.embed_dim", 192, r"file has 96 channels \(embed_dim\), model 192"),
        ("model.backbone.net.num_heads", 0, r"do not work \(ZeroDivisionError"),
        ("model.pixel_mean", "abc", r"do not work|expected"),
        ("model.roi_heads", {"num_classes": 6}, "expected the model's 141, got .* unexpected"),
        ("model", {"_target_": "detectron2.layers.ShapeSpec"}, "arguments of ShapeSpec"),
        ("dataloader.test.mapper", {"_target_": "vitdet.data.augment.fixed_resize"}, "missing"),
    ],
)
def test_a_model_that_is_not_that_of_the_weights_takes_no_memory(
    drawn_run, whole, tmp_path, path, value, text
):
    content = checkpoint.read(drawn_run.weights)
    recipe = _set(yaml.safe_load(whole), path, value)
    note = {**content["vitdet"], "config": yaml.safe_dump(recipe)}
    checkpoint.write(tmp_path / "a.pth", {"model": content["model"], "vitdet": note})
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        load(tmp_path / "a.pth", device=torch.device("cpu"))
    assert re.search(text, str(caught.value)), caught.value
    assert str(caught.value).isprintable()
    assert time.process_time() - started < 20


def test_parts_that_fail_when_they_run_are_one_line(drawn_run, whole, tmp_path, capsys):
    content = checkpoint.read(drawn_run.weights)
    recipe = _set(yaml.safe_load(whole), "model.roi_heads.box_in_features", ["p9"])
    note = {**content["vitdet"], "config": yaml.safe_dump(recipe)}
    checkpoint.write(tmp_path / "a.pth", {"model": content["model"], "vitdet": note})
    image = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(image)
    words = [str(image), "--weights", str(tmp_path / "a.pth"), "--out", str(tmp_path / "out")]
    assert cli.main(["predict", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "its parts do not work (KeyError: 'p9')" in lines[0]
