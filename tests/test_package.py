"""What a wheel holds, and what is said where a package is missing."""

from pathlib import Path

import pytest
import torch

import vitdet
from vitdet import weights
from vitdet.app import cli, setup
from vitdet.config import CONFIGS, load_config
from vitdet.utils.checks import InputError
from vitdet.utils.precision import pick_device

ROOT = Path(__file__).resolve().parents[1]


def test_every_folder_with_code_and_every_recipe_is_in_the_wheel():
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = {f"vitdet.{each}" for each in _folders("configs")} | _folders("vitdet")
    assert set(named) == inside


def _folders(name):
    found = (each.parent.relative_to(ROOT) for each in (ROOT / name).rglob("*.py"))
    return {".".join(each.parts) for each in found}


def test_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()  # one of the user's own
    for name in ("configs/COCO/mask_rcnn_vitdet_b_100ep.py", "configs/own/mask_rcnn_vitdet_s.py"):
        assert load_config(name) == load_config(CONFIGS.parent / name)
    with pytest.raises(InputError, match=r"got .*configs/own/absent\.py"):
        load_config("configs/own/absent.py")


def test_a_missing_package_is_one_line_that_names_the_command(monkeypatch, capsys):
    def run(args):
        raise ModuleNotFoundError("No module named 'cv2.dnn'", name="cv2.dnn")

    monkeypatch.setattr(setup, "run", run)
    assert cli.main(["setup"]) == 2
    text = "vitdet needs cv2, which is not installed: run `vitdet setup`"
    assert capsys.readouterr().err.startswith(f"error: {text}")
    monkeypatch.setattr(vitdet.importlib, "import_module", run)
    with pytest.raises(ImportError, match="needs cv2, which is not installed"):
        _ = vitdet.Predictor


def test_setup_brings_what_is_missing_and_nothing_else(monkeypatch):
    calls = []
    monkeypatch.setattr(setup, "_pip", lambda *words: calls.append(words))
    monkeypatch.setattr(setup, "_check_operators", lambda: None)
    assert cli.main(["setup"]) == 0
    assert calls == []
    monkeypatch.setattr(setup, "_missing", lambda name: name in ("cv2", "detectron2"))
    assert cli.main(["setup"]) == 0
    assert calls[0][-1] == "opencv-python-headless"
    assert calls[1][:2] == ("--no-deps", "--require-hashes")


def test_the_version_is_said(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"vitdet {vitdet.__version__}\n"
    assert {"Predictor", "build_model", "load_config"} <= set(dir(vitdet))


def test_a_run_stands_for_its_best_weights_and_a_number_for_a_gpu(tmp_path):
    for name, value in (("model_0001.pth", 1), ("model_final.pth", 2), ("model_best.pth", 3)):
        torch.save({"model": {"a": torch.tensor([value])}}, tmp_path / name)
    assert weights.read(tmp_path).content["model"]["a"].item() == 3
    (tmp_path / "model_best.pth").unlink()
    assert weights.read(tmp_path).content["model"]["a"].item() == 2
    with pytest.raises(InputError, match="device cuda:99"):
        pick_device("99")
