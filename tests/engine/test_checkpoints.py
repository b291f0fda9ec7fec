from __future__ import annotations

import errno
import json
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import folder_workers
import pytest
import torch
from test_run import assert_same, numbers
from tiny_recipe import CountingEvaluator, recipe

from vitdet import checkpoint
from vitdet.engine.background import Writer, on_cpu
from vitdet.engine.checkpoints import BEST, FINAL, LAST, Checkpoints, usable
from vitdet.engine.launch import launch
from vitdet.engine.run import evaluate, train
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError


def tiny_trainer(images_seen: int = 4, num_images: int = 100) -> Trainer:
    torch.manual_seed(0)
    detector = torch.nn.Linear(5, 3)
    trainer = Trainer(detector, torch.optim.AdamW(detector.parameters()), lambda _: 1.0)
    detector(torch.ones(1, 5)).sum().backward()
    trainer.optimizer.step()
    trainer.images_seen, trainer.num_images = images_seen, num_images
    return trainer


def hook(folder: Path, **changes) -> Checkpoints:
    options = {"every": 4, "keep": 3, "total_batch_size": 4, "note": {"class_names": ["a"]}}
    return Checkpoints(folder, **{**options, **changes})


def save(folder: Path, *images: int, **changes) -> Trainer:
    """Write checkpoints after so many images, each with other weights."""
    writes, trainer = hook(folder, **changes), tiny_trainer()
    for count in images:
        trainer.images_seen = count
        trainer.detector.weight.data.fill_(count)
        writes.after_step(trainer)
    writes.wait()
    writes.close()
    return trainer


def images_of_usable(folder: Path) -> int:
    found = usable(folder)
    assert found is not None
    assert (found.content["model"]["weight"] == found.content["images_seen"]).all()
    return found.content["images_seen"]


# --- damage ------------------------------------------------------------------------------------


def test_damage_anywhere_is_detected_or_changes_nothing(tmp_path):
    """All over a checkpoint, with the checksums of the format."""
    save(tmp_path, 4)
    path = tmp_path / "model_000000004.pth"
    whole, content = path.read_bytes(), checkpoint.read(path)
    choose = random.Random(0)
    detected = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= choose.choice([1 << choose.randrange(8), 255])
        path.write_bytes(damaged)
        try:
            found = usable(tmp_path)
        except InputError:
            detected += 1
            continue
        assert_same(found.content, content, f"byte {place}")
    assert detected > 300


def test_every_truncation_is_detected(tmp_path):
    save(tmp_path, 4)
    path = tmp_path / "model_000000004.pth"
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 41), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"got 1 that cannot \(checkpoint .*000004\.pth: it"):
            usable(tmp_path)


def test_a_part_that_calls_itself_a_folder_is_refused(tmp_path):
    """torch reads such a part as whatever its memory holds; the checksums of zip are right."""
    path = tmp_path / "a.pth"
    checkpoint.write(path, {"model": {"w": torch.arange(64.0)}})
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))
    whole[entry + 38] |= 0x10  # external attributes of a directory entry
    path.write_bytes(whole)
    with pytest.raises(InputError, match="one of its parts calls itself a folder"):
        checkpoint.read(path)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_the_checkpoint_before_a_damaged_one_is_used_and_named(tmp_path, caplog):
    save(tmp_path, 4, 8, 12)
    assert images_of_usable(tmp_path) == 12
    damage(tmp_path / "model_000000012.pth")
    (tmp_path / "model_000000008.pth").write_bytes(b"")
    assert images_of_usable(tmp_path) == 4
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 3
    assert "model_000000012.pth: it cannot be read (" in lines[0]
    assert "model_000000008.pth: it cannot be read" in lines[1]
    assert lines[2] == f"using {tmp_path / 'model_000000004.pth'} instead"


def test_a_missing_checkpoint_and_weights_alone_are_passed_over(tmp_path, caplog):
    trainer = save(tmp_path, 4, 8, 12)
    (tmp_path / "model_000000012.pth").unlink()
    checkpoint.write(tmp_path / "model_000000008.pth", {"model": trainer.detector.state_dict()})
    assert images_of_usable(tmp_path) == 4
    assert "model_000000012.pth: expected a file, got nothing there" in caplog.text
    assert "got a file without optimizer, images_seen, seed" in caplog.text


def test_without_a_usable_checkpoint_there_is_one_clear_line(tmp_path):
    save(tmp_path, 4, 8)
    for path in tmp_path.glob("model_*.pth"):
        damage(path)
    with pytest.raises(
        InputError,
        match=r"^checkpoints in .*: expected one that can be read, got 2 that cannot \(checkpoint "
        r".*model_000000008\.pth: it cannot be read .*\)\. Put a copy back, or remove last_",
    ):
        usable(tmp_path)


