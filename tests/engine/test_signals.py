"""What a process makes of signals, and of a step that does not end."""

import logging
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import ranks
import torch
from pair import born, fork_server, wait_until

from vitdet.engine.log import logging_to
from vitdet.engine.signals import Preempted, Signals
from vitdet.engine.trainer import Trainer

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)


def test_signals_only_leave_a_notice_within_the_block():
    before = [signal.getsignal(each) for each in NUMBERS]
    for each in NUMBERS:
        with Signals() as signals:
            assert signals.signal is None
            signal.raise_signal(each)
            assert signals.signal is each
    assert [signal.getsignal(each) for each in NUMBERS] == before
    seen = []

    def enter():  # other threads leave signals alone
        with Signals() as signals:
            seen.append((signals.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before[0])]


def trainer_at(images_seen, num_images):
    detector = torch.nn.Linear(1, 1)
    trainer = Trainer(detector, torch.optim.SGD(detector.parameters(), lr=1.0), lambda _: 1.0)
    trainer.images_seen, trainer.num_images = images_seen, num_images
    return trainer


def test_the_hook_saves_and_leaves(caplog):
    saved = []

    def save(trainer):
        saved.append(trainer.images_seen)
        return Path("x/model_000000004.pth")

    with pytest.raises(KeyboardInterrupt), Signals():
        signal.raise_signal(signal.SIGINT)  # nothing to save yet
    hook = Signals()
    hook.save = save
    hook.after_step(trainer_at(4, 8))
    hook.after_train(trainer_at(8, 8))
    hook.take(signal.SIGUSR1, None)
    hook.after_step(trainer_at(8, 8))  # the end saves by itself
    assert saved == []
    with caplog.at_level("INFO"), pytest.raises(Preempted) as caught, hook:
        hook.after_step(trainer_at(4, 8))
    assert (saved, caught.value.code) == ([4], 75)
    said = "SIGUSR1 after 4 images: saved model_000000004.pth, leaving with status 75; the same com"
    assert str(caught.value).startswith(said)
    assert said in caplog.text
    assert {signal.getsignal(each) for each in NUMBERS} == {signal.SIG_IGN}  # they are repeated
    with pytest.raises(Preempted, match="SIGUSR1 after 8 images: saved the last checkpoint"):
        hook.after_train(trainer_at(8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_helpers_outlive_signals_but_not_their_parent(tmp_path, method):
    """A fork server is the parent that the system names, and it lives as long as its helpers."""
    told = tmp_path / "told"
    parent = fork_server().Process(target=ranks.parent_of_helpers, args=(method, str(told)))
    parent.start()
    parent.join()
    pid, status = told.read_text().split()
    assert (parent.exitcode, status) == (-signal.SIGKILL, "0")
    wait_until(lambda: not born(int(pid)))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_a_step_that_does_not_end_is_a_line_and_a_status(tmp_path, seconds):
    path, said = tmp_path / "stuck_rank0.txt", tmp_path / "said"
    words = (str(tmp_path), seconds, str(said))
    process = fork_server().Process(target=ranks.stuck, args=words)
    process.start()
    process.join()
    if not seconds:
        assert (process.exitcode, said.read_text()) == (0, "")
        assert not path.exists()
        return
    assert process.exitcode == 2
    assert said.read_text() == (
        f"error: training: expected the end of a step within 0.5 s, got none. The stacks of rank 0 "
        f"are in {path}: they say what it waits for. If it only needs longer, raise "
        "train.step_timeout.\n"
    )
    assert "in batches" in path.read_text()


def test_a_full_terminal_does_not_end_a_run(tmp_path, monkeypatch, capfd):
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115  closing it fails, too
    monkeypatch.setattr(sys, "stdout", full)
    with logging_to() as log_to:
        log_to(tmp_path / "log.txt")
        for line in ("one", "two"):
            logging.getLogger("vitdet.anything").info(line)
    monkeypatch.undo()
    with suppress(OSError):
        full.close()
    assert capfd.readouterr().err == ""
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["one", "two"]
