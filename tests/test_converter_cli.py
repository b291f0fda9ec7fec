"""converter.py: what it writes, prints and answers, and that nothing is left behind."""

from __future__ import annotations

import datetime
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import converter
from vitdet import checkpoint
from vitdet.backbones.vit import ViT
from vitdet.config import build_model, load_config
from vitdet.pyramid import SimpleFeaturePyramid

RECIPE = """
from detectron2.config import LazyCall as L
from vitdet.backbones.vit import ViT
from vitdet.pyramid import SimpleFeaturePyramid

net = L(ViT)(img_size=64, embed_dim=16, depth=2, num_heads=2, pretrain_img_size=64)
model = L(SimpleFeaturePyramid)(net=net, out_channels=8, scale_factors=(1.0,))
"""
Run = Callable[..., int]


def net(width: int = 16) -> ViT:
    return ViT(img_size=64, embed_dim=width, depth=2, num_heads=2, pretrain_img_size=64)


def mae() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = {name: torch.randn_like(value) for name, value in net().state_dict().items()}
    tokens = {"cls_token": torch.randn(1, 1, 16), "norm.weight": torch.ones(16)}
    return weights | tokens | {"norm.bias": torch.zeros(16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a recipe, a source file, and an empty folder for outputs."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    torch.save({"model": mae(), "epoch": 800}, tmp_path / "mae.pth")
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    """Return a function that runs converter.py on the folder; keywords replace its options."""

    def call(*words: str, **paths: Path) -> int:
        source = paths.get("source", folder / "mae.pth")
        output = paths.get("output", folder / "out" / "vit.pth")
        options = ["--source-model", str(source), "--output-model", str(output)]
        return converter.main([*options, "--config-file", str(folder / "recipe.py"), *words])

    return call


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


def written(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(folder / "out" / "vit.pth")["model"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_converted_file_loads_into_the_recipes_model(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
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
    assert about == {"format": 1, "source_format": "mae", "initialised": initialised}

    record = json.loads(report.read_text())
    assert record["source_format"] == "mae"
    assert record["used"]["blocks.1.mlp.fc2.bias"] == "net.blocks.1.mlp.fc2.bias"
    assert set(record["used"]) | set(record["dropped"]) == set(mae())
    assert record["initialised"] == initialised
    assert (record["unaccounted"], record["missing"], record["resized"]) == ([], [], {})
    assert record["source_model"] == str(folder / "mae.pth")
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "used         27 keys" in printed.out
    assert "dropped      1: class token" in printed.out
    assert f"wrote        {output}: 27 tensors" in printed.out


def test_overrides_change_the_target_and_underscores_are_dashes(folder: Path, run: Run) -> None:
    assert run("--source_format=mae", "model.net.pretrain_img_size=96") == 0
    assert written(folder)["net.pos_embed"].shape == (1, 37, 16)


def test_weights_among_several(folder: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path, average = folder / "two.pth", {name: value + 1 for name, value in mae().items()}
    torch.save({"model": mae(), "ema_state": average}, path)
    assert run("--weights", "ema_state", "--source-format=mae", source=path) == 0
    assert torch.equal(written(folder)["net.pos_embed"], mae()["pos_embed"] + 1)
    assert run("--weights", "ema", source=path) == 2
    assert "got 'ema', the file has model, ema_state" in capsys.readouterr().err


def test_a_recipe_that_computes_something_else(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    report = folder / "out" / "report.json"
    words = ("--report", str(report), "model.net.norm_eps=1e-3")
    assert run(*words) == 1
    assert outputs(folder) == ["report.json"]
    text = "expected of the model: norm_eps=1e-06, not 0.001. Set that in"
    assert text in capsys.readouterr().err
    assert json.loads(report.read_text())["settings"] == {"norm_eps": [1e-6, 1e-3]}
    assert run("--allow-inexact", *words) == 0
    assert outputs(folder) == ["report.json", "vit.pth"]
    expected = "inexact      norm_eps is 0.001, the weights were made with 1e-06"
    assert expected in capsys.readouterr().out


def test_other_containers(folder: Path, run: Run) -> None:
    path = folder / "model.safetensors"  # of others: the weights alone
    safetensors.torch.save_file(mae(), path)
    report = folder / "out" / "report.json"
    assert run("--report", str(report), source=path) == 0
    record = json.loads(report.read_text())
    assert (record["source_format"], record["nested_under"]) == ("timm", "")

    model = SimpleFeaturePyramid(net(), out_channels=8, scale_factors=(1.0,))
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    path = folder / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    assert run(source=path) == 0
    content = checkpoint.read(folder / "out" / "vit.pth")
    assert content["vitdet"] == {"format": 1, "source_format": "detectron2", "initialised": []}
    for name, value in model.state_dict().items():
        assert torch.equal(content["model"][name], value)

    path = folder / "dated.pth"
    torch.save({"model": mae(), "when": datetime.date(2022, 3, 30)}, path)
    assert run(source=path) == 2
    assert run("--trust", source=path) == 0


def test_unaccounted_keys_give_status_1_and_a_report(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": mae() | {"blocks.0.extra": torch.ones(1)}}, folder / "odd.pth")
    report = folder / "out" / "report.json"
    assert run("--report", str(report), source=folder / "odd.pth") == 1
    assert outputs(folder) == ["report.json"]
    assert json.loads(report.read_text())["unaccounted"] == ["blocks.0.extra"]
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'odd.pth'} as mae: expected an account of every key")
    assert error.count("\n") == 1


def _flipped(data: bytes) -> bytes:
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 4
    return bytes(damaged)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("short.pth", lambda data: data[:-2000], "it cannot be read"),
        ("flipped.pth", _flipped, "checksum of its part"),
        ("empty.pth", lambda _: b"", "it cannot be read (it is empty)"),
        ("evil.pkl", lambda _: b"cposix\nsystem\n(S'touch ran'\ntR.", "the class posix.system"),
        ("wide.pth", None, "file has 32 channels (embed_dim), model 16."),
        ("absent.pth", None, "expected a file, got nothing there"),
    ],
)
def test_wrong_sources_leave_nothing_behind(
    folder: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[bytes], bytes] | None,
    message: str,
) -> None:
    if damage is not None:
        (folder / name).write_bytes(damage((folder / "mae.pth").read_bytes()))
    elif name == "wide.pth":
        wide = net(32).state_dict() | {"cls_token": torch.ones(1, 1, 32)}
        torch.save({"model": wide}, folder / name)
    assert run("--report", str(folder / "out" / "report.json"), source=folder / name) == 2
    assert outputs(folder) == []
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_wrong_outputs_and_overrides(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "mae.pth").read_bytes()
    wrong = {
        folder / "mae.pth": "expected a file of its own, got an input",
        folder / "out" / ".." / "mae.pth": "expected a file of its own, got an input",
        folder / "absent" / "vit.pth": "mkdir -p",
        folder / "out" / "vit.pkl": "expected .pth or .safetensors, got .pkl",
        folder / "out": "expected .pth or .safetensors, got no suffix",
    }
    for output, message in wrong.items():
        assert run(output=output) == 2
        assert message in capsys.readouterr().err
    assert run("--report", str(folder / "mae.pth")) == 2
    assert run("--report", str(folder / "out" / "vit.pth")) == 2
    capsys.readouterr()
    assert run("model.net.embed_dims=32") == 2
    assert "Did you mean model.net.embed_dim?" in capsys.readouterr().err
    assert (folder / "mae.pth").read_bytes() == before
    assert outputs(folder) == []
