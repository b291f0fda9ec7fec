"""converter.py: what it writes, prints and answers, and that nothing is left behind."""

import datetime
import json
import pickle

import pytest
import safetensors.torch
import torch

import converter
from tests.convert.manifests import RECIPE, mae, pyramid, random, vit
from vitdet import checkpoint
from vitdet.config import build_model, load_config
from vitdet.convert import convert, detect
from vitdet.convert.names import shapes_of

CLASS = {"cls_token": "class token: a detector's backbone has none"}


@pytest.fixture
def folder(tmp_path):
    """A folder with a recipe, a file of MAE and one of ours, and an empty folder for outputs."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    torch.save({"model": mae(), "epoch": 800}, tmp_path / "mae.pth")
    about = {"format": 1, "source_format": "mae", "initialised": []}
    content = {"model": random(vit()), "vitdet": about, "optimizer": {}}
    torch.save(content, tmp_path / "ours.pth")
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def run(folder):
    """Return a function that runs converter.py in the folder, with the recipe or without."""

    def call(*words, source="mae.pth", output="vit.pth", recipe=1):
        files = ["--source-model", str(folder / source), "--output-model"]
        files.append(str(folder / "out" / output))
        files += ["--config-file", str(folder / "recipe.py")] if recipe else []
        return converter.main([*files, *words])

    return call


def outputs(folder):
    return sorted(path.name for path in (folder / "out").iterdir())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_converted_file_loads_into_the_recipes_model(folder, run, capsys, suffix):
    output, report = folder / "out" / f"vit{suffix}", folder / "out" / "report.json"
    assert run("--report", str(report), output=output) == 0
    assert outputs(folder) == sorted([output.name, "report.json"])

    model = build_model(load_config(folder / "recipe.py").model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = checkpoint.read(output)
    weights, initialised = checkpoint.weights_of(content, source=str(output))
    checkpoint.load_weights(model, weights, source=str(output), initialised=initialised)
    for name, value in model.state_dict().items():
        inside = name.startswith("net.")
        assert torch.equal(value, mae()[name[4:]] if inside else before[name])
        assert (name in initialised) == (not inside)
    about = content["vitdet"]
    expected = {"format": 1, "source_format": "mae", "initialised": initialised}
    assert about == expected | {"recipe_overrides": []}  # the recipe is as the file

    record = json.loads(report.read_text())
    assert record["used"]["blocks.1.mlp.fc2.bias"] == "net.blocks.1.mlp.fc2.bias"
    assert set(record["used"]) | set(record["dropped"]) == set(mae())
    assert record["initialised"] == initialised
    assert record["source_model"] == str(folder / "mae.pth")
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "used         27 keys" in printed.out
    assert f"wrote        {output}: 27 tensors" in printed.out


def test_options(folder, run):
    # underscores are dashes, overrides change the model
    assert run("--source_format=mae", "model.net.pretrain_img_size=96") == 0
    weights = checkpoint.read(folder / "out" / "vit.pth")["model"]
    assert weights["net.pos_embed"].shape == (1, 37, 16)
    average = {name: value + 1 for name, value in mae().items()}
    torch.save({"model": mae(), "ema_state": average}, folder / "two.pth")
    assert run("--weights", "ema_state", "--source-format=mae", source="two.pth") == 0
    weights = checkpoint.read(folder / "out" / "vit.pth")["model"]
    assert torch.equal(weights["net.pos_embed"], mae()["pos_embed"] + 1)


def test_other_containers(folder, run):
    safetensors.torch.save_file(mae(), folder / "model.safetensors")  # of others: weights alone
    assert run(source="model.safetensors") == 0
    assert checkpoint.read(folder / "out" / "vit.pth")["vitdet"]["source_format"] == "timm"
    weights = random(pyramid(vit()))
    arrays = {name: value.numpy() for name, value in weights.items()}
    data = pickle.dumps({"model": arrays, "__author__": "someone"})
    (folder / "zoo.pkl").write_bytes(data)
    assert run(source="zoo.pkl") == 0
    content = checkpoint.read(folder / "out" / "vit.pth")
    expected = {"format": 1, "source_format": "detectron2", "initialised": []}
    assert content["vitdet"] == expected | {"recipe_overrides": []}
    assert all(torch.equal(content["model"][name], value) for name, value in weights.items())
    torch.save({"model": mae(), "when": datetime.date(2022, 3, 30)}, folder / "dated.pth")
    assert run(source="dated.pth") == 2
    assert run("--trust", source="dated.pth") == 0


def test_what_is_left_over_gives_status_1_and_a_report(folder, run, capsys):
    torch.save({"model": mae() | {"blocks.0.extra": torch.ones(1)}}, folder / "odd.pth")
    report = folder / "out" / "report.json"
    assert run("--report", str(report), source="odd.pth") == 1
    assert outputs(folder) == ["report.json"]
    assert json.loads(report.read_text())["unaccounted"] == ["blocks.0.extra"]
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'odd.pth'} as mae: expected an account of every key")
    assert error.count("\n") == 1

    words = ("--report", str(report), "model.net.norm_eps=1e-3")
    assert run(*words) == 1
    text = "expected of the model: norm_eps=1e-06, not 0.001. Set that in"
    assert text in capsys.readouterr().err
    assert json.loads(report.read_text())["settings"] == {"norm_eps": [1e-6, 1e-3]}
    assert outputs(folder) == ["report.json"]
    assert run("--allow-inexact", *words) == 0
    expected = "inexact      norm_eps is 0.001, the weights were made with 1e-06"
    assert expected in capsys.readouterr().out


# --- other projects' names -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("target", "nested"), [("hf_vitdet", ""), ("detectron2", "model")])
def test_another_projects_file(suffix, target, nested, folder, run, capsys):
    report, output = folder / "out" / "report.json", folder / "out" / f"other{suffix}"
    words = ["--target-format", target, "--report", str(report)]
    assert run(*words, source="ours.pth", output=output, recipe=None) == 0
    content, weights = checkpoint.read(output), random(vit())
    assert "vitdet" not in content
    assert ("model" in content) == (bool(nested) and suffix == ".pth")
    assert detect(content) == target
    back, _ = convert(content, shapes_of(weights))
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    record = json.loads(report.read_text())
    assert (record["source_format"], record["target_format"]) == ("vitdet", target)
    assert set(record["used"]) == set(weights)
    assert "left out beside the weights: optimizer" in record["notes"]
    assert f"format       vitdet (under 'model') to {target}" in capsys.readouterr().out


def test_both_steps_are_in_the_account(folder, run):
    report = folder / "out" / "report.json"
    words = ["--target-format", "sam", "--backbone-only", "--report", str(report)]
    words.append("model.net.pretrain_img_size=96")
    assert run(*words) == 1
    assert outputs(folder) == ["report.json"]
    lost = {"pos_embed": "class row, which no ViTDet backbone reads"}
    assert json.loads(report.read_text())["inexact"] == lost
    assert run(*words, "--allow-inexact") == 0
    record = json.loads(report.read_text())
    assert record["resized"] == {"pos_embed": [[1, 17, 16], [1, 6, 6, 16]]}
    assert CLASS.items() <= record["dropped"].items()
    assert record["used"]["blocks.1.mlp.fc1.bias"] == "blocks.1.mlp.lin1.bias"
    content = checkpoint.read(folder / "out" / "vit.pth")
    assert detect(content) == "sam"
    assert content["pos_embed"].shape == (1, 6, 6, 16)
    # without a recipe, by the rules of the source; timm has a place for the token
    for target, dropped in (("hf_vitdet", True), ("timm", False)):
        words = ["--target-format", target, "--report", str(report)]
        assert run(*words, recipe=None) == 0
        assert ("cls_token" in json.loads(report.read_text())["dropped"]) == dropped
    assert checkpoint.read(folder / "out" / "vit.pth")["cls_token"].shape == (1, 1, 16)


# --- wrong commands ------------------------------------------------------------------------------

WRONG = {
    "expected a file, got nothing there": "--source-model absent.pth",
    "expected a file of its own, got an input": "--output-model mae.pth",
    "expected a file of its own, got an input. ": "--output-model out/../mae.pth",
    "mkdir -p": "--output-model absent/vit.pth",
    "expected .pth or .safetensors, got .pkl": "--output-model vit.pkl",
    "output out: expected ": "--output-model out",
    "got an input. Choose": "--report mae.pth",
    "got an input. Choose another name": "--report out/vit.pth",
    "Did you mean model.net.embed_dim?": "model.net.embed_dims=32",
    "expected a recipe, got none": "-",
    "--fold-layer-scale: expected --config-file beside it": "- --target-format sam "
    "--fold-layer-scale",
    "Did you mean 'mae'?": "--source-format maee",
    "fitted to one. Add --config-file": "- --target-format sam --source-format timm",
    "got 'ema', the file has model, epoch": "--weights ema",
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_commands(message, folder, run, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = (folder / "mae.pth").read_bytes()
    words = WRONG[message].split()
    bare = words[0] == "-"
    assert run(*words[bare:], recipe=not bare) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert (folder / "mae.pth").read_bytes() == before
    assert outputs(folder) == []