def test_a_run_that_was_set_back_does_not_go_forward(tmp_path, caplog):
    save(tmp_path, 4, 8, 12)
    (tmp_path / LAST).write_text("model_000000008.pth\n")
    damage(tmp_path / "model_000000008.pth")
    assert images_of_usable(tmp_path) == 4
    save(tmp_path, 8, keep=1)  # nor does it remove what it is about to write
    assert (tmp_path / LAST).read_text() == "model_000000008.pth\n"
    assert images_of_usable(tmp_path) == 8
    assert (tmp_path / "model_000000012.pth").exists()


@pytest.mark.slow
def test_all_processes_take_the_same(tmp_path):
    names = ["model_000000008.pth", "model_000000004.pth"]
    for count in (0, 1, 2):
        save(tmp_path, 4, 8)
        for name in names[:count]:
            damage(tmp_path / name)
        launch(folder_workers.report_usable, 2, args=(str(tmp_path),))
        first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in range(2))
        assert first == second
        if count < 2:
            assert first == f"{names[count]} {(8, 4)[count]}"
        else:
            assert "expected one that can be read, got 2 that cannot" in first


@pytest.mark.parametrize("text", ["", "\0\xff", "..", "model_000000099.pth\n"])
def test_a_damaged_pointer_leads_to_the_newest(tmp_path, text):
    save(tmp_path, 4, 8)
    (tmp_path / LAST).write_text(text, encoding="latin-1")
    assert images_of_usable(tmp_path) == 8


def test_no_pointer_is_no_run(tmp_path):
    assert usable(tmp_path) is None
    save(tmp_path, 4)
    (tmp_path / LAST).unlink()
    assert usable(tmp_path) is None


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    for name in ("model_final.pth", "model_000000016.pth"):
        damage(tmp_path / "run" / name)
    cfg = recipe(tmp_path / "run", checkpoint_every=8, eval_every=16)
    train(cfg, resume=True)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "model_final.pth: it cannot be read" in log
    assert "model_000000008.pth (8 images seen)" in log
    ours, theirs = (checkpoint.read(f / FINAL) for f in (tmp_path / "run", undisturbed))
    for key in ("model", "optimizer", "images_seen", "evaluations"):
        assert_same(ours[key], theirs[key], key)
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    damage(tmp_path / "run" / FINAL)
    assert evaluate(recipe(tmp_path / "run"), resume=True)["bbox"]["AP"] == 6.0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["checkpoint"].endswith("model_000000016.pth")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(recipe(folder, checkpoint_every=8, eval_every=16))
    return folder


# --- writing in the background -----------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """Checkpoints are written only once this is set."""
    opened, original = threading.Event(), checkpoint.write

    def write(*args, **options) -> None:
        assert opened.wait(60)
        original(*args, **options)

    monkeypatch.setattr(checkpoint, "write", write)
    yield opened
    opened.set()


def test_the_numbers_are_those_of_the_step_at_which_it_was_due(tmp_path, gate):
    trainer, writes = tiny_trainer(), hook(tmp_path, total_batch_size=1)
    expected = on_cpu(trainer.state_dict())
    writes.after_step(trainer)
    assert not (tmp_path / LAST).exists()  # the step did not wait
    for value in trainer.detector.parameters():
        value.data.fill_(7)
    for state in trainer.optimizer.state.values():
        for value in state.values():
            value.fill_(7)
    trainer.optimizer.param_groups[0]["lr"] = 7
    trainer.images_seen = 5
    writes.after_step(trainer)  # nothing due, nothing wrong
    gate.set()
    writes.wait()
    content = checkpoint.read(tmp_path / "model_000000004.pth")
    for key, value in expected.items():
        assert_same(content[key], value, key)
    assert (tmp_path / LAST).read_text() == "model_000000004.pth\n"
    writes.close()


def test_both_ways_of_writing_give_the_same_run(tmp_path):
    for name, background in (("a", True), ("b", False)):
        train(recipe(tmp_path / name, checkpoint_every=8, async_checkpoints=background))
    for path in sorted((tmp_path / "a").glob("model_*.pth")):
        ours, theirs = checkpoint.read(path), checkpoint.read(tmp_path / "b" / path.name)
        assert_same({**ours, "vitdet": 0}, {**theirs, "vitdet": 0}, path.name)


