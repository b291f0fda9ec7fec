"""Room 0: errors, seeds, warnings."""

import errno
import random
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from vitdet.utils import env
from vitdet.utils.checks import InputError, exit_status, quiet_dependencies


def _raise(error):
    def run():
        raise error

    return run


LOOK = "Look at the path, its rights and the space of its disk."


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("x: no"), 2, "error: x: no"),
        (InputError("x: no.. Or a.. (b).."), 2, "error: x: no. Or a. (b)."),
        (InputError("x: ../a/.. and .. or a..."), 2, "error: x: ../a/.. and .. or a..."),
        (OSError(errno.ENOENT, "No such file", "a\nb"), 2, f"error: a b: No such file. {LOOK}"),
        (OSError(errno.EIO, "Bad disk", b"x\xff"), 2, f"error: x\\udcff: Bad disk. {LOOK}"),
        (OSError(errno.EXDEV, "Far", "a", None, "b"), 2, f"error: a -> b: Far. {LOOK}"),
        (OSError("odd"), 2, f"error: a file or device: odd. {LOOK}"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("before it began"), 130, "interrupted before it began"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 0, ""),
    ],
)  # fmt: skip
def test_what_ends_a_command_is_one_line_and_a_status(error, status, line, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert exit_status(_raise(error)) == status
    # the line is written: a second ^C has nothing to wait for
    interrupted = isinstance(error, KeyboardInterrupt)
    assert (signal.getsignal(signal.SIGINT) is signal.SIG_DFL) is interrupted
    assert capsys.readouterr().err == (line and f"{line}\n")
    assert exit_status(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):  # a fault of the package stays one
        exit_status(_raise(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("shell", "status", "error"),
    [
        ("{} >&-", 0, ""),
        ("{} 2>&- >/dev/null; echo status $? >&2", 0, "status 0\n"),
        ("{} > /dev/full", 2, f"error: a file or device: No space left on device. {LOOK}\n"),
    ],
)
def test_a_stdout_that_is_closed_or_full(shell, status, error, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from vitdet.utils.checks import exit_status\n"
        "def run():\n"
        "    with open('file', 'w') as file:\n"  # not the closed descriptor's number
        "        print('line \\udcff', flush=True)\n"
        "        assert file.fileno() > 2\n"
        "    return 0\n"
        "sys.exit(exit_status(run))\n"
    )
    project = str(Path(__file__).parents[1])
    command = shlex.join([sys.executable, "-c", code, project])
    done = subprocess.run(
        shell.format(command), shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (status, error)
    assert (tmp_path / "file").read_text() == ""


def test_seeds_are_the_same_everywhere_and_differ_with_each_number():
    assert env.seed_from(0, 1) == 1506311409109703068
    seeds = {env.seed_from(*numbers) for numbers in [(0,), (1,), (0, 0), (0, 1), (1, 0)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_random_state_repeats_inside_and_restores_outside():
    def draw():
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    env.seed_all(3)
    undisturbed = draw()
    env.seed_all(3)
    with env.random_state(7):
        first = draw()
    assert draw() == undisturbed
    with env.random_state(7):
        assert draw() == first


def test_only_the_listed_warnings_of_dependencies_are_quiet():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_dependencies()
        warnings.warn("torch.meshgrid: in an upcoming release, it will", stacklevel=1)
        warnings.warn("something new", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["something new"]
