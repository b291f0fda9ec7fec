"""Whole runs: what they leave, how they go on, and what stops them."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_recipe import CountingEvaluator, recipe

from vitdet import checkpoint
from vitdet.config import load_config
from vitdet.engine import run
from vitdet.engine.checkpoints import BEST, FINAL, Checkpoints, last_checkpoint, usable
from vitdet.engine.run import alone_in, evaluate, train
from vitdet.engine.signals import Preempted
from vitdet.engine.trainer import NonFiniteLossError, Trainer
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import PREEMPTION


def stop_after(monkeypatch, steps):
    """Interrupt the next training in its step number `steps` (from 0), as ^C would."""
    original = Trainer.step
    done = []

    def step(self, batch):
        if len(done) == steps:
            monkeypatch.setattr(Trainer, "step", original)
            raise KeyboardInterrupt
        done.append(1)
        original(self, batch)

    monkeypatch.setattr(Trainer, "step", step)


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{index}")
    else:
        assert a == b, where


def numbers(folder):
    """The lines of metrics.json without what depends on the clock."""
    clock = {"images_per_second", "data_seconds", "max_memory_mb"}
    lines = (folder / "metrics.json").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())["results"]


KINDS = {
    "plain": {"checkpoint_every": 8, "eval_every": 16},
    "parts": {"checkpoint_every": 8, "eval_every": 16, "accumulate": 2},
    "best": {"checkpoint_every": 8, "eval_every": 4, "keep_checkpoints": 1, "ema_decay": 0.75}
    | {"best_metric": "bbox/AP50", "log_every": 1},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of whole runs of 6 steps of 4 images."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in KINDS}
    for kind, folder in folders.items():
        train(recipe(folder, **KINDS[kind]))
    return folders


@pytest.fixture(scope="module")
def undisturbed(runs):
    return runs["plain"]


def test_a_run_leaves_its_record(undisturbed):
    assert {path.name for path in undisturbed.iterdir() if "tfevents" not in path.name} == {
        *("config.yaml", "environment.json", "last_checkpoint", "log.txt", "metrics.json"),
        *("model_000000008.pth", "model_000000016.pth", BEST, FINAL, "results.json"),
        *("run.json", "run.lock"),
    }
    assert len(list(undisturbed.glob("events.out.tfevents.*"))) == 1
    assert (undisturbed / "last_checkpoint").read_text() == "model_final.pth\n"
    assert f"process {os.getpid()} on " in (undisturbed / "run.lock").read_text()
    content = checkpoint.read(undisturbed / FINAL)
    state = {"model", "optimizer", "scaler", "images_seen", "seed"}
    assert set(content) == state | {"vitdet"}
    assert (content["images_seen"], content["seed"]) == (24, 3)
    assert content["vitdet"]["class_names"] == ["dark", "light"]
    assert content["vitdet"]["config"] == (undisturbed / "config.yaml").read_text()
    assert "torch" in json.loads((undisturbed / "environment.json").read_text())
    assert load_config(undisturbed / "config.yaml", trust=True).train.num_images == 24


def test_metrics_hold_each_loss_and_learning_rate_and_the_log_its_lines(undisturbed):
    lines = numbers(undisturbed)
    assert [line["images_seen"] for line in lines] == [8, 16, 16, 24, 24]
    losses = [name for name in lines[0] if name.startswith("loss_")]
    assert losses == ["loss_box_reg", "loss_cls", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"]
    assert lines[0]["total_loss"] == pytest.approx(sum(lines[0][name] for name in losses))
    assert lines[0]["grad_norm"] > 0
    # The step after 20 images, past the milestone at 16: lr / 10, and layer 0 of 2 + 1 below it.
    assert lines[3]["lr"] == pytest.approx(1e-4)
    assert lines[3]["lr_lowest"] == pytest.approx(1e-4 * 0.7**3)
    assert lines[2]["bbox/AP"] == lines[4]["bbox/AP"] == 6.0
    assert "bbox/APs" not in lines[4]  # not a number
    assert results_of(undisturbed)["bbox"]["APs"] is None
    log = (undisturbed / "log.txt").read_text()
    for text in ("starting from random weights", "24/24 images  eta 0:00:00  loss", "AP    AP50"):
        assert text in log
    assert "lr 0.0001 " in log


# --- going on ------------------------------------------------------------------------------------


# in the middle of a period, or right after a checkpoint
@pytest.mark.parametrize(("kind", "steps"), [("plain", 3), ("parts", 4), ("best", 3), ("best", 4)])
def test_a_resumed_run_ends_with_the_same_bits(runs, tmp_path, monkeypatch, kind, steps):
    stop_after(monkeypatch, steps)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path, **KINDS[kind]))
    torch.rand(17)
    train(recipe(tmp_path, **KINDS[kind]), resume=True)
    for name in (FINAL, *[BEST] * (kind == "best")):
        resumed, whole = (checkpoint.read(folder / name) for folder in (tmp_path, runs[kind]))
        for key in whole.keys() - {"vitdet"}:
            assert_same(resumed[key], whole[key], f"{name} {key}")
    assert numbers(tmp_path) == numbers(runs[kind])
    assert results_of(tmp_path) == results_of(runs[kind])


def test_a_finished_run_is_continued_when_it_gets_longer(tmp_path):
    (tmp_path / ".model_000000008.pth.123.partial").touch()  # of a killed process
    for length in (16, 20):
        options = {"checkpoint_every": 4, "keep_checkpoints": 2, "num_images": length}
        train(recipe(tmp_path, **options), resume=True)
    assert checkpoint.read(tmp_path / FINAL)["images_seen"] == 20
    names = sorted(path.name for path in tmp_path.glob("*model_*"))
    assert names == ["model_000000008.pth", "model_000000012.pth", BEST, FINAL]


def test_a_folder_that_holds_a_run_is_not_overwritten(undisturbed):
    before = (undisturbed / FINAL).stat().st_mtime_ns
    text = r"expected a folder without a run, got one that holds model_final\.pth\. Add --resume"
    with pytest.raises(InputError, match=text):
        train(recipe(undisturbed))
    assert (undisturbed / FINAL).stat().st_mtime_ns == before


def test_resume_without_a_checkpoint_starts_anew_and_says_so(tmp_path, undisturbed):
    start = str(undisturbed / "model_000000016.pth")
    train(recipe(tmp_path, num_images=4, init_checkpoint=start), resume=True)
    log = (tmp_path / "log.txt").read_text()
    assert f"no checkpoint in {tmp_path}: starting a new run" in log
    assert f"loaded {start} (0 images seen)" in log


def with_data(cfg, count):
    cfg.dataloader.train.dataset = {"_target_": "test_run.filled", "count": count}
    return cfg


def filled(count):
    records = [{"file_name": f"{i}.jpg", "annotations": [{"id": i}]} for i in range(count)]
    names = {"class_names": ("dark", "light"), "class_ids": (3, 1)}
    return SimpleNamespace(name="filled", records=records, **names)


def test_a_run_keeps_its_data_and_a_resume_compares_them(tmp_path):
    train(with_data(recipe(tmp_path, num_images=8), 5))
    about = json.loads((tmp_path / "run.json").read_text())
    note = checkpoint.read(tmp_path / FINAL)["vitdet"]
    assert note["data"] == about["data"]
    assert (about["data"]["train"]["images"], about["data"]["test"]["images"]) == (5, 0)
    assert (note["class_names"], note["class_ids"]) == (["dark", "light"], [3, 1])
    assert about["seed"] == 3
    longer = with_data(recipe(tmp_path, num_images=12), 4)
    with pytest.raises(InputError) as caught:
        train(longer, resume=True)
    assert str(caught.value) == (
        f"data for resuming {tmp_path / FINAL}: expected those with which the run began, got train "
        "data: 5 images, now 4; train data: 5 objects, now 4. Give it the same data, or go on all "
        "the same with train.allow_changed_data=true."
    )
    longer.train.allow_changed_data = True
    train(longer, resume=True)
    assert "the data changed since" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["data"]["train"]["images"] == 4


# --- evaluation alone ----------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "task"), [("model", "bbox"), ("ema", "ema/bbox")])
def test_evaluation_alone_gives_the_results_of_the_training(runs, tmp_path, which, task):
    stored = results_of(runs["best"])
    start = str(runs["best"] / FINAL)
    saved = load_config(
        runs["best"] / "config.yaml", [f"train.output_dir={tmp_path / 'saved'}"], trust=True
    )
    saved.train.update(init_checkpoint=start, eval_weights=which)
    for cfg in (saved, recipe(tmp_path / "out", init_checkpoint=start, eval_weights=which)):
        results = evaluate(cfg)
        assert results.keys() == {task}
        assert results[task]["AP50"] == stored[task]["AP50"]
        assert results_of(Path(cfg.train.output_dir)) == {task: stored[task]}
    assert evaluate(recipe(runs["plain"]), resume=True)["bbox"]["AP50"] == stored["bbox"]["AP50"]


# --- refused before anything is written ----------------------------------------------------------


def rename_classes(cfg, *names):
    for part in (cfg.dataloader.train, cfg.dataloader.test):
        part.dataset.class_names = list(names)
    return cfg


def test_a_checkpoint_that_does_not_fit_is_refused(undisturbed, tmp_path):
    start = {"init_checkpoint": str(undisturbed / FINAL)}
    for names, text in (
        (("dark", "bright"), r"class names of .*expected those of the data set, bright among them"),
        (("a", "b", "c"), r"model_final\.pth.* 2 classes.* 3\b"),
    ):
        for command in (train, evaluate):
            with pytest.raises(InputError, match=text):
                command(rename_classes(recipe(tmp_path / "out", **start), *names))
    cfg = recipe(tmp_path / "out", **start)
    cfg.model.backbone.net.embed_dim = 64
    with pytest.raises(InputError, match=r"model_final\.pth.* 32 .*embed_dim.* 64"):
        train(cfg)
    content = checkpoint.read(undisturbed / FINAL)
    name = next(iter(content["model"]))
    note = {"format": 1, "initialised": [name]}
    del content["model"][name]
    checkpoint.write(tmp_path / "start.pth", {"model": content["model"], "vitdet": note})
    start = {"init_checkpoint": str(tmp_path / "start.pth")}
    with pytest.raises(InputError, match="expected a trained detector, got a start of training: 1"):
        evaluate(recipe(tmp_path / "out", **start))
    with pytest.raises(InputError, match=r'start\.pth: expected a moving average .*\("ema_state"'):
        evaluate(recipe(tmp_path / "out", eval_weights="ema", **start))
    with pytest.raises(InputError, match=r"weights to evaluate: expected train\.init_checkpoint="):
        evaluate(recipe(tmp_path / "out"))
    cfg = recipe(tmp_path / "out")
    cfg.dataloader.test.dataset.class_names = ["light", "dark"]
    text = r"classes of the test data rectangles: expected those of the training"
    with pytest.raises(InputError, match=text):
        train(cfg)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"train.output_dir: .*: Not a directory"):
        train(recipe(tmp_path / "file" / "out"))
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped/log.txt")  # whoever opens it waits for ever
    text = r"log\.txt in train\.output_dir: expected a file or a folder, got a pipe"
    with pytest.raises(InputError, match=text), alone_in(tmp_path / "piped"):
        pass
    with alone_in(tmp_path / "out"):
        assert (tmp_path / "out" / "run.lock").exists()
    assert not (tmp_path / "out").exists()  # a run that does not begin leaves no folder


# --- nothing is lost -----------------------------------------------------------------------------


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(tmp_path):
    detector = torch.nn.Linear(1, 1)
    trainer = Trainer(detector, torch.optim.SGD(detector.parameters(), lr=1.0), lambda _: 1.0)
    trainer.images_seen, trainer.num_images = 1, 10
    detector.weight.data.fill_(torch.nan)
    hook = Checkpoints(tmp_path, every=1, keep=1, total_batch_size=1, note={})
    for save in (hook.after_step, hook.after_train):
        with pytest.raises(NonFiniteLossError, match=r"1 tensors that are not \(weight, \.\.\.\)"):
            save(trainer)
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_that_is_cut_off_has_a_checkpoint_of_its_step(tmp_path, monkeypatch):
    options = {"eval_every": 12, "checkpoint_every": 8}

    def cut_off(_):
        raise OSError(errno.ENOSPC, "No space left on device", "predictions.json")

    with monkeypatch.context() as patched:
        patched.setattr(CountingEvaluator, "evaluate", cut_off)
        with pytest.raises(InputError, match=r"^predictions\.json: No space left on device\. Look"):
            train(recipe(tmp_path, **options))
    found = usable(tmp_path)
    assert found is not None
    assert (found.path.name, found.content["images_seen"]) == ("model_000000012.pth", 12)
    train(recipe(tmp_path, **options | {"num_images": 16}), resume=True)
    seen = [line["images_seen"] for line in numbers(tmp_path) if "bbox/AP" in line]
    assert seen == [12, 16]  # it is done again


def test_signals_during_an_evaluation_leave_at_once(tmp_path, monkeypatch):
    def told(_):
        signal.raise_signal(number)
        raise AssertionError("it should have left")

    monkeypatch.setattr(CountingEvaluator, "evaluate", told)
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        name = "SIGTERM" if number is signal.SIGTERM else "^C"
        with pytest.raises(Preempted) as caught:
            train(recipe(tmp_path / str(status), eval_every=12))
        assert caught.value.code == status
        said = f"{name} after 12 images: saved before this evaluation, leaving with status {status}"
        assert str(caught.value) == f"{said}; the same command with --resume goes on from here"
        assert last_checkpoint(tmp_path / str(status)).name == "model_000000012.pth"
        for each in PREEMPTION:  # a scheduler's repetitions do not change the status
            signal.raise_signal(each)


def test_interrupts_while_data_are_read_and_while_training(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(run, "build_dataset", lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="before the first step: nothing was lost"):
            train(recipe(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    original = Trainer.step

    def told(self, batch):
        signal.raise_signal(signal.SIGINT)
        original(self, batch)

    monkeypatch.setattr(Trainer, "step", told)
    with pytest.raises(Preempted, match=r"\^C after 4 images: saved model_000000004\.pth,.*130"):
        train(recipe(tmp_path / "out"))

    def told_twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", told_twice)
    with pytest.raises(KeyboardInterrupt, match="at once; --resume goes on from the last"):
        train(recipe(tmp_path / "out"), resume=True)
    assert last_checkpoint(tmp_path / "out").name == "model_000000004.pth"


SMALL = ("log.txt", "metrics.json", "results.json", "environment.json", "run.json", "config.yaml")
DAMAGED = {"cut": b'{"a', "latin": b"\xff\xfe", "deep": b"[" * 100_000}


@pytest.mark.parametrize("kind", DAMAGED)
def test_files_of_a_run_that_cannot_be_read_cost_themselves(undisturbed, tmp_path, kind):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for name in (*SMALL, "last_checkpoint"):
        (folder / name).write_bytes(DAMAGED[kind])
    train(recipe(folder, checkpoint_every=8, eval_every=16, num_images=28), resume=True)
    log = (folder / "log.txt").read_bytes().decode(errors="replace")
    assert "model_final.pth (24 images seen)" in log
    assert checkpoint.read(folder / FINAL)["images_seen"] == 28
    assert (folder / "last_checkpoint").read_text() == "model_final.pth\n"


def test_a_checkpoint_of_other_types_is_one_line(undisturbed, tmp_path):
    name = "model_000000016.pth"
    (tmp_path / "last_checkpoint").write_text(name)
    for key, value, text in (
        ("images_seen", "24", r"expected int, got str in images_seen"),
        ("images_seen", -4, r"its name does not fit its -4 images seen"),
        ("optimizer", {"param_groups": 3}, r"expected the state of an optimizer .*TypeError"),
    ):
        checkpoint.write(tmp_path / name, {**checkpoint.read(undisturbed / name), key: value})
        with pytest.raises(InputError, match=text) as caught:
            train(recipe(tmp_path, num_images=20), resume=True)
        assert "\n" not in str(caught.value)
