"""What a process makes of signals, and of a step that does not end."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from killing import born, wait_until
from pair import fork_server

from vitdet.engine.log import logging_to
from vitdet.engine.signals import PREEMPTED_STATUS, Notice, Preempted, Preemption, noticed
from vitdet.engine.trainer import Trainer
from vitdet.utils.signals import hold_back, serve_parent


def test_signals_only_leave_a_notice_within_the_block():
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    for each in (signal.SIGTERM, signal.SIGUSR1):
        with noticed() as notice:
            assert notice.signal is None
            signal.raise_signal(each)
            assert notice.signal is each
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == before
    seen = []

    def enter() -> None:  # other threads leave signals alone
        with noticed() as notice:
            seen.append((notice.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before[0])]


def trainer_at(images_seen: int, num_images: int) -> Trainer:
    detector = torch.nn.Linear(1, 1)
    trainer = Trainer(detector, torch.optim.SGD(detector.parameters(), lr=1.0), lambda _: 1.0)
    trainer.images_seen, trainer.num_images = images_seen, num_images
    return trainer


def test_the_hook_saves_and_leaves(caplog):
    saved, notice = [], Notice()

    def save(trainer: Trainer) -> Path:
        saved.append(trainer.images_seen)
        return Path("x/model_000000004.pth")

    hook = Preemption(notice, save)
    hook.after_step(trainer_at(4, 8))
    hook.after_train(trainer_at(8, 8))
    notice.take(signal.SIGUSR1, None)
    hook.after_step(trainer_at(8, 8))  # the end saves by itself
    assert saved == []
    with caplog.at_level("INFO"), pytest.raises(Preempted) as caught:
        hook.after_step(trainer_at(4, 8))
    assert saved == [4]
    assert caught.value.code == PREEMPTED_STATUS == 75
    said = (
        "SIGUSR1 after 4 images: saved model_000000004.pth, leaving with status 75; --resume goes"
    )
    assert str(caught.value).startswith(said)
    assert said in caplog.text
    with pytest.raises(Preempted, match="SIGUSR1 after 8 images: saved the last checkpoint"):
        hook.after_train(trainer_at(8, 8))


# --- processes that work for another one ---------------------------------------------------------

PARENT = """
import multiprocessing, os, signal, subprocess, sys, time
import helping
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ready = context.Event()
    helpers = [context.Process(target=helping.help, args=(ready,)) for _ in range(3)]
    for helper in helpers:
        helper.daemon = True
        helper.start()
        assert ready.wait(60)
        ready.clear()
        for each in (signal.SIGUSR1, signal.SIGINT):
            os.kill(helper.pid, each)
    # these are told by another process, as by a scheduler; the last one by this one
    told = "import os, sys; [os.kill(int(pid), 15) for pid in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", told, *(str(helper.pid) for helper in helpers)])
    helpers[2].terminate()
    helpers[2].join()
    time.sleep(0.2)
    print(*(helper.pid for helper in helpers if helper.is_alive()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
HELPING = """
import time
from vitdet.utils.signals import serve_parent
def help(ready):
    serve_parent()
    ready.set()
    time.sleep(3600)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_helpers_outlive_signals_but_not_their_parent(tmp_path, method):
    """A fork server is the parent that the system names, and it lives as long as its helpers."""
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "helping.py").write_text(HELPING)
    line = [sys.executable, str(tmp_path / "parent.py"), method]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(born, pids)))


def work(ready: Any, ended: Any) -> None:
    """Start a thread as the import of a BLAS does, serve the parent, and go on until told."""
    threading.Thread(target=ended.wait, daemon=True).start()
    serve_parent()
    ready.set()
    ended.wait()


def test_a_thread_of_an_import_does_not_swallow_the_signal():
    context: Any = multiprocessing.get_context("fork")
    ready, ended = context.Event(), context.Event()
    with hold_back():
        worker = context.Process(target=work, args=(ready, ended), daemon=True)
        worker.start()
    assert ready.wait(60)
    worker.terminate()
    worker.join(20)
    alive = worker.is_alive()
    worker.kill()
    assert not alive
    assert worker.exitcode == 0


# --- a step that does not end, a terminal that takes nothing more --------------------------------


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_a_step_that_does_not_end_is_a_line_and_a_status(tmp_path, seconds):
    path, said = tmp_path / "stuck_rank0.txt", tmp_path / "said"
    words = (str(tmp_path), seconds, str(said))
    process = fork_server().Process(target=ranks.stuck, args=words)
    process.start()
    process.join(100)
    if not seconds:
        assert (process.exitcode, said.read_text()) == (0, "")
        assert not path.exists()
        return
    assert process.exitcode == 2
    assert said.read_text() == (
        f"error: training: expected the end of a step within 1.5 s, got none. The stacks of rank 0 "
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
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "one",
        "two",
    ]
