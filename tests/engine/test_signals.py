from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_kill import PATIENCE, Runs, born, check_folder, runs, shapes  # noqa: F401 (fixtures)
from test_launch import environment
from test_run import assert_same
from test_train_net import command
from tiny_recipe import write_recipe

from vitdet.engine.checkpoints import BEST, FINAL, LAST, last_checkpoint, read_state, usable
from vitdet.engine.signals import PREEMPTED_STATUS, Notice, Preempted, Preemption, noticed
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import INPUT_ERROR_STATUS, INTERRUPTED_STATUS


def test_signals_only_leave_a_notice_within_the_block():
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    for each in (signal.SIGTERM, signal.SIGUSR1):
        with noticed() as notice:
            assert notice.signal is None
            signal.raise_signal(each)
            assert notice.signal is each
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_other_threads_leave_signals_alone():
    seen = []

    def enter() -> None:
        with noticed() as notice:
            seen.append((notice.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, signal.getsignal(signal.SIGTERM))]


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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_signals_to_the_whole_group_save_and_leave(runs, tmp_path, shapes):  # noqa: F811
    """Reading processes get them too, and go on reading until the trainer has saved."""
    runs.options = {"checkpoint_every": 0}  # only what a signal makes
    reached = 0
    for each in (signal.SIGTERM, signal.SIGUSR1):
        process = runs.start()
        runs.wait_for(process, 2)
        runs.note_helpers(process)
        os.killpg(process.pid, each)
        process.join()
        assert process.exitcode == PREEMPTED_STATUS
        before, reached = reached, check_folder(runs.folder, 0)
        assert reached >= before + 4
        log = (runs.folder / "log.txt").read_text()
        assert f"{each.name} after {reached} images: saved model_{reached:09d}.pth" in log
        assert f"model_{before:09d}.pth ({before} images seen)" in log or not before
    undisturbed = Runs(tmp_path / "undisturbed", shapes)
    for folder in (runs, undisturbed):
        process = folder.start(num_images=reached + 4)
        process.join()
        assert process.exitcode == 0
    for name in (FINAL, BEST):
        ours, theirs = (read_state(each.folder / name) for each in (runs, undisturbed))
        for key in ours.keys() - {"vitdet"}:
            assert_same(ours[key], theirs[key], f"{name} {key}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_of_two_processes_ends_both(tmp_path, sent):
    """SIGTERM makes them save; one that is killed leaves what was saved before."""
    out = tmp_path / "out"
    every = 0 if sent is signal.SIGTERM else 4
    options = {"num_images": 100_000, "log_every": 1, "checkpoint_every": every}
    config = write_recipe(tmp_path / "recipe.yaml", out, **options)
    awaited = out / ("metrics.json" if every == 0 else LAST)
    running = subprocess.Popen(
        command("--config-file", config, "--num-gpus", 2),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 4 * PATIENCE
        while not awaited.exists() or not awaited.read_text():
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(trainers(running.pid)[1], sent)
        errors = running.communicate(timeout=2 * PATIENCE)[1]
    finally:
        running.kill()
        running.wait()
    found = usable(out)
    assert found is not None
    images = found.content["images_seen"]
    if sent is signal.SIGKILL:
        assert running.returncode == 2, errors
        assert "error: process 1: expected to end normally, got SIGKILL" in errors
        assert images > 0
        return
    assert running.returncode == PREEMPTED_STATUS, errors
    assert "Traceback" not in errors
    last = last_checkpoint(out)
    assert last == found.path
    assert last.name == f"model_{images:09d}.pth"
    assert f"after {images} images: saved {last.name}, leaving" in (out / "log.txt").read_text()


def trainers(launcher: int) -> list[int]:
    """Process ids that a launcher started to train, in the order of their ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return sorted(pid for pid, line in lines.items() if "spawn_main" in line)


def test_the_help_names_the_statuses():
    shown = subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout
    words = " ".join(shown.split())
    for status, meaning in (
        (0, "done"),
        (INPUT_ERROR_STATUS, "something to repair"),
        (PREEMPTED_STATUS, "told to leave (SIGTERM, SIGUSR1)"),
        (INTERRUPTED_STATUS, "interrupted (^C; the first one saves too)"),
    ):
        assert f" {status} {meaning}" in words


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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_helpers_outlive_signals_but_not_their_parent(tmp_path, method):
    """A fork server is the parent that the system names, and it lives as long as its helpers."""
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "helping.py").write_text(HELPING)
    line = [sys.executable, str(tmp_path / "parent.py"), method]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + PATIENCE
    while any(map(born, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(born, pids))
