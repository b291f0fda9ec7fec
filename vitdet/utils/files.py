"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitdet.utils.checks import InputError

# In the folder of `vitdet predict`: {name of a result without its suffix: path of its input}. Data
# is not looked for in a folder that has this file.
RESULT_MARKER = ".vitdet-results.json"

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>partial|old)(\.partial)?")
_CHUNK = 1 << 22
# What a user can repair: no space, a quota, a limit on sizes, a folder that is not to be written.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; at the end it takes `path`'s place.

    What is written there may be a file or a folder. The data is flushed to the disk before the
    rename. If the block raises, the temporary goes and what stood at `path` stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _flush_all(partial)
        _put(partial, path)
        _flush(path.parent)
    finally:
        remove(partial)


def tidy(folder: Path) -> None:
    """Remove what killed processes left of `replacing` in a folder."""
    for path in list(folder.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None:
            continue
        target = folder / found["name"]
        if found["kind"] == "old" and not target.exists():
            path.rename(target)  # killed between the two renames of a folder
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing there is well."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: Path, path: Path) -> None:
    """Give a file or folder a second name, which outlives the first; links need no space.

    Nothing here is ever written in place, so the two cannot change each other.
    """
    with replacing(path) as partial:
        if source.is_dir():
            shutil.copytree(source, partial, copy_function=_link)
        else:
            _link(str(source), str(partial))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder, in hexadecimal."""
    if not path.is_dir():
        return _digest_file(path).hexdigest()
    total = hashlib.sha256()
    for item in _files(path):
        name = item.relative_to(path).as_posix().encode()
        total.update(len(name).to_bytes(8, "big") + name + _digest_file(item).digest())
    return total.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small text file at once: a reader sees the old or the new one, never half.

    Raises:
        InputError: the disk refuses.
    """
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: could not be written ({error}). Check disk and rights."
        ) from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Make one clear line of a disk that takes nothing more, whichever file was being written.

    Raises:
        InputError: no space, a quota, a size limit, or no right to write.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f" at {error.filename}" if error.filename else ""
        raise InputError(
            f"output folder {folder}: expected a disk that takes what is written, got "
            f"{error.strerror}{where}. Make space or choose another folder; what was complete is "
            "intact."
        ) from error


def _put(partial: Path, path: Path) -> None:
    if not path.is_dir():
        partial.replace(path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")  # a folder cannot be replaced at once
    path.rename(old)
    partial.rename(path)
    remove(old)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no links
        shutil.copyfile(source, target)


def _files(folder: Path) -> list[Path]:
    return sorted(item for item in folder.rglob("*") if item.is_file())


def _digest_file(path: Path) -> hashlib._Hash:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found


def _flush_all(path: Path) -> None:
    if path.is_dir():
        for item in (*_files(path), *(item for item in path.rglob("*") if item.is_dir())):
            _flush(item)
    _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
