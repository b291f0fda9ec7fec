"""`vitdet train`: what it chooses, what it says, and a training from each format of data."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import train_net
from vitdet import checkpoint
from vitdet.app import cli, train
from vitdet.config import build_model, load_config
from vitdet.engine.dry_run import DoesNotFitError
from vitdet.utils.files import RESULT_MARKER

ROOT = Path(__file__).resolve().parents[2]


def _formats() -> ModuleType:
    """Load the writers of other formats, which lie beside the tests of the readers."""
    path = ROOT / "tests" / "data" / "other_formats.py"
    spec = importlib.util.spec_from_file_location("other_formats", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


formats = _formats()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in another folder: recipes are found from any, and output/own is not ours."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve images with polygons of two classes, without a validation part."""
    folder = tmp_path / "my data"
    for i in range(12):
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (i, 9, 9)).save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text(f"{i % 2} 0.1 0.1 0.5 0.1 0.5 0.5\n")
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def _told(capsys: pytest.CaptureFixture[str], data: Path, *words: str) -> str:
    """What it prints, without the training itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "launch", lambda *_, **__: None)
        assert cli.main(["train", "--data", str(data), *words]) == 0
    return capsys.readouterr().out


def _command(text: str) -> list[str]:
    """The words of the train_net.py command that was printed."""
    line = next(line for line in text.splitlines() if line.startswith("the same"))
    return shlex.split(line)[2:]


def _recipe(text: str) -> Any:
    args = train_net.parse(_command(text)[2:])
    return load_config(args.config_file, args.overrides)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    ("size", "width", "pixels", "lr"),
    [
        ("tiny", 192, 256, 5e-4),
        ("small", 384, 512, 1e-4 * 8 / 16),
        ("base", 768, 1024, 2.5e-5 * 8 / 16),
        ("large", 1024, 1024, 2.5e-5 * 8 / 16),
    ],
)
def test_a_size_is_a_recipe(
    capsys: pytest.CaptureFixture[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    masks: bool,
    size: str,
    width: int,
    pixels: int,
    lr: float,
) -> None:
    if not masks:
        for path in (data / "labels").iterdir():
            path.write_text(f"{int(path.stem) % 2} 0.5 0.5 0.2 0.2\n")
    cfg = _recipe(text := _told(capsys, data, "--size", size, "--epochs", "3"))
    assert f"({size}): {'boxes and masks' if masks else 'boxes'}\n" in text
    assert cfg.model.backbone.net.embed_dim == width
    assert cfg.model.backbone.square_pad == pixels
    assert ("mask_head" in cfg.model.roi_heads) is masks
    assert cfg.dataloader.train.mapper.use_masks is masks
    # 10 images are in the training part: the recipe's batch of 16 is halved, and lr with it
    assert cfg.dataloader.train.total_batch_size == cfg.train.reference_batch == 8
    assert cfg.optimizer.lr == pytest.approx(lr)
    assert cfg.train.epochs == 3
    assert f"length       3 x 10 = 30 images, 8 a step, learning rate {lr:g}" in text
    assert cfg.train.precision == "auto"
    build_model(cfg.model, device="meta")
    assert not (tmp_path / "output/own/model_final.pth").exists()


def test_options_go_into_the_command(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a run"
    text = _told(
        capsys, data, "--out", str(out), "--batch", "4", "--seed", "7", "--num-gpus", "2",
        "--val-fraction", "0.5", "--resume", "train.log_every=3", "optimizer.lr=0.25",
    )  # fmt: skip
    assert "no validation part: 6 of 12 images put aside for it" in text
    words = _command(text)
    args = train_net.parse(words[2:])
    assert (args.num_gpus, args.resume) == (2, True)
    cfg = load_config(args.config_file, args.overrides)
    assert cfg.train.output_dir == str(out)
    assert (cfg.train.seed, cfg.train.log_every, cfg.train.epochs) == (7, 3, 50)
    assert (cfg.dataloader.train.total_batch_size, cfg.optimizer.lr) == (4, 0.25)
    assert cfg.dataloader.train.dataset.json == str(out / "data" / "train.json")
    assert cfg.dataloader.test.dataset.json == str(out / "data" / "val.json")
    assert cfg.dataloader.test.dataset.images == str(data)


def test_a_folder_with_a_run_is_refused_before_its_data_are_written(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    _told(capsys, data, "--out", str(out))
    before = {path: path.read_bytes() for path in (out / "data").iterdir()}
    (out / "last_checkpoint").write_text("model_000000099.pth\n")
    (data / "labels/1.txt").unlink()
    assert cli.main(["train", "--data", str(data), "--out", str(out)]) == 2
    assert "expected a folder without a run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (out / "data").iterdir()} == before


def test_a_length_in_images_is_kept(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    text = _told(capsys, data, "train.num_images=123")
    assert "length       123 images, 8 a step" in text
    assert _recipe(text).train.epochs is None


def test_paths_that_yaml_would_read_as_something_else() -> None:
    assert train._setting("train.output_dir", "plain/path") == "train.output_dir=plain/path"
    assert train._setting("train.output_dir", "a: it's") == "train.output_dir='a: it''s'"
    recipe = train.recipe_of("tiny", masks=True)
    for path in (
        "12",
        "1e4",
        "null",
        "yes",
        "a: it's",
        "/x y/#z",
        "x #z",
        "[a]",
        "[a",
        "2026-01-02",
    ):
        cfg = load_config(recipe, [train._setting("train.output_dir", path)])
        assert cfg.train.output_dir == path
    for path in ("/a: it's", "/x y/#z", "/x #z", "/[a]", "/ü"):  # always absolute
        cfg = load_config(recipe, [train._setting("dataloader.train.dataset.json", path)])
        assert cfg.dataloader.train.dataset.json == path


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--epochs", "0"], "--epochs: expected more than 0, got 0.0"),
        (
            ["--epochs", "2", "train.num_images=9"],
            "expected one word, got --epochs 2 and train.num_images. Leave one",
        ),
        (["--batch", "-1"], "--batch: expected more than 0, got -1"),
        (["--batch", "3", "--num-gpus", "2"], "--batch: expected a multiple of 2 processes"),
        (["--num-gpus", "0"], "--num-gpus: expected more than 0, got 0"),
        (["--val-fraction", "2"], "--val-fraction: expected a number between 0 and 1, got 2.0"),
        (["--format", "coco"], "expected json files with images, annotations and categories"),
        (["train.lr=1"], "override 'train.lr': expected a key of train"),
        (["--weights", "none.pth"], "none.pth"),
    ],
)
def test_wrong_options_are_one_line(
    capsys: pytest.CaptureFixture[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: str,
) -> None:
    assert cli.main(["train", "--data", str(data), *words]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_under_torchrun_it_names_the_way(
    capsys: pytest.CaptureFixture[str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["train", "--data", str(data)]) == 2
    assert "it prints the train_net.py command that torchrun can run" in capsys.readouterr().err


def test_without_the_recipes_it_says_how_to_get_them(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CONFIGS", tmp_path / "site-packages/configs/own")
    assert cli.main(["train", "--data", str(data)]) == 2
    assert "install vitdet from it by `pip install --editable .`" in capsys.readouterr().err


# --- weights to start from ------------------------------------------------------------------------


def _weights(path: Path, class_names: list[str] | None) -> Path:
    """A checkpoint of the tiny recipe: of ours where it has names, else as converted."""
    cfg = load_config(train.recipe_of("tiny", masks=True))
    cfg.model.roi_heads.num_classes = len(class_names or ["cat", "dog"])
    about: dict[str, Any] = {"format": 1}
    if class_names:
        about["class_names"] = class_names
    torch.manual_seed(0)
    checkpoint.write(path, {"model": build_model(cfg.model).state_dict(), "vitdet": about})
    return path


@pytest.mark.parametrize("names", [["cat", "dog"], None], ids=["same classes", "converted"])
def test_weights_that_fit_are_taken_as_they_are(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, names: list[str] | None
) -> None:
    weights = _weights(tmp_path / "start.pth", names)
    text = _told(capsys, data, "--weights", str(weights), "--out", str(tmp_path / "run"))
    assert _recipe(text).train.init_checkpoint == str(weights)
    assert f"start        {weights}" in text


def test_a_detector_of_other_classes_gives_the_rows_of_those_that_both_have(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    weights = _weights(tmp_path / "animals.pth", ["bird", "dog", "cow"])
    text = _told(capsys, data, "--weights", str(weights), "--out", str(tmp_path / "run"))
    start = Path(_recipe(text).train.init_checkpoint)
    assert start == tmp_path / "run" / "start.pth"
    ours, theirs = (checkpoint.read(path)["model"] for path in (start, weights))
    key = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(ours[key][1], theirs[key][1])  # dog
    assert torch.equal(ours[key][-1], theirs[key][-1])  # background
    assert len(ours[key]) == 3
    assert checkpoint.read(start)["vitdet"]["class_names"] == ["cat", "dog"]


def test_a_detector_of_other_classes_alone_gives_all_but_their_rows(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    weights = _weights(tmp_path / "shapes.pth", ["circle", "star", "ring"])
    text = _told(capsys, data, "--weights", str(weights), "--out", str(tmp_path / "run"))
    assert "classes      2 start anew (cat, dog)" in text
    assert "classes      3 left out (circle, star, ring)" in text
    start = checkpoint.read(_recipe(text).train.init_checkpoint)
    ours, theirs = start["model"], checkpoint.read(weights)["model"]
    rows = r"roi_heads\.(box_predictor\.(cls_score|bbox_pred)|mask_head\.predictor)\."
    for name, value in theirs.items():
        if not re.match(rows, name):
            assert torch.equal(ours[name], value), name
    key = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(ours[key][-1], theirs[key][-1])  # background
    assert f"{key}[0-1]" in start["vitdet"]["initialised"]
    assert start["vitdet"]["class_names"] == ["cat", "dog"]


def test_weights_of_another_size_are_a_line_that_says_so(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    weights = _weights(tmp_path / "shapes.pth", ["circle"])
    words = ["--size", "small", "--weights", str(weights), "--out", str(tmp_path / "run")]
    assert cli.main(["train", "--data", str(data), *words]) == 2
    error = capsys.readouterr().err
    where = f"error: --weights {weights}: it does not fit mask_rcnn_vitdet_s.py (--size small): "
    assert error.startswith(where)
    assert str(weights) not in error.removeprefix(where)
    assert "file has 192 channels (embed_dim), model 384. Use the recipe of its size." in error
    assert error.count("\n") == 1


def test_of_a_file_of_others_the_backbone_is_taken(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    weights = _weights(tmp_path / "theirs.pth", None)
    state = checkpoint.read(weights)["model"]
    torch.save({"model": state}, weights)  # no note of ours
    text = _told(capsys, data, "--weights", str(weights), "--out", str(tmp_path / "run"))
    start = checkpoint.read(_recipe(text).train.init_checkpoint)
    assert {name.split(".")[0] for name in start["model"]} == {"backbone"}
    key = "backbone.net.blocks.0.attn.q_proj.weight"
    assert torch.equal(start["model"][key], state[key])
    assert "roi_heads.box_predictor.cls_score.weight" in start["vitdet"]["initialised"]


def test_convert_is_the_converter(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    weights, output = _weights(tmp_path / "theirs.pth", None), tmp_path / "out.pth"
    torch.save({"model": checkpoint.read(weights)["model"]}, weights)
    recipe = str(train.recipe_of("tiny", masks=True))
    files = ["--source-model", str(weights), "--output-model", str(output)]
    assert cli.main(["convert", *files, "--config-file", recipe, "--backbone-only"]) == 0
    assert f"wrote        {output}: " in capsys.readouterr().out
    # a bare state dict of ours, in EVA-02's names and without norms in its heads
    words = ["--config-file", recipe, "model.roi_heads.num_classes=2"]
    assert cli.main(["convert", *files, *words]) == 0
    assert checkpoint.read(output)["model"].keys() == checkpoint.read(weights)["model"].keys()
    files[1] = str(tmp_path / "none.pth")
    assert cli.main(["convert", *files, "--config-file", recipe]) == 2
    assert "none.pth" in capsys.readouterr().err


def test_weights_of_another_shape_stop_it(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(2, 3)}, weights)
    words = ["--weights", str(weights), "--out", str(tmp_path / "run")]
    assert cli.main(["train", "--data", str(data), *words]) == 2
    error = capsys.readouterr().err
    assert f"--weights {weights}: it does not fit" in error
    # and no option is named as if this command had it
    assert ("--source-format" in error) == ("options are those of `vitdet convert`" in error)


# --- the dry run ---------------------------------------------------------------------------------


def test_a_dry_run_keeps_nothing(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
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


def test_on_a_gpu_the_batch_is_halved_until_a_step_fits(
    capsys: pytest.CaptureFixture[str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def steps(_: str, overrides: list[str], resume: bool, dry_run: bool) -> None:
        assert dry_run
        tried.append(int(overrides[-1].removeprefix("dataloader.train.total_batch_size=")))
        if tried[-1] > 1:
            raise DoesNotFitError("memory: no")

    monkeypatch.setattr(train, "_train", steps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = _recipe(text := _told(capsys, data, "--size", "tiny", "--num-gpus", "2"))
    assert tried == [4, 2, 1]
    assert text.count("batch        memory: no") == 2
    assert cfg.dataloader.train.total_batch_size == cfg.train.reference_batch == 2
    assert cfg.optimizer.lr == pytest.approx(5e-4 / 4)
    tried.clear()
    _told(capsys, data, "--size", "tiny", "--batch", "4")
    assert tried == []


# --- the whole way --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not formats.COCO_MINI.is_dir(),
    reason=f"no photographs in {formats.COCO_MINI} (set VITDET_COCO_MINI)",
)
@pytest.mark.parametrize("form", ["coco", "roboflow", "yolo", "voc"])
def test_one_command_trains_on_photographs_in_each_format(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, form: str
) -> None:
    source, folder, out = formats.Source(3), tmp_path / "data", tmp_path / "run"
    masks = form != "yolo"
    if form == "yolo":
        formats.write_yolo(source, folder, polygons=False)
    elif form == "voc":
        formats.write_voc(source, folder, masks=True)
    else:
        {"coco": formats.write_coco, "roboflow": formats.write_roboflow}[form](source, folder)
    words = ["--data", str(folder), "--out", str(out), "--batch", "2", "--epochs", "1"]
    small = ["train.precision=fp32", "dataloader.train.num_workers=0", "train.device=cpu"]
    assert cli.main(["train", *words, *small, "--size", "tiny"]) == 0
    results = json.loads((out / "results.json").read_text())["results"]
    assert set(results) == ({"bbox", "segm"} if masks else {"bbox"})
    found = checkpoint.read(out / "model_final.pth")["vitdet"]["class_names"]
    assert set(found) <= set(source.names)
    assert (out / "data" / "train.json").is_file() is (form != "coco")
    assert not list(folder.rglob(RESULT_MARKER))
    assert "recipe       configs/own/" in capsys.readouterr().out
