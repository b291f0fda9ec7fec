"""What a user reads: errors in one line, names of arguments, no warnings of dependencies."""

from __future__ import annotations

import difflib
import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

INPUT_ERROR_STATUS = 2
PREEMPTED_STATUS = 75  # stopped by a signal after saving; what sysexits.h calls "try again"
INTERRUPTED_STATUS = 130  # what shells give for ^C: 128 + SIGINT
_TWO_STOPS = re.compile(r"(?<=[^\s./])\.\.(?=\s|$)")  # "../", ".." and "..." mean something else
NOTHING_YET = "before the first step: nothing was lost, give the same command again"


@contextmanager
def before_first_step() -> Iterator[None]:
    """Have ^C within the block say that a training can be started again."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or NOTHING_YET) from None


class InputError(ValueError):
    """A wrong input: file, config value, argument, annotation. Command lines print one line.

    Names out of a file may be in the text, so it is made one line of printable characters.
    """

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """Return the text in one line: control characters as escapes, endless words cut short.

    Where a sentence of somebody else ends one of ours, one stop is enough.
    """
    words = (word if len(word) <= 1000 else f"{word[:100]}..." for word in text.split())
    return _TWO_STOPS.sub(".", printable(" ".join(words)))


def printable(text: str) -> str:
    """Return the text with its lines, and other control characters as escapes.

    A terminal obeys some of them, and an encoding may not know a half of a surrogate pair.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that looks most like `name`, or None when none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def check_word(what: str, word: object, known: Iterable[object]) -> None:
    """Raise an InputError unless `word` (the argument `what`) is among `known`."""
    words = list(known)
    if word in words:
        return
    names = [str(each) for each in words]
    meant = nearest(str(word), names)
    remedy = f"Did you mean {meant!r}?" if meant else "Take one of these."
    raise InputError(f"{what}: expected one of {', '.join(names)}, got {word!r}. {remedy}")


def exit_status(run: Callable[[], int]) -> int:
    """Run a command and return its exit status; an error of input, disk or user is one line.

    `run` returns the status, and holds the imports too: ^C may come while they last. It is 2 for an
    InputError, a file that cannot be read or written, or an output that takes nothing; 130 for ^C,
    of which a second one ends the process at once; 0 when the reader of a pipe has seen enough.
    """
    open_streams()
    try:
        status = run()
        sys.stdout.flush()
        return status
    except InputError as error:
        return _say(f"error: {error}", INPUT_ERROR_STATUS)
    except ModuleNotFoundError as error:
        return _say(f"error: {missing_text(error)}", INPUT_ERROR_STATUS)
    except BrokenPipeError:
        _drop_stdout()
        return 0
    except OSError as error:
        _drop_stdout()
        return _say(f"error: {os_error_text(error)}", INPUT_ERROR_STATUS)
    except KeyboardInterrupt as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return _say(f"interrupted {error}".rstrip(), INTERRUPTED_STATUS)


def open_streams() -> None:
    """Have streams that were closed take what is written, and all of them any character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file opened would get its number
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what no encoding knows
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def missing_text(error: ModuleNotFoundError) -> str:
    """Return how to bring a package that is not here."""
    package = str(error.name).partition(".")[0]
    return (
        f"vitdet needs {package}, which is not installed: run `vitdet setup`, which brings what is "
        "missing (or build the official detectron2 with `pip install --no-build-isolation "
        "'detectron2 @ git+https://github.com/facebookresearch/detectron2.git'`)."
    )


def os_error_text(error: OSError) -> str:
    """Return what the system refused, of which file, and where to look, in one line."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    what = " -> ".join(names) or "a file or device"
    reason = error.strerror or str(error) or type(error).__name__
    return one_line(f"{what}: {reason}. Look at the path, its rights and the space of its disk.")


def _say(text: str, status: int) -> int:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it; the status says it still
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return status


def _drop_stdout() -> None:
    """Drop what stdout could not take: Python would try again at its end, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def passes_on(source: Callable[..., Any], **defaults: Any) -> Callable[[_Function], _Function]:
    """Show the arguments of `source` in the place of a function's **arguments.

    `help` and the check of a recipe's calls then know their names, types and defaults. `defaults`
    are those that differ.
    """

    def decorate(function: _Function) -> _Function:
        own = signature(function)
        named = [each for each in own.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
        passed = [
            each.replace(kind=Parameter.KEYWORD_ONLY, default=defaults.get(name, each.default))
            for name, each in signature(source).parameters.items()
            if name not in own.parameters
        ]
        vars(function)["__signature__"] = own.replace(parameters=[*named, *passed])
        return function

    return decorate


# Each can go when its source no longer says it.
_NOISE = (
    r".*torch\.jit\.(script|trace|script_method).* is deprecated",  # fvcore, at import
    r"Importing from timm\.models\.layers is deprecated",  # detectron2, at import
    r"pkg_resources is deprecated",  # detectron2, at import
    r"torch\.meshgrid: in an upcoming release",  # detectron2's anchors
    r"The given NumPy array is not writable",  # detectron2's masks
    r"Grad strides do not match bucket view strides",  # DistributedDataParallel, of 1x1 kernels
)


def quiet_dependencies() -> None:
    """Leave the known warnings of dependencies out of what a user reads; all others stay."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    # detectron2's image lists make recent torch log a line about tracing
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
