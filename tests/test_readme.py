"""The README's and the docs' commands, files and keys exist."""

import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import train_net
from tests.recipes import NAMES
from vitdet import config
from vitdet.app import cli, train
from vitdet.app.options import parse_convert
from vitdet.config import build_model, load_config
from vitdet.engine import launch
from vitdet.published import ROWS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"train_net.py": train_net.parse, "converter.py": parse_convert}


def commands():
    """Return the train_net and converter commands of all pages, split into words."""
    texts = [page.read_text().replace("\\\n", " ") for page in PAGES]
    pattern = re.compile(r"^\s*python ((?:train_net|converter)\.py .*)$", re.MULTILINE)
    found = [shlex.split(each, comments=True) for text in texts for each in pattern.findall(text)]
    return [words for words in found if not any(w.isupper() or "..." in w for w in words)]


@pytest.mark.slow
def test_commands_parse_and_their_keys_exist():
    assert len(commands()) >= 8
    for words in commands():
        args = PARSERS[words[0]](words[1:])
        load_config(ROOT / args.config_file, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    files = r"\b((?:configs|vitdet|benchmarks|docs|tests)/[\w/]+\.(?:py|md))\b"
    for name in re.findall(files, text):
        row = name.removeprefix("configs/").removesuffix(".py")
        assert (ROOT / name).exists() or row in NAMES, name


def test_the_table_of_models_is_that_of_the_published_names():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+:\w+)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) >= 6
    for name, cells in rows:
        row = ROWS[name]
        assert cells == f"{row.box_ap} | {row.mask_ap} | {row.millions} | {row.licence}"
    assert f"lists {len(ROWS)} files" in text
    assert text.count("\n") <= 150


TINY = "configs/mini/mask_rcnn_eva02_shapes.py"


@pytest.fixture
def places(drawn_run, tmp_path, monkeypatch):
    """A folder with what the README's commands name, and {its word: ours}."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    run = shutil.copy(drawn_run.weights, tmp_path / "run/model_final.pth")
    for name in ("config.yaml", "../photo.jpg"):
        source = drawn_run.images[0] if "photo" in name else drawn_run.weights.parent / name
        shutil.copy(source, tmp_path / "run" / name)
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter.fourcc(*"MJPG"), 5.0, (128, 128))
    for path in drawn_run.images[:2]:
        writer.write(np.asarray(Image.open(path))[..., ::-1].copy())
    writer.release()
    images = str(drawn_run.images[0].parent)
    folder, recipe = str(drawn_run.annotations.parent), str(ROOT / TINY)
    theirs = ["detectron2:cascade_mask_rcnn_vitdet_b", "detectron2:mask_rcnn_vitdet_b"]
    theirs += ["dinov2:dinov2_vitb14_pretrain", "mae_pretrain_vit_base.pth", "FILE"]
    theirs += ["output/eva02_shapes/model_final.pth", "output/mine/model_final.pth"]
    theirs += ["model_final_61ccd1.pkl"]
    return {
        **dict.fromkeys(theirs, str(run)),
        **{"output/eva02_shapes": "run", "output/own": "run"},
        **{"clip.mp4": "clip.avi", "folder/": images, "my_photographs/": images, "FOLDER": folder},
        "datasets/shapes/shapes_v1_val_*/images/00000?.jpg": f"{images}/00000?.jpg",
        "configs/COCO/mask_rcnn_vitdet_b_100ep.py": recipe,
    }


@pytest.mark.slow
def test_every_command_of_the_readme_runs(places, monkeypatch, capsys):
    """With a small detector of ours in the place of others, no training loop and no server."""
    pytest.importorskip("onnxruntime")
    uvicorn = pytest.importorskip("uvicorn")
    started = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, **_: started.append("serve"))
    for module in (train, launch):
        monkeypatch.setattr(module, "launch", lambda *_, **__: started.append("training"))
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^    vitdet (.*)$", text, re.MULTILINE)
    assert len(lines) >= 13
    assert cli.main(["val", "--weights", "run", "--out", "run"]) == 0  # a report needs it
    for line in lines:
        words = [places.get(word, word) for word in shlex.split(line, comments=True)]
        if words[0] == "train":
            shutil.rmtree("output", ignore_errors=True)
        assert cli.main(words) in ((0, 1) if words[0] in ("data", "inspect") else (0,)), line
        capsys.readouterr()
    assert started.count("training") == 3
    assert started.count("serve") == 1


@pytest.mark.slow
def test_the_python_of_the_readme_runs(places, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for word in ("output/mine/model_final.pth",):
        first = first.replace(word, places[word])
    exec(first)
    assert Path("drawn.jpg").is_file()
    small = {"images": torch.zeros(1, 3, 320, 800), "build": build_model}
    monkeypatch.setattr(config, "build_model", lambda node: lambda images: {"p2": images})
    exec(second, small)
    assert load_config("configs/backbones/streampetr_eva02_l_800x320.py").model
