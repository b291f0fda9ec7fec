"""Processes of a run: started, ended, told to end; by `launch`, the command line and torchrun."""

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import ranks
import torch
from detectron2.config import LazyCall as L
from pair import (
    PATIENCE,
    PROJECT,
    born,
    children,
    environment,
    fork_server,
    in_pair,
    wait_until,
)
from tiny_recipe import own_recipe, recipe, rectangles, write_recipe

from vitdet import checkpoint
from vitdet.engine.checkpoints import last_checkpoint, usable
from vitdet.engine.launch import launch
from vitdet.utils.checks import INTERRUPTED_STATUS, PREEMPTED_STATUS, InputError


def test_one_process_runs_here_and_returns():
    assert launch(max, 1, args=(3, 4)) == 4
    assert launch(max, 0, args=(3, 4)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4,), r"--num-gpus: expected 0 to 2, the GPUs of this machine, got 4"),
        ((1, 2, 2, "tcp://localhost:1"), r"--machine-rank: expected 0 to 1 for --num-machines 2"),
        ((1, 2, 0, "auto"), r"--dist-url: expected tcp://HOST:PORT of machine 0, got auto"),
    ],
)
def test_wrong_arguments_are_named(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=message):
        launch(max, *arguments, args=(3, 4))


def test_processes_that_do_not_come_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr("vitdet.engine.launch.TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr("vitdet.engine.launch._is_first", lambda *_: True)
    place = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as ended:
        launch(max, args=(3, 4))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: start of the run at 127.0.0.1, port 1: expected all processes, got:"
    )
    assert said.count("\n") == 1


# --- two processes of `launch` -------------------------------------------------------------------


ENDS = {
    "error": (2, "error: image x.jpg: expected a JPEG, got text. Remove it.\n"),
    "kill": (2, "error: process 1: expected to end normally, got SIGKILL. SIGKILL often means"),
    "bug": (1, "ZeroDivisionError: a bug\n"),
    "kill the launcher": (-signal.SIGKILL, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_when_one_process_ends_all_do(tmp_path, how):
    """With the status and the line of the one that ended first."""
    said, status = tmp_path / "said", ENDS[how][0]
    words = (ranks.end_in, (how, str(tmp_path)), str(said))
    launcher = fork_server().Process(target=ranks.launched, args=words)
    launcher.start()
    launcher.join(PATIENCE)
    assert launcher.exitcode == status
    assert ENDS[how][1] in said.read_text()
    assert said.read_text().count("\n") == bool(ENDS[how][1]) or how == "bug"
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    wait_until(lambda: not any(map(born, pids)))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_both_processes(tmp_path, sent):
    """SIGTERM comes to the launcher, ^C to all: they save. One that is killed leaves the last."""
    out, said = tmp_path / "out", tmp_path / "said"
    every = 4 if sent is signal.SIGKILL else 0
    options = {"num_images": 100_000, "log_every": 1, "checkpoint_every": every}
    words = (ranks.train_config, (recipe(out, **options),), str(said))
    launcher = fork_server().Process(target=ranks.launched, args=words)
    launcher.start()
    awaited = out / ("last_checkpoint" if every else "metrics.json")
    wait_until(lambda: awaited.exists() and awaited.read_text(), launcher.is_alive)
    if sent is signal.SIGINT:
        os.killpg(launcher.pid, sent)
    else:
        os.kill(children(launcher.pid)[1] if every else launcher.pid, sent)
    launcher.join(PATIENCE)
    found = usable(out)
    images = found.content["images_seen"]
    if sent is signal.SIGKILL:
        assert launcher.exitcode == 2
        assert "error: process 1: expected to end normally, got SIGKILL" in said.read_text()
        assert images > 0
        return
    expected = INTERRUPTED_STATUS if sent is signal.SIGINT else PREEMPTED_STATUS
    assert launcher.exitcode == expected
    assert said.read_text() == ""  # the run has said it, once
    left = f"after {images} images: saved {found.path.name}, leaving with status {expected}"
    assert left in (out / "log.txt").read_text()


# --- torchrun ------------------------------------------------------------------------------------


def torchrun(config, *arguments, restarts):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(PROJECT / "train_net.py"), "--config-file", str(config), *arguments]
    words = [sys.executable, *start, "--max-restarts", str(restarts), *script]
    return subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(out, process):
    metrics = out / "metrics.json"
    wait_until(lambda: metrics.exists() and metrics.read_text(), lambda: process.poll() is None)


def mortal(folder, dies_at):
    """A recipe whose rank 1 is killed once; there is a checkpoint after 8 images."""
    folder.mkdir()
    options = {"checkpoint_every": 8, "ema_decay": 0.9}
    cfg = recipe(folder / "out", **options)
    cfg.dataloader.train = L(ranks.MortalLoader)(
        dataset=L(rectangles)(), total_batch_size=4, folder=str(folder), dies_at=dies_at, seed=3
    )
    return cfg


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_nothing_is_lost(tmp_path):
    """The weights are those of two processes that nobody disturbed, and no torchrun started."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with torchrun(own_recipe(mortal(killed, 12), killed / "recipe.yaml"), restarts=2) as agent:
        errors = agent.communicate(timeout=2 * PATIENCE)[1]
    assert agent.returncode == 0, errors
    assert (killed / "struck").exists()
    assert "model_000000008.pth (8 images seen)" in (killed / "out/log.txt").read_text()
    in_pair(ranks.train_config, mortal(whole, -1))
    ours, theirs = (checkpoint.read(each / "out/model_final.pth") for each in (killed, whole))
    for part in ("model", "ema_state"):
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), name
    pids = [int(each.name.removeprefix("pid")) for each in killed.glob("pid*")]
    assert len(pids) == 4
    assert not any(map(born, pids))


@pytest.mark.slow
def test_a_wrong_input_is_said_once_however_many_restarts_are_left(tmp_path):
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    with torchrun(config, "dataloader.train.total_batch_size=3", restarts=2) as agent:
        errors = agent.communicate(timeout=2 * PATIENCE)[1]
    assert agent.returncode != 0
    (line,) = [line for line in errors.splitlines() if "total_batch_size" in line]
    assert line.startswith(
        "error: dataloader.train.total_batch_size: expected a multiple of the 2 processes, got 3."
    )
    assert "InputError" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("to", ["a worker", "torchrun"])
def test_a_signal_under_torchrun_saves_and_ends_the_run(tmp_path, to):
    """A restart would go on training where the machine is taken away; an orphan would, too."""
    out = tmp_path / "out"
    options = {"num_images": 100_000, "log_every": 1, "checkpoint_every": 0}
    config = write_recipe(tmp_path / "recipe.yaml", out, **options)
    with torchrun(config, "--resume", restarts=3) as agent:
        try:
            wait_for_steps(out, agent)
            workers = {pid: born(pid) for pid in children(agent.pid)}
            os.kill(min(workers) if to == "a worker" else agent.pid, signal.SIGUSR1)
            agent.communicate(timeout=2 * PATIENCE)
        finally:
            agent.kill()
    wait_until(lambda: not any(born(pid) == start for pid, start in workers.items()))
    assert agent.returncode != 0
    log, last = (out / "log.txt").read_text(), last_checkpoint(out)
    images = checkpoint.read(last)["images_seen"]
    assert f"after {images} images: saved {last.name}, leaving with status 75" in log
    assert log.count("starting from random weights") == 1  # it was not started again
    assert "(4 images seen)" not in log
