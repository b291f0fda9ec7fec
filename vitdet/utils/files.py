"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vitdet.utils.checks import InputError, os_error_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

# In the folder of `vitdet predict`: {name of a result without its suffix: path of its input}. Data
# is not looked for in a folder that has this file.
RESULT_MARKER = ".vitdet-results.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process within the block; the system lets go when the process ends.

    The lock is on the file `run.lock`, which goes at the end where nothing else is in the folder.

    Raises:
        InputError: another process holds it, or has just removed it.
    """
    path = folder / "run.lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            raise InputError(
                f"folder {folder}: another run is writing to it ({file.read().strip()}). Wait for "
                "its end, or choose another folder."
            ) from error
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise InputError(f"folder {folder}: another run has just ended there. Start again.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            if list(folder.iterdir()) == [path]:
                path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write a file to; at the end it takes `path`'s place.

    The data is flushed to the disk before the rename. If the block raises, the temporary goes and
    what stood at `path` stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tidy(folder: Path) -> None:
    """Remove what killed processes left of `replacing` in a folder."""
    for path in list(folder.iterdir()):
        if re.fullmatch(r"\..+\.\d+\.partial", path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file at once: a reader sees the old or the new one, never half.

    Raises:
        InputError: the disk refuses.
    """
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        text = f"{path}: could not be written ({error}). Check disk and rights."
        raise InputError(text) from error


def link_or_copy(source: Path, path: Path) -> None:
    """Give a file that is never written in place a second name, which outlives the first."""
    with replacing(path) as partial:
        try:
            os.link(source, partial)
        except OSError:  # the file system has no links
            shutil.copyfile(source, partial)


def read_json(path: Path, kind: type[T]) -> T:
    """Return what a JSON file holds.

    Raises:
        InputError: it cannot be read, or holds something else than a `kind`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(os_error_text(error)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: it cannot be read ({error}). Write it again.") from error
    if not isinstance(content, kind):
        got = f"got a {type(content).__name__}: {str(content)[:100]}"
        raise InputError(f"{path}: expected a {kind.__name__}, {got}. Write it again.")
    return content


def read_small(path: Path, parse: Callable[[str], T], default: T) -> T:
    """Return what `parse` makes of a small text file of a run, the default when there is none.

    A file that cannot be read (cut, foreign, a folder or a pipe in its place) costs itself alone.
    """
    try:
        if not path.exists():
            return default
        if not path.is_file():
            raise ValueError("it is no file")
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = error
    logger.warning("%s cannot be read (%s): going on without it", path, reason)
    return default