def test_an_error_of_the_thread_is_raised_after_the_next_step(tmp_path, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer, writes = tiny_trainer(), hook(tmp_path)
    writes.after_step(trainer)
    writes.wait()
    monkeypatch.setattr(torch, "save", full)
    trainer.images_seen = 8
    writes.after_step(trainer)
    futures.wait(writes.writer._jobs)
    trainer.images_seen = 9
    with pytest.raises(InputError, match=r"000008\.pth: it cannot be written .*No space left"):
        writes.after_step(trainer)
    trainer.images_seen = 12
    writes.after_step(trainer)
    with pytest.raises(InputError, match=r"000012\.pth: it cannot be written"):
        writes.wait()
    assert usable(tmp_path).path.name == "model_000000004.pth"
    assert list(tmp_path.glob(".*")) == []
    writes.close()


def test_an_error_at_the_end_is_raised_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(InputError, match=r"model_final\.pth: it cannot be written \(.*full"):
        train(recipe(tmp_path, num_images=4))
    assert not (tmp_path / LAST).exists()


def test_the_next_job_waits_and_a_failed_step_leaves_out_those_after_it():
    done = []

    def failing() -> None:
        raise InputError("no")

    writer = Writer(background=True)
    writer.submit(lambda: done.append(1), failing, lambda: done.append(2))
    with pytest.raises(InputError):
        writer.wait()
    writer.submit(lambda: done.append(3))
    writer.wait()
    assert done == [1, 3]
    writer.close()


def test_an_end_with_another_error_completes_and_reports_what_was_begun(tmp_path, gate, caplog):
    trainer, writes = tiny_trainer(), hook(tmp_path)
    writes.after_step(trainer)
    writes.submit(lambda: (_ for _ in ()).throw(InputError("the disk is full")))
    threading.Timer(0.2, gate.set).start()
    writes.close()
    assert images_seen_in(tmp_path) == 4
    assert "the disk is full" in caplog.text


def images_seen_in(folder: Path) -> int:
    return checkpoint.read(folder / (folder / LAST).read_text().strip())["images_seen"]


def test_a_copy_shares_nothing_with_the_state_and_keeps_what_is_shared_in_it():
    weight = torch.arange(6.0).view(2, 3)
    state = {
        "a": weight,
        "tied": weight.view(2, 3),
        "row": weight[1],
        "t": weight.t(),
        "n": (1, [2]),
    }
    copy = on_cpu(state)
    weight.fill_(-1)
    assert copy["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copy["row"].tolist() == [3, 4, 5]
    assert torch.equal(copy["t"], copy["a"].t())
    assert copy["tied"].data_ptr() == copy["a"].data_ptr()
    assert copy["n"] == (1, [2])


# --- which stay --------------------------------------------------------------------------------


def test_old_ones_go(tmp_path):
    save(tmp_path, 4, 8, 12, 16, keep=2)
    names = ["model_000000012.pth", "model_000000016.pth"]
    assert sorted(path.name for path in tmp_path.glob("model_*")) == names
    assert list(tmp_path.glob(".*")) == []


def test_the_best_is_a_second_name_that_outlives_the_first(tmp_path):
    writes, trainer, told = hook(tmp_path, keep=1, total_batch_size=1), tiny_trainer(), []
    writes.after_step(trainer)
    writes.keep_best(lambda: told.append((tmp_path / BEST).exists()))
    trainer.images_seen = 8
    trainer.detector.weight.data.fill_(8)
    writes.after_step(trainer)
    writes.wait()
    assert sorted(path.name for path in tmp_path.glob("model_*")) == [
        "model_000000008.pth",
        "model_best.pth",
    ]
    assert checkpoint.read(tmp_path / BEST)["images_seen"] == 4
    trainer.images_seen = 9  # no checkpoint is due here, but an evaluation has one before it
    trainer.detector.weight.data.fill_(9)
    writes.after_step(trainer)
    writes.ensure(trainer)
    writes.keep_best(lambda: told.append(checkpoint.read(tmp_path / BEST)["images_seen"]))
    writes.wait()
    assert told == [True, 9]
    assert (tmp_path / LAST).read_text() == "model_000000009.pth\n"
    writes.close()


def test_the_best_after_an_evaluation_that_was_cut_off_is_the_same(tmp_path, monkeypatch):
    """The evaluation is repeated, and its weights are those that lie on the disk."""
    options = {"checkpoint_every": 8, "eval_every": 8, "best_metric": "bbox/AP"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe(whole, **options))
    original = CountingEvaluator.evaluate

    def cut_off(self):
        monkeypatch.setattr(CountingEvaluator, "evaluate", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(CountingEvaluator, "evaluate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(parts, **options))
    train(recipe(parts, **options), resume=True)
    best, theirs = (checkpoint.read(folder / BEST) for folder in (parts, whole))
    assert best["images_seen"] == 8
    assert best.keys() == theirs.keys()
    for key in best.keys() - {"vitdet"}:
        assert_same(best[key], theirs[key], key)
