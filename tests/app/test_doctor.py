"""`vitdet doctor`: its page for sound recipes, for planted faults, and for every recipe here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitdet import checkpoint
from vitdet.app import cli
from vitdet.config import build_model, load_config, save_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHAPES = CONFIGS / "mini/mask_rcnn_vitdet_shapes.py"
ALL = sorted(path for path in CONFIGS.rglob("*.py") if "common" not in path.parts)
SOME = ["COCO/mask_rcnn_vitdet_b_100ep", "LVIS/cascade_mask_rcnn_swin_b_in21k_50ep"]
SOME += ["vil/retinanet_vil_tiny_1x", "vitae/mask_rcnn_vitae_s_100ep", "own/mask_rcnn_vitdet_b"]
SOME += ["backbones/streampetr_eva02_l_800x320"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def sound(drawn: Path, tmp_path: Path) -> list[str]:
    """The recipe of the drawn shapes, with little data; a run of it would go well."""
    words = [str(SHAPES), f"train.output_dir={tmp_path / 'out'}"]
    for half, count in (("train", 8), ("test", 3)):
        words.append(f"dataloader.{half}.dataset.root={drawn}")
        words.append(f"dataloader.{half}.dataset.num_images={count}")
    return [*words, "train.device=cpu", "train.precision=fp32"]


def examined(
    capsys: pytest.CaptureFixture[str], *words: str, status: int, quick: bool = True
) -> str:
    assert cli.main(["doctor", *words, *["--quick"] * quick]) == status
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def lines(text: str, level: str) -> list[str]:
    """{subject: text} of a level, with the remedy of the next line."""
    rows = text.splitlines()
    found = []
    for i, row in enumerate(rows):
        if row.startswith(level):
            follows = rows[i + 1] if i + 1 < len(rows) else ""
            remedy = follows.strip() if follows.strip().startswith("->") else ""
            found.append(" ".join(f"{row} {remedy}".split()))
    return found


def test_a_sound_recipe_has_no_fault(sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = examined(capsys, *sound, "--memory", "1", status=0, quick=False)
    assert lines(text, "FAULT") == []
    (weights,) = lines(text, "warning")
    assert weights.startswith("warning weights none: the training starts from random weights ->")
    for line in (
        "ok recipe all keys are known, ",
        "ok batch 4 images a step, 4 a process",
        "ok train data shapes_v1_train_8x128px_seed0: 8 images, ",
        "ok classes 6 of the data",
        "ok model GeneralizedRCNN, 1.71 M parameters",
        "ok sizes 128 pixels, patches of 8, 16 x 16 tokens",
        "ok schedule 15000 images, 3750 iterations, 1.88e+03 epochs",
        "ok optimizer AdamW, 2 groups; lr block_0 0.0007, block_3 0.0007, head 0.0007, pyramid",
        "ok device cpu, float32 (train.precision=fp32)",
        "ok memory 0.09 GiB for 4 images at once, 1.00 GiB free",
        "ok disk 4 checkpoints of 0.02 GiB, ",
        "ok folder ",
        "ok packages torch ",
    ):
        assert any(found.startswith(line) for found in lines(text, "ok")), line
    assert text.endswith("0 faults, 1 warning, 14 ok\n")


FAULTS = {
    "unknown train key": (
        ["train.log_every=null"],
        "FAULT recipe train.log_every: expected a whole number, got None -> Give a value of that",
    ),
    "bad duration": (
        ["train.epochs=-1"],
        "FAULT recipe train.epochs: expected a number above 0, got -1 -> It stretches every",
    ),
    "batch": (
        ["--processes", "3"],
        "FAULT batch 4 images a step cannot be shared by 3 processes -> Change dataloader.train",
    ),
    "parts": (
        ["train.accumulate=3"],
        "FAULT batch 4 images of a process cannot be cut into train.accumulate=3 parts",
    ),
    "data": (
        ["dataloader.train.dataset.split=trian"],
        "FAULT train data shapes data set: expected split of train, val, test",
    ),
    "images too large": (
        ["dataloader.test.mapper.augmentations.height=160"],
        "FAULT sizes test images are up to 160 pixels, the model pads to 128 -> Set model.backbone",
    ),
    "square": (
        ["model.backbone.square_pad=136"],
        "FAULT sizes a square of 136 pixels is no multiple of 16 -> Set model.backbone.square_pad",
    ),
    "global blocks": (
        ["model.backbone.net.global_block_indexes=[1,7]"],
        "FAULT model global_block_indexes: expected block numbers from 0 to 3, got [7]",
    ),
    "heads and channels": (
        ["model.backbone.net.num_heads=5"],
        "FAULT model",
    ),
    "norm": (
        ["model.backbone.norm=XX"],
        "FAULT model",
    ),
    "milestones": (
        ["schedule.warmup=20000"],
        "FAULT schedule schedule.warmup: expected less than the 15000 images of training, got 2",
    ),
    "weights absent": (
        ["train.init_checkpoint=weights/nowhere.pth"],
        "FAULT weights weights/nowhere.pth is not there -> Make it with converter.py",
    ),
    "optimizer": (
        ["optimizer.backbone=trunk", "optimizer.layer_decay_rate=0.7"],
        "FAULT optimizer optimizer.backbone: expected the name of a submodule, got 'trunk'",
    ),
    "precision": (
        ["train.precision=int8"],
        "FAULT device precision: expected one of auto, bf16, fp16, fp32, got int8",
    ),
    "device": (
        ["train.device=tpu"],
        "FAULT device train.device: expected auto, cpu or cuda, got tpu -> Use auto.",
    ),
    "loggers": (
        ["train.loggers=[tensorbord]"],
        "FAULT recipe train.loggers: expected names of wandb, mlflow, got 'tensorbord' -> Leave",
    ),
    "best metric": (
        ["train.best_metric=AP"],
        "FAULT recipe train.best_metric: expected TASK/METRIC",
    ),
    "left open": (
        ["train.init_checkpoint=???"],
        "FAULT recipe recipe: expected a value for train.init_checkpoint, got ??? -> Give it as",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault: str, sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = FAULTS[fault]
    text = examined(capsys, *sound, *words, status=1)
    found = lines(text, "FAULT")
    assert any(line.startswith(expected) for line in found), found
    assert "Traceback" not in text


def rename_test_classes(folder: Path, drawn: Path) -> list[str]:
    source = next(drawn.glob("shapes_v1_val_3x*"))
    content = json.loads((source / "instances.json").read_text())
    content["categories"][1]["name"] = "oblong"
    (folder / "val.json").write_text(json.dumps(content))
    test = {"json": str(folder / "val.json"), "images": str(source / "images")}
    return _with_test_data(folder, {"_target_": "vitdet.data.datasets.coco_dataset", **test})


def _with_test_data(folder: Path, dataset: dict[str, str]) -> list[str]:
    cfg = load_config(SHAPES)
    cfg.dataloader.test.dataset = dataset
    save_config(cfg, folder / "recipe.yaml")
    return [str(folder / "recipe.yaml")]


def images_gone(folder: Path, drawn: Path) -> list[str]:
    source = next(drawn.glob("shapes_v1_val_3x*"))
    (folder / "empty").mkdir()
    test = {"json": str(source / "instances.json"), "images": str(folder / "empty")}
    node = {"_target_": "vitdet.data.datasets.coco_dataset", **test, "check": "keep"}
    return _with_test_data(folder, node)


def weights_of_another_size(folder: Path, _: Path) -> list[str]:
    cfg = load_config(SHAPES, ["model.backbone.net.embed_dim=48"])
    checkpoint.write(folder / "w.pth", {"model": build_model(cfg.model).state_dict()})
    return [f"train.init_checkpoint={folder / 'w.pth'}"]


def weights_of_other_classes(folder: Path, _: Path) -> list[str]:
    state = build_model(load_config(SHAPES).model).state_dict()
    names = ["circle", "oblong", "triangle", "star", "ring", "cross"]
    checkpoint.write(folder / "w.pth", {"model": state, "vitdet": {"class_names": names}})
    return [f"train.init_checkpoint={folder / 'w.pth'}"]


def damaged_weights(folder: Path, _: Path) -> list[str]:
    (folder / "w.pth").write_bytes(b"nothing of use")
    return [f"train.init_checkpoint={folder / 'w.pth'}"]


def folder_is_a_file(folder: Path, _: Path) -> list[str]:
    (folder / "file").touch()
    return [f"train.output_dir={folder / 'file'}"]


def lost_checkpoint(folder: Path, _: Path) -> list[str]:
    (folder / "last_checkpoint").write_text("model_000000099.pth\n")
    return [f"train.output_dir={folder}"]


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (
            rename_test_classes,
            "FAULT classes training data have rectangle where test data have oblong -> Give both",
        ),
        (images_gone, "FAULT test data 3 of 3 image files that were looked for are not there"),
        (weights_of_another_size, "FAULT weights"),
        (weights_of_other_classes, "FAULT weights class names of"),
        (damaged_weights, "FAULT weights checkpoint"),
        (folder_is_a_file, "FAULT folder"),
        (lost_checkpoint, "FAULT folder"),
    ],
)
def test_planted_files(
    plant: Callable[[Path, Path], list[str]],
    expected: str,
    sound: list[str],
    drawn: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    examined(capsys, *sound, status=0)  # draws the data
    words = plant(tmp_path, drawn)
    if words[0].endswith(".yaml"):
        keep = [word for word in sound[1:] if "test.dataset" not in word]
        words = [*words, *keep]
    else:
        words = [*sound, *words]
    found = lines(examined(capsys, *words, status=1), "FAULT")
    assert any(line.startswith(expected) for line in found), found


WARNINGS = {
    "lr rule": (
        ["dataloader.train.total_batch_size=8"],
        "warning lr rule a step has 8 images, and the recipe is made for 4; optimizer.lr=0.0007",
    ),
    "warm-up": (["schedule.warmup=8"], "warning schedule a warm-up of 2 iterations -> Give it"),
    "long warm-up": (
        ["schedule.warmup=80%"],
        "warning schedule the warm-up takes 80 % of the training -> Shorten",
    ),
    "windows": (
        [f"model.backbone.net.{kind}_block_indexes=[]" for kind in ("global", "residual")],
        "warning sizes 128 pixels, patches of 8, 16 x 16 tokens; no block looks beyond its window",
    ),
    "made for another size": (
        ["model.backbone.net.img_size=256"],
        "warning sizes the model is made for 256 pixels and gets 128 -> Positions are resized",
    ),
    "no checkpoint": (
        ["train.checkpoint_every=0"],
        "warning schedule train.checkpoint_every=0: no checkpoint before the end",
    ),
    "lr": (["optimizer.lr=0.1"], "warning optimizer AdamW, 2 groups; lr block_0 0.1"),
    "fp16": (["train.precision=fp16"], "warning device cpu, float16"),
}


@pytest.mark.parametrize("warning", WARNINGS)
def test_planted_warnings(
    warning: str, sound: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = WARNINGS[warning]
    found = lines(examined(capsys, *sound, *words, status=0), "warning")
    assert any(line.startswith(expected) for line in found), found


def test_weights_that_fit_and_a_run_that_is_there(
    sound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = build_model(load_config(SHAPES).model).state_dict()
    name = "roi_heads.box_predictor.cls_score.weight"
    note = {"format": 1, "initialised": [f"{name}[0-3]"]}
    checkpoint.write(tmp_path / "w.pth", {"model": state, "vitdet": note})
    folder = tmp_path / "run"
    folder.mkdir()
    for images, remedy in ((5000, "--resume goes on with it"), (15_000, "It is finished: choose")):
        last = f"model_{images:09d}.pth"
        checkpoint.write(folder / last, {"model": state, "images_seen": images})
        (folder / "last_checkpoint").write_text(f"{last}\n")
        words = [f"train.init_checkpoint={tmp_path / 'w.pth'}", f"train.output_dir={folder}"]
        text = examined(capsys, *sound, *words, status=0)
        (weights,) = [line for line in lines(text, "ok") if line.startswith("ok weights")]
        assert weights.endswith(
            f"names and shapes fit; 1 entries ({name}[0-3], ...) are left to initialisation"
        )
        (warning,) = lines(text, "warning")
        assert warning.startswith(
            f"warning folder {folder} holds a run, {last} after {images} images -> {remedy}"
        )


def test_memory_and_disk_are_faults_where_they_do_not_do(
    sound: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vitdet.app.doctor import machine

    usage = machine.shutil.disk_usage("/")._replace(free=50 * 2**20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    text = examined(capsys, *sound, "--memory", "0.05", status=1, quick=False)
    memory, disk = lines(text, "FAULT")
    assert memory.startswith("FAULT memory 0.09 GiB for 4 images at once, 0.05 GiB free -> vitdet")
    assert disk.startswith("FAULT disk 4 checkpoints of 0.02 GiB, 0.0 GiB free at ")


def test_federated_loss_of_other_classes() -> None:
    from vitdet.app.doctor.data import _federated

    lvis = load_config(CONFIGS / "LVIS/cascade_mask_rcnn_vitdet_b_100ep.py").model
    assert _federated(lvis) == 1203
    assert _federated(load_config(SHAPES).model) is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["absent.py"], "--config-file: expected a file, got absent.py"),
        ([str(SHAPES), "modle=1"], "override 'modle': expected a key of the recipe"),
        ([str(SHAPES), "--processes", "0"], "--processes: expected at least 1, got 0"),
        ([str(SHAPES), "train.num_images=12 epchs"], "Did you mean '12 epochs'?"),
    ],
)
def test_wrong_inputs_are_status_2(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *words]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert text in found.err


def no_traceback(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["doctor", str(path), *words, "--quick"]) in (0, 1)
    found = capsys.readouterr()
    assert found.err == ""
    assert "Traceback" not in found.out
    assert found.out.rstrip().endswith(" ok")
    return found.out


def check_published(name: str, text: str) -> None:
    """Without the data and the weights of a published recipe: these are its only faults."""
    faults = {line.split()[1] for line in lines(text, "FAULT")}
    if name.startswith("backbones/"):
        assert faults == {"parts"}
    elif name.startswith("own/"):
        assert "recipe" in faults  # values left open
    else:
        assert faults <= {"train", "test", "weights"}, lines(text, "FAULT")
        assert any(line.startswith("ok model") for line in lines(text, "ok"))
        assert any(line.startswith("ok schedule") for line in lines(text, "ok"))


@pytest.mark.parametrize("name", SOME)
def test_recipes(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    check_published(name, no_traceback(CONFIGS / f"{name}.py", capsys))


@pytest.mark.slow
@pytest.mark.parametrize("path", ALL, ids=[str(path.relative_to(CONFIGS)) for path in ALL])
def test_every_recipe(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage("/")._replace(free=2**40)  # whatever this machine has left
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    name = path.relative_to(CONFIGS).as_posix()
    words = []
    if name.startswith("mini/"):  # data that are drawn, or here
        words = [f"dataloader.{half}.dataset.num_images=2" for half in ("train", "test")]
    check_published(name, no_traceback(path, capsys, *words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(sound: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = examined(capsys, *sound, "train.device=cuda", status=1)
    (fault,) = lines(text, "FAULT")
    assert fault.startswith("FAULT device train.device: expected a GPU that torch can use, got no")
