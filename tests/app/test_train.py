"""`vitdet train`: what it chooses, what it says, and a training."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import train_net
from vitdet import checkpoint
from vitdet.app import cli, follow, train
from vitdet.config import build_model, change, load_config
from vitdet.engine.dry_run import DoesNotFitError
from vitdet.utils.files import RESULT_MARKER

Capture = pytest.CaptureFixture[str]
BOX, POLYGON = "{} 0.5 0.5 0.2 0.2\n", "{} 0.1 0.1 0.5 0.1 0.5 0.5\n"


@cache
def loaded(recipe, overrides):
    return load_config(recipe, overrides)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Work in another folder: recipes are found from any, and output/own is not ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_config", lambda recipe, words: loaded(recipe, tuple(words)))


@pytest.fixture
def data(tmp_path):
    """Twelve images with polygons of two classes, without a validation part."""
    folder = tmp_path / "my data"
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (40, 30), (i, 9, 9)).save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text(POLYGON.format(i % 2))
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def _printed(capsys, data, *words):
    """What it prints, without the training itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "launch", lambda *_, **__: None)
        assert cli.main(["train", "--data", str(data), *words]) == 0
    return capsys.readouterr().out


def _args(text):
    """The command that was printed."""
    line = next(line for line in text.splitlines() if line.startswith("the same"))
    return train_net.parse(shlex.split(line)[4:])


def _recipe(text):
    return loaded(Path(_args(text).config_file), tuple(_args(text).overrides))


def _error(capsys, data, *words):
    assert cli.main(["train", "--data", str(data), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("size", "masks", "width", "pixels", "lr"),
    [
        ("tiny", True, 192, 256, 5e-4),
        ("tiny", False, 192, 256, 5e-4),
        ("light", True, 384, 320, 4e-4),
        ("small", False, 384, 512, 1e-4 * 8 / 16),
        ("base", True, 768, 1024, 2.5e-5 * 8 / 16),
        ("large", False, 1024, 1024, 2.5e-5 * 8 / 16),
    ],
)
def test_a_size_is_a_recipe(capsys, data, size, masks, width, pixels, lr):
    if not masks:
        for path in (data / "labels").iterdir():
            path.write_text(BOX.format(int(path.stem) % 2))
    cfg = _recipe(text := _printed(capsys, data, "--size", size, "--epochs", "3"))
    assert f"({size}): {'boxes and masks' if masks else 'boxes'}\n" in text
    assert cfg.model.backbone.net.embed_dim == width
    assert cfg.model.backbone.square_pad == pixels
    assert ("mask_head" in cfg.model.roi_heads) is cfg.dataloader.train.mapper.use_masks is masks
    # 10 images are in the training part: the recipe's batch of 16 is halved, and lr with it
    batch = 4 if size == "light" else 8
    assert cfg.dataloader.train.total_batch_size == cfg.train.reference_batch == batch
    assert cfg.optimizer.lr == pytest.approx(lr)
    assert f"length       3 x 10 = 30 images, {batch} a step, learning rate {lr:g}" in text


def test_options_go_into_the_command(capsys, data, tmp_path):
    out = tmp_path / "a run"
    text = _printed(
        capsys, data, "--out", str(out), "--batch", "4", "--seed", "7", "--num-gpus", "2",
        "--val-fraction", "0.5", "--resume", "train.log_every=3", "optimizer.lr=0.25",
    )  # fmt: skip
    assert "no validation part: 6 of 12 images put aside for it" in text
    assert (_args(text).num_gpus, _args(text).resume) == (2, True)
    cfg = _recipe(text)
    assert cfg.train.output_dir == str(out)
    assert (cfg.train.seed, cfg.train.log_every, cfg.train.epochs) == (7, 3, 50)
    assert (cfg.dataloader.train.total_batch_size, cfg.optimizer.lr) == (4, 0.25)
    assert cfg.dataloader.train.dataset.json == str(out / "data" / "train.json")
    assert cfg.dataloader.test.dataset.json == str(out / "data" / "val.json")
    assert cfg.dataloader.test.dataset.images == str(data)
    text = _printed(capsys, data, "train.num_images=123")
    assert "length       123 images, 8 a step" in text
    assert _recipe(text).train.epochs is None


def test_a_folder_with_a_run_is_refused_before_its_data_are_written(capsys, data, tmp_path):
    out = tmp_path / "run"
    _printed(capsys, data, "--out", str(out))
    before = {path: path.read_bytes() for path in (out / "data").iterdir()}
    (out / "last_checkpoint").write_text("model_000000099.pth\n")
    (data / "labels/1.txt").unlink()
    assert "expected a folder without a run" in _error(capsys, data, "--out", str(out))
    assert {path: path.read_bytes() for path in (out / "data").iterdir()} == before


def test_paths_that_yaml_would_read_as_something_else():
    assert follow.setting("a", "/plain/path-1.x") == "a=/plain/path-1.x"
    texts = ("12", "1e4", "/a: it's", "/x y/#z", '/"x', "/[a]", "/2026-01-02", "/ü\\")
    settings = [follow.setting("train.output_dir", text) for text in texts]
    cfg = OmegaConf.create({"train": {"output_dir": ""}})
    assert [change(cfg, [each]).train.output_dir for each in settings] == list(texts)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--epochs 0", "--epochs: expected more than 0, got 0.0"),
        ("--epochs 2 train.num_images=9", "got --epochs 2 and train.num_images. Leave one"),
        ("--batch 2 dataloader.train.total_batch_size=4", "expected one word, got --batch 2 and"),
        ("--batch 3 --num-gpus 2", "--batch: expected a multiple of 2 processes"),
        ("--val-fraction 2", "--val-fraction: expected a number between 0 and 1, got 2.0"),
        ("--format coco", "expected json files with images, annotations and categories"),
        ("train.lr=1", "override 'train.lr': expected a key of train"),
        ("--weights none.pth", "none.pth"),
        ("dataloader.train.mapper.preset=cell", "got 'cell'. Did you mean cells?"),
    ],
)
def test_wrong_options_are_one_line(capsys, data, words, text):
    assert text in _error(capsys, data, *words.split())


