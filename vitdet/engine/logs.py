"""Where the log lines of a run go."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

from vitdet.utils.checks import printable
from vitdet.utils.distributed import is_main


@contextmanager
def logging_to() -> Iterator[Callable[[Path], None]]:
    """Send the main process's log lines to stdout; yields what also sends all of them to a file."""
    package = logging.getLogger("vitdet")
    level = package.level
    style = _Printable("[%(asctime)s] %(message)s", "%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = []
    earlier = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)

    def add(handler: logging.Handler) -> None:
        handler.setFormatter(style)
        package.addHandler(handler)
        handlers.append(handler)

    def log_to(path: Path) -> None:
        if is_main():
            file = _LogFile(path, encoding="utf-8")
            add(file)
            for record in earlier.buffer:
                file.handle(record)
            package.removeHandler(earlier)

    if is_main():
        add(_BesideABar(sys.stdout))
        add(earlier)
    package.setLevel(logging.INFO if is_main() else logging.WARNING)
    try:
        yield log_to
    finally:
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()
        package.setLevel(level)


class _Printable(logging.Formatter):
    """Texts of files may be in a line, and the terminal would obey them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """A file whose errors are the run's: a full disk is one line there, not a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 (logging's)
        """Raise what happened."""
        if (error := sys.exc_info()[1]) is not None:
            raise error


class _BesideABar(logging.StreamHandler):
    """Prints a line above the progress bar, if there is one, and draws the bar again."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the line."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's)
        """Print no more where nobody reads or the disk is full: the run goes on, and log.txt."""
        if isinstance(sys.exc_info()[1], OSError):
            self.setLevel(logging.CRITICAL + 1)
        else:
            super().handleError(record)


def clock(seconds: float) -> str:
    """Return a time as "h:mm:ss"."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
