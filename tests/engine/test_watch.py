"""A step that does not end, and a terminal that takes nothing more."""

from __future__ import annotations

import logging
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from test_launch import environment

from vitdet.engine.log import logging_to

STUCK = """
import itertools, sys, time
from pathlib import Path
import torch
from vitdet.engine.watch import Watch
watch = Watch(Path(sys.argv[1]), float(sys.argv[2]))
def batches():
    yield from "abc"
    time.sleep(float(sys.argv[3]))
    yield "d"
for batch in watch.over(batches()):
    watch.after_step(None)
    time.sleep(0.9)  # an evaluation has no limit
watch.stop()
print("done")
"""


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_a_step_that_does_not_end_is_a_line_and_a_status(tmp_path: Path, seconds: float) -> None:
    words = [sys.executable, "-c", STUCK, str(tmp_path), "0.5", str(seconds)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    path = tmp_path / "stuck_rank0.txt"
    if not seconds:
        assert (done.returncode, done.stdout) == (0, "done\n")
        assert not path.exists()
        return
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "Warning" not in line][-1] == (
        f"error: training: expected the end of a step within 0.5 s, got none. The stacks of rank 0 "
        f"are in {path}: they say what it waits for. If it only needs longer, raise "
        "train.step_timeout."
    )
    assert "in batches" in path.read_text()


def test_a_full_terminal_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
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
