from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import killing
import pytest
from test_launch import environment
from test_run import assert_same, numbers

from vitdet import checkpoint
from vitdet.engine.checkpoints import BEST, FINAL, LAST, read_state

PATIENCE = 300.0  # seconds for what takes one on an idle machine


class Runs:
    """Processes that train in a folder, forked where everything is imported already."""

    def __init__(self, folder: Path, shapes: Path) -> None:
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["killing"])
        self.folder, self.shapes = folder, shapes
        self.options: dict[str, Any] = {}  # of `train`
        self.start_seconds = 1.0  # until the first step, of the last process that took one
        self.helpers: set[tuple[int, str]] = set()  # process id and start time

    def start(self, **options: Any) -> BaseProcess:
        self.told = self.context.RawArray("i", 2)
        options = {**self.options, **options}
        arguments = (str(self.folder), str(self.shapes), self.told, options)
        process = self.context.Process(target=killing.run, args=arguments)
        process.start()
        self.started = time.monotonic()
        return process

    @property
    def steps(self) -> int:
        """Steps of the last process."""
        return self.told[0]

    def wait_for(self, process: BaseProcess, steps: int, flushes: int = 0) -> None:
        """Wait for steps of a process, then for so many parts of what it writes."""
        deadline = time.monotonic() + PATIENCE
        for which, count in ((0, steps), (1, flushes)):
            goal = which * self.told[which] + count
            while self.told[which] < goal:
                assert process.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.0005)

    def note_helpers(self, process: BaseProcess) -> None:
        """Remember the reading processes."""
        with contextlib.suppress(FileNotFoundError):
            listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            self.helpers |= {(int(pid), born(int(pid))) for pid in listed.split()}

    def left(self) -> list[int]:
        """Reading processes that are still there."""
        return [pid for pid, start in self.helpers if start and born(pid) == start]


def born(pid: int) -> str:
    """Start time of a process that lives, in clock ticks; "" for none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def runs(tmp_path, shapes, monkeypatch) -> Iterator[Runs]:
    for name, value in environment().items():  # the fork server finds modules by it alone
        monkeypatch.setenv(name, value)
    found = Runs(tmp_path / "run", shapes)
    yield found
    deadline = time.monotonic() + PATIENCE
    while found.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found.left() == []  # no orphan


def check_folder(folder: Path, pid: int | None) -> int:
    """Everything that is there is whole; return the images of the last checkpoint.

    Half-written files may only be those of process `pid`; of any for None.
    """
    for path in folder.glob("model_*.pth"):
        content = read_state(path)
        assert path.stem in (f"model_{content['images_seen']:09d}", "model_best", "model_final")
    partial = [path.name for path in folder.glob(".*")]
    assert pid is None or all(name.endswith(f".{pid}.partial") for name in partial), partial
    if not (folder / LAST).exists():
        return 0
    return checkpoint.read(folder / (folder / LAST).read_text().strip())["images_seen"]


def kill_at(runs: Runs, process: BaseProcess, moment: str, choose: random.Random) -> None:
    """Wait for a random moment of a kind, and kill."""
    if moment == "start":
        process.join(choose.random() * runs.start_seconds)
    else:
        runs.wait_for(process, 1)
        runs.start_seconds = time.monotonic() - runs.started
        flushes = choose.randint(1, 8) if moment == "write" else 0
        runs.wait_for(process, choose.randint(1, 2), flushes)
        time.sleep(choose.random() * (0.005 if flushes else 0.1))
    runs.note_helpers(process)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [15, pytest.param(100, marks=pytest.mark.nightly)])
def test_kills_at_any_moment_change_nothing(runs, tmp_path, shapes, kills):
    choose, reached, images = random.Random(0), Counter[str](), 0
    for _ in range(kills):
        process = runs.start()
        moment = choose.choices(["start", "step", "write"], [2, 4, 4])[0]
        kill_at(runs, process, moment, choose)
        assert process.exitcode == -signal.SIGKILL
        reached[moment] += 1
        if not runs.folder.exists():
            continue
        reached["in the middle of a file"] += any(runs.folder.glob(".*.partial"))
        # what processes before this one left is gone once it is under way
        before, images = images, check_folder(runs.folder, process.pid if runs.steps else None)
        # nothing that was on the disk is lost, and with the process only what was not yet there
        assert images >= before + 2 * max(runs.steps - 2, 0)
    print(dict(reached), f"{images} images before the last process")
    assert min(reached[moment] for moment in ("start", "step", "write")) > kills // 20

    options = {"num_images": images + 10}
    undisturbed = Runs(tmp_path / "undisturbed", shapes)
    for each in (runs, undisturbed):
        process = each.start(**options)
        process.join()
        assert process.exitcode == 0
        assert check_folder(each.folder, 0) == images + 10
    for name in (FINAL, BEST):
        ours, theirs = (read_state(each.folder / name) for each in (runs, undisturbed))
        for key in ours.keys() - {"vitdet"}:
            assert_same(ours[key], theirs[key], f"{name} {key}")
    records = [
        {line["images_seen"]: line for line in numbers(each.folder) if "bbox/AP" in line}
        for each in (runs, undisturbed)
    ]
    assert records[0] == records[1]
