import errno
import random
import threading
from concurrent import futures

import pytest
import torch
from pair import in_pair
from ranks import report_usable
from test_run import assert_same

from vitdet import checkpoint
from vitdet.engine.checkpoints import BEST, LAST, Checkpoints, last_checkpoint, usable
from vitdet.engine.parallel import cpu_copy
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError


def tiny_trainer(images_seen=4, num_images=100):
    torch.manual_seed(0)
    detector = torch.nn.Linear(5, 3)
    trainer = Trainer(detector, torch.optim.AdamW(detector.parameters()), lambda _: 1.0)
    detector(torch.ones(1, 5)).sum().backward()
    trainer.optimizer.step()
    trainer.images_seen, trainer.num_images = images_seen, num_images
    return trainer


def hook(folder, **changes):
    options = {"every": 4, "keep": 3, "total_batch_size": 4, "note": {"class_names": ["a"]}}
    return Checkpoints(folder, **{**options, **changes})


def save(folder, *images, **changes):
    """Write checkpoints after so many images, each with other weights."""
    writes, trainer = hook(folder, **changes), tiny_trainer()
    for count in images:
        trainer.images_seen = count
        trainer.detector.weight.data.fill_(count)
        writes.after_step(trainer)
    writes.wait()
    writes.close()
    return trainer


def images_of_usable(folder):
    found = usable(folder)
    assert found is not None
    assert (found.content["model"]["weight"] == found.content["images_seen"]).all()
    return found.content["images_seen"]


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


# --- which can be used -------------------------------------------------------------------------


def test_damage_anywhere_is_detected_or_changes_nothing(tmp_path):
    save(tmp_path, 4)
    path = tmp_path / "model_000000004.pth"
    whole, content = path.read_bytes(), checkpoint.read(path)
    choose = random.Random(0)
    detected = 0
    for place in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[place] ^= choose.choice([1 << choose.randrange(8), 255])
        path.write_bytes(damaged)
        try:
            found = usable(tmp_path)
        except InputError:
            detected += 1
            continue
        assert_same(found.content, content, f"byte {place}")
    assert detected > 70
    for length in (*range(0, len(whole), 397), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"got 1 that cannot \(checkpoint .*000004\.pth: it"):
            usable(tmp_path)


def test_the_checkpoint_before_a_damaged_one_is_used_and_named(tmp_path, caplog):
    trainer = save(tmp_path, 4, 8, 12, 16, keep=9)
    assert images_of_usable(tmp_path) == 16
    (tmp_path / "model_000000016.pth").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "model_000000016.pth"
    checkpoint.write(tmp_path / "model_000000012.pth", {"model": trainer.detector.state_dict()})
    damage(tmp_path / "model_000000008.pth")
    assert images_of_usable(tmp_path) == 4
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for line, text in zip(
        lines,
        (
            "model_000000016.pth: expected a file, got nothing there",
            "model_000000012.pth: expected the state of a training, got a file without optimizer, "
            "images_seen, seed",
            "model_000000008.pth: it cannot be read (",
            f"using {tmp_path / 'model_000000004.pth'} instead",
        ),
        strict=True,
    ):
        assert text in line
    (tmp_path / "model_000000004.pth").write_bytes(b"")
    with pytest.raises(
        InputError,
        match=r"^checkpoints in .*: expected one that can be read, got 4 that cannot \(checkpoint "
        r".*model_000000016\.pth: expected a file.*\)\. Put a copy back, or remove last_",
    ):
        usable(tmp_path)


def test_a_run_that_was_set_back_does_not_remove_what_it_writes(tmp_path):
    save(tmp_path, 4, 8, 12)
    save(tmp_path, 8, keep=1)
    assert (tmp_path / LAST).read_text() == "model_000000008.pth\n"
    assert images_of_usable(tmp_path) == 8
    assert (tmp_path / "model_000000012.pth").exists()


