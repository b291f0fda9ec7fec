"""Runs that are killed, or told to leave, at any moment end as one that nobody disturbed."""

import contextlib
import os
import random
import signal
import time
from collections import Counter

import pytest
import ranks
from pair import born, children, fork_server, wait_until
from test_run import assert_same, numbers

from vitdet import checkpoint
from vitdet.engine.checkpoints import BEST, FINAL, LAST, read_state
from vitdet.utils.checks import PREEMPTED_STATUS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


class Runs:
    """Processes that train in a folder."""

    def __init__(self, folder, shapes, **options):
        self.folder, self.shapes, self.options = folder, shapes, options
        self.start_seconds = 1.0  # until the first step, of the last process that took one
        self.helpers = set()  # process id and start time

    def start(self, **options):
        self.told = fork_server().RawArray("i", 2)
        arguments = (str(self.folder), str(self.shapes), self.told, {**self.options, **options})
        process = fork_server().Process(target=ranks.train_counted, args=arguments)
        process.start()
        self.started = time.monotonic()
        return process

    @property
    def steps(self):
        """Steps of the last process."""
        return self.told[0]

    def wait_for(self, process, steps, flushes=0):
        """Wait for steps of a process, then for so many parts of what it writes."""
        for which, count in ((0, steps), (1, flushes)):
            goal = which * self.told[which] + count
            wait_until(lambda w=which, g=goal: self.told[w] >= g, process.is_alive, 0.0005)

    def note_helpers(self, process):
        """Remember the reading processes."""
        with contextlib.suppress(FileNotFoundError):
            self.helpers |= {(pid, born(pid)) for pid in children(process.pid)}

    def left(self):
        """Reading processes that are still there."""
        return [pid for pid, start in self.helpers if start and born(pid) == start]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def runs(tmp_path, shapes):
    found = Runs(tmp_path / "run", shapes)
    yield found
    wait_until(lambda: found.left() == [])  # no orphan


def check_folder(folder, pid):
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


def kill_at(runs, process, moment, choose):
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


def check_against_undisturbed(runs, undisturbed, goal):
    """Train both to the goal: they end with the same bits."""
    for each in (runs, undisturbed):
        process = each.start(num_images=goal)
        process.join()
        assert process.exitcode == 0
        assert check_folder(each.folder, 0) == goal
    for name in (FINAL, BEST):
        ours, theirs = (read_state(each.folder / name) for each in (runs, undisturbed))
        for key in ours.keys() - {"vitdet"}:
            assert_same(ours[key], theirs[key], f"{name} {key}")
    ours, theirs = (
        {line["images_seen"]: line for line in numbers(each.folder) if "bbox/AP" in line}
        for each in (runs, undisturbed)
    )
    assert ours == theirs


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
    check_against_undisturbed(runs, Runs(tmp_path / "undisturbed", shapes), images + 10)


def test_signals_to_the_whole_group_save_and_leave(runs, tmp_path, shapes):
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
    check_against_undisturbed(runs, Runs(tmp_path / "undisturbed", shapes), reached + 4)