def test_an_interrupt_while_data_are_prepared_says_how_to_go_on(data, tmp_path, monkeypatch):
    def told(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitdet.app.train.prepare_data", told)
    words = ["train", "--data", str(data), "--out", str(tmp_path / "out")]
    args = cli.parse(words)
    with pytest.raises(KeyboardInterrupt, match=r"before the first step: .* command again"):
        train.run(args)
    assert not (tmp_path / "out").exists()


def test_a_preset_is_a_value_of_the_recipe(capsys, data):
    text = _printed(capsys, data, "--augment", "aerial")
    assert _recipe(text).dataloader.train.mapper.preset == "aerial"
    # of a run that is resumed it is the one that it began with
    run = data.parent / "run"
    _printed(capsys, data, "--out", str(run))
    began = "dataloader: {train: {mapper: {preset: light}}}\ntrain: {init_checkpoint: a.pth}"
    (run / "config.yaml").write_text(began)
    text = _printed(capsys, data, "--out", str(run), "--resume")
    assert _recipe(text).dataloader.train.mapper.preset == "light"
    assert "\nstart        a.pth\n" in text


def test_under_torchrun_it_says_what_to_do(capsys, data, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "`vitdet recipe` command, which torchrun --no-python can run" in _error(capsys, data)


# --- weights to start from ------------------------------------------------------------------------


def _weights(path, class_names):
    """A checkpoint of the tiny recipe: of ours where it has names, else as converted."""
    cfg = load_config(train.recipe_of("tiny", masks=True))
    cfg.model.roi_heads.num_classes = len(class_names or ["cat", "dog"])
    about = {"format": 1} | ({"class_names": class_names} if class_names else {})
    torch.manual_seed(0)
    checkpoint.write(path, {"model": build_model(cfg.model).state_dict(), "vitdet": about})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("names", [["cat", "dog"], None], ids=["same classes", "converted"])
def test_weights_that_fit_are_taken_as_they_are(capsys, data, tmp_path, names):
    weights = _weights(tmp_path / "start.pth", names)
    text = _printed(capsys, data, "--weights", str(weights))
    assert _recipe(text).train.init_checkpoint == str(weights)
    assert f"start        {weights}" in text
    if names is None:  # of a file without a note of ours the backbone is taken
        state = checkpoint.read(weights)["model"]
        torch.save({"model": state}, tmp_path / "theirs.pth")
        text = _printed(capsys, data, "--weights", str(tmp_path / "theirs.pth"))
        start = checkpoint.read(_recipe(text).train.init_checkpoint)
        assert {name.split(".")[0] for name in start["model"]} == {"backbone"}
        key = "backbone.net.blocks.0.attn.q_proj.weight"
        assert torch.equal(start["model"][key], state[key])
        assert "roi_heads.box_predictor.cls_score.weight" in start["vitdet"]["initialised"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [["bird", "dog", "cow"], ["circle", "star", "ring"]])
def test_a_detector_of_other_classes_gives_all_but_the_rows_of_those_not_in_common(
    capsys, data, tmp_path, names
):
    weights = _weights(tmp_path / "theirs.pth", names)
    text = _printed(capsys, data, "--weights", str(weights), "--out", str(tmp_path / "run"))
    start = Path(_recipe(text).train.init_checkpoint)
    assert start == tmp_path / "run" / "start.pth"
    content = checkpoint.read(start)
    ours, theirs = content["model"], checkpoint.read(weights)["model"]
    rows = r"roi_heads\.(box_predictor\.(cls_score|bbox_pred)|mask_head\.predictor)\."
    assert all(torch.equal(ours[x], theirs[x]) for x in theirs if not re.match(rows, x))
    key = "roi_heads.box_predictor.cls_score.weight"
    assert len(ours[key]) == 3
    assert torch.equal(ours[key][-1], theirs[key][-1])  # background
    assert content["vitdet"]["class_names"] == ["cat", "dog"]
    if "dog" in names:
        assert torch.equal(ours[key][1], theirs[key][1])
    else:
        assert "classes      2 start anew (cat, dog)" in text
        assert f"{key}[0-1]" in content["vitdet"]["initialised"]


@pytest.mark.slow
def test_weights_that_do_not_fit_are_a_line_that_says_so(capsys, data, tmp_path):
    weights = _weights(tmp_path / "shapes.pth", ["circle"])
    error = _error(capsys, data, "--size", "small", "--weights", str(weights))
    where = f"error: --weights {weights}: it does not fit mask_rcnn_vitdet_s.py (--size small): "
    assert error.startswith(where)
    assert "file has 192 channels (embed_dim), model 384. Use the recipe of its size." in error
    weights = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(2, 3)}, weights)
    error = _error(capsys, data, "--weights", str(weights))
    assert f"--weights {weights}: it does not fit" in error
    # and no option is named as if this command had it
    assert ("--source-format" in error) == (
        "has these options, and --weights OUT.pth takes" in error
    )


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_keeps_nothing(capsys, data, tmp_path):
    """Real steps on the data; the command names the places where a training would write."""
    weights = _weights(tmp_path / "animals.pth", ["bird", "dog", "cow"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    small = ["dataloader.train.num_workers=0", "dataloader.train.mapper.augmentations.size=64"]
    words = ["--weights", str(weights), "--batch", "2", "--dry-run", *small]
    assert cli.main(["train", "--data", str(data), *words]) == 0
    text = capsys.readouterr().out
    assert "train        10 images, 10 objects\ntest         2 images, 2 objects\n" in text
    assert "step         2 images in 1 process, " in text
    assert "length       250 steps, about 0 h " in text
    assert text.endswith("dry run      done; nothing was kept\n")
    cfg = _recipe(text)
    assert cfg.train.init_checkpoint == "output/own/start.pth"
    assert cfg.dataloader.train.dataset.json == "output/own/data/train.json"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_on_a_gpu_the_batch_is_halved_until_a_step_fits(capsys, data, monkeypatch):
    tried = []

    def steps(_, overrides, resume, dry_run):
        assert dry_run
        words = dict(each.split("=", 1) for each in overrides)
        tried.append(int(words["dataloader.train.total_batch_size"]))
        if tried[-1] > 1:
            raise DoesNotFitError("memory: no")

    monkeypatch.setattr(train, "_train", steps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = _recipe(text := _printed(capsys, data, "--size", "tiny", "--num-gpus", "2"))
    assert tried == [4, 2, 1]
    assert text.count("batch        memory: no") == 2
    assert cfg.dataloader.train.total_batch_size == cfg.train.reference_batch == 2
    assert cfg.optimizer.lr == pytest.approx(5e-4 / 4)
    tried.clear()
    _printed(capsys, data, "--size", "tiny", "--batch", "4")
    assert tried == []


@pytest.mark.slow
def test_one_command_trains(capsys, data, tmp_path):
    out = tmp_path / "run"
    words = ["--data", str(data), "--out", str(out), "--batch", "4", "--epochs", "1"]
    small = ["train.precision=fp32", "dataloader.train.num_workers=0", "train.device=cpu"]
    assert cli.main(["train", *words, *small, "--size", "tiny"]) == 0
    assert set(json.loads((out / "results.json").read_text())["results"]) == {"bbox", "segm"}
    found = checkpoint.read(out / "model_final.pth")["vitdet"]["class_names"]
    assert list(found) == ["cat", "dog"]
    assert not list(data.rglob(RESULT_MARKER))
    assert "recipe       configs/own/" in capsys.readouterr().out