@pytest.mark.slow
def test_all_processes_take_the_same(tmp_path):
    names = ["model_000000008.pth", "model_000000004.pth"]
    for count in (1, 2):
        save(tmp_path, 4, 8)
        for name in names[:count]:
            damage(tmp_path / name)
        in_pair(report_usable, str(tmp_path))
        first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in range(2))
        assert first == second
        expected = "model_000000004.pth 4" if count == 1 else "can be read, got 2 that cannot"
        assert expected in first


@pytest.mark.parametrize("text", ["", "\0\xff", "..", "model_000000099.pth\n", None])
def test_a_damaged_pointer_leads_to_the_newest(tmp_path, text):
    assert usable(tmp_path) is None
    save(tmp_path, 4, 8)
    if text is None:  # no pointer, no run
        (tmp_path / LAST).unlink()
        assert usable(tmp_path) is None
        return
    (tmp_path / LAST).write_text(text, encoding="latin-1")
    assert images_of_usable(tmp_path) == 8


# --- writing in the background -----------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch):
    """Checkpoints are written only once this is set."""
    opened, original = threading.Event(), checkpoint.write

    def write(*args):
        assert opened.wait(60)
        original(*args)

    monkeypatch.setattr(checkpoint, "write", write)
    yield opened
    opened.set()


def test_the_numbers_are_those_of_the_step_at_which_it_was_due(tmp_path, gate):
    trainer, writes = tiny_trainer(), hook(tmp_path, total_batch_size=1)
    expected = cpu_copy(trainer.state_dict())
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


def test_an_error_of_the_thread_is_raised_after_the_next_step(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer, writes = tiny_trainer(), hook(tmp_path)
    writes.after_step(trainer)
    writes.wait()
    monkeypatch.setattr(torch, "save", full)
    trainer.images_seen = 8
    writes.after_step(trainer)
    futures.wait(writes._jobs)
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


def test_an_end_with_another_error_completes_and_reports_what_was_begun(
    tmp_path, gate, caplog, monkeypatch
):
    trainer, writes = tiny_trainer(), hook(tmp_path, total_batch_size=1)
    writes.after_step(trainer)
    monkeypatch.setattr("vitdet.engine.checkpoints.link_or_copy", lambda *_: 1 / 0)
    writes.keep_best()
    gate.set()
    writes.close()
    assert checkpoint.read(last_checkpoint(tmp_path))["images_seen"] == 4
    assert "division by zero" in caplog.text


def test_a_copy_shares_nothing_with_the_state_and_keeps_what_is_shared_in_it():
    weight = torch.arange(6.0).view(2, 3)
    state = {"a": weight, "tied": weight.view(2, 3), "row": weight[1], "t": weight.t()}
    copy = cpu_copy({**state, "n": (1, [2])})
    weight.fill_(-1)
    assert copy["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copy["row"].tolist() == [3, 4, 5]
    assert torch.equal(copy["t"], copy["a"].t())
    assert copy["tied"].data_ptr() == copy["a"].data_ptr()
    assert copy["n"] == (1, [2])


# --- which stay --------------------------------------------------------------------------------


def test_old_ones_go_and_the_best_stays(tmp_path):
    writes, trainer = hook(tmp_path, keep=1, total_batch_size=1), tiny_trainer()
    writes.after_step(trainer)
    writes.keep_best()  # a second name, which outlives the first
    trainer.images_seen = 8
    writes.after_step(trainer)
    writes.wait()
    names = ["model_000000008.pth", "model_best.pth"]
    assert sorted(path.name for path in tmp_path.glob("model_*")) == names
    assert checkpoint.read(tmp_path / BEST)["images_seen"] == 4
    trainer.images_seen = 9  # no checkpoint is due here, but an evaluation has one before it
    writes.after_step(trainer)
    writes.ensure(trainer)
    writes.keep_best()
    writes.wait()
    assert checkpoint.read(tmp_path / BEST)["images_seen"] == 9
    assert (tmp_path / LAST).read_text() == "model_000000009.pth\n"
    writes.close()
