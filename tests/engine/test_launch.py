from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import parallel_workers
import pytest
import torch
import torch.multiprocessing as mp
import workers
from tiny_recipe import write_recipe

from vitdet import checkpoint
from vitdet.engine.launch import PREEMPTED_STATUS, launch
from vitdet.utils.checks import InputError
from vitdet.utils.signals import PREEMPTION

PROJECT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """The environment of a new python that finds the tiny recipe."""
    paths = [str(PROJECT), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def alive(pid_file: Path) -> bool:
    return Path(f"/proc/{pid_file.read_text()}").exists()


def test_one_process_runs_here_and_returns():
    assert launch(max, 1, args=(3, 4)) == 4
    assert launch(max, 0, args=(3, 4)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), r"--num-gpus: expected 0 to 0, .*got -1"),
        ((1, 2, 2, "tcp://localhost:1"), r"--machine-rank: expected 0 to 1 for --num-machines 2"),
        ((1, 2, 0, "auto"), r"--dist-url: expected tcp://HOST:PORT of machine 0, got auto"),
        ((1, 2, 0, "file:///x"), r"--dist-url: expected tcp://HOST:PORT of machine 0, got file:"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="texts of a machine without a GPU")
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        launch(max, *arguments, args=(3, 4))


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"--num-gpus: expected 0 to 2, the GPUs .* got 4\. Lower"):
        launch(max, 4, args=(3, 4))


@pytest.mark.slow
def test_two_processes_know_each_other(tmp_path):
    launch(workers.report_ranks, 2, args=(str(tmp_path),))
    texts = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert texts == ["2 [(0, 0), (1, 1)]"] * 2


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(tmp_path):
    """Same total batch, five steps of AdamW."""
    one, two = tmp_path / "one", tmp_path / "two"
    workers.train_even_batches(str(one), checkpoint_every=8)
    launch(workers.train_even_batches, 2, args=(str(two),))
    first = checkpoint.read(one / "model_000000008.pth")["model"]
    ours = checkpoint.read(one / "model_final.pth")
    theirs = checkpoint.read(two / "model_final.pth")
    assert ours["images_seen"] == theirs["images_seen"] == 40
    moved = [(ours["model"][name] - first[name]).abs().max().item() for name in first]
    assert max(moved) > 1e-3  # the steps are large against the difference below
    for name, weight in ours["model"].items():
        torch.testing.assert_close(theirs["model"][name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_recomputed_blocks_change_nothing_in_two_processes(tmp_path):
    """Stochastic depth draws the same numbers again when a block is computed once more."""
    launch(parallel_workers.recomputed, 2, args=(str(tmp_path),))
    kept, recomputed, still = (
        checkpoint.read(tmp_path / name / "model_final.pth")["model"]
        for name in ("kept", "recomputed", "without_depth")
    )
    assert all(torch.equal(recomputed[name], weight) for name, weight in kept.items())
    assert any(not torch.equal(still[name], weight) for name, weight in kept.items())


@pytest.mark.slow
def test_an_input_error_of_a_process_is_that_of_the_launch(tmp_path):
    with pytest.raises(
        InputError, match=r"^image x\.jpg: expected a JPEG, got text\. Remove it\.$"
    ):
        launch(workers.fail_on_rank_1, 2, args=(str(tmp_path),))
    assert not any(alive(tmp_path / f"pid{rank}") for rank in range(2))


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path):
    with pytest.raises(
        InputError, match=r"process 1: expected to end normally, got SIGKILL\. SIGKILL often means"
    ):
        launch(workers.die_on_rank_1, 2, args=(str(tmp_path),))
    assert not any(alive(tmp_path / f"pid{rank}") for rank in range(2))


@pytest.mark.slow
def test_no_process_outlives_the_launcher(tmp_path):
    start = f"launch(workers.kill_the_launcher, 2, args=({str(tmp_path)!r},))"
    script = tmp_path / "start.py"
    script.write_text(
        "import workers\nfrom vitdet.engine.launch import launch\n"
        f"if __name__ == '__main__':\n    {start}\n"
    )
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, env=environment(), capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    pids = [tmp_path / f"pid{rank}" for rank in range(2)]
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.slow
def test_a_signal_of_the_scheduler_reaches_every_process(tmp_path):
    with pytest.raises(SystemExit) as ended:
        launch(parallel_workers.leave_when_told, 2, args=(str(tmp_path),))
    assert ended.value.code == PREEMPTED_STATUS == 75
    assert all((tmp_path / f"left{rank}").exists() for rank in range(2))
    assert not any(alive(tmp_path / f"pid{rank}") for rank in range(2))
    # those that a scheduler repeats meanwhile do not change the status
    for each in PREEMPTION:
        assert signal.signal(each, signal.SIG_DFL) == signal.SIG_IGN


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(tmp_path):
    with pytest.raises(mp.ProcessRaisedException, match=r"crash_on_rank_0[\s\S]*a bug"):
        launch(workers.crash_on_rank_0, 2, args=(str(tmp_path),))


@pytest.mark.slow
def test_torchrun_and_num_gpus_give_the_same_weights(tmp_path):
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out", num_images=8)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    common = [str(PROJECT / "train_net.py"), "--config-file", str(config)]
    commands = {
        "torchrun": [*torchrun, *common],
        "flag": [*common, "--num-gpus", "2"],
    }
    weights = {}
    for name, command in commands.items():
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, *command, f"train.output_dir={out}"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        weights[name] = checkpoint.read(out / "model_final.pth")["model"]
    assert "no GPU: 2 processes on the CPU (gloo)" in done.stdout
    for name, weight in weights["flag"].items():
        assert torch.equal(weights["torchrun"][name], weight), name
