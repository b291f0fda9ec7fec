"""What lies in a folder of data, and the one reader of its small files.

Such folders hold links that lead nowhere or in circles, pipes, names that are no text, results of
earlier runs, and files that are not what their names say. Nothing of it hangs or ends in a
traceback: it is left out and counted, or is an error of one line.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitdet.data.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES
from vitdet.utils.checks import InputError, one_line
from vitdet.utils.files import RESULT_MARKER

MAX_TEXT = 64 << 20  # bytes of a list, a yaml, an xml or a file of labels
_MAX_VISITS = 8  # of one folder, by several links
_LABELS = {".json", ".xml", ".yaml", ".yml", ".txt"}
_SPECIAL = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")
# Files that belong to a data set or to its tools and are no images that somebody may miss.
_NO_IMAGES = {
    *(".txt", ".xml", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".md", ".names", ".data"),
    *(".labels", ".cache", ".ini", ".db", ".py", ".html", ".log", ".zip", ".gz", ".tar", ".sh"),
    *(".pth", ".safetensors", ".lock"),
}


def _or_false(test: Callable[[Path], bool]) -> Callable[[Path], bool]:
    def safe(path: Path) -> bool:
        try:
            return test(path)
        except OSError:  # a name that is too long, a folder that may not be read
            return False

    return safe


exists, is_file, is_link = map(_or_false, (Path.exists, Path.is_file, Path.is_symlink))


def written(path: Path) -> Path:
    """Return the absolute path as it is written: without "..", links are not followed."""
    plain = Path(os.path.normpath(path.absolute()))
    return plain if exists(plain) or not exists(path) else path.resolve()


def home(text: str) -> Path:
    """Return a path in which ~ stands for a home folder, where there is one of this user."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser stops without one


def read_bytes(path: Path, limit: float = math.inf) -> bytes:
    """Return what a regular file of at most `limit` bytes holds, or raise an InputError."""
    try:
        status = path.stat()
        regular = stat.S_ISREG(status.st_mode)
        data = path.read_bytes() if regular and status.st_size <= limit else b""
    except (OSError, ValueError) as error:  # ValueError: no name of a file, such as one with a zero
        got = error.strerror if isinstance(error, OSError) else error
        link = " (a link that leads nowhere)" if is_link(path) else ""
        raise InputError(f"{path}: expected a file that can be read, got {got}{link}.") from error
    if not regular:
        got = _SPECIAL.get(stat.S_IFMT(status.st_mode), "a device")
        raise InputError(f"{path}: expected a file, got {got}. Check the path.")
    if status.st_size > limit:
        raise InputError(f"{path}: expected at most {limit} bytes of text, got {status.st_size}.")
    return data


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Return the text of a small file in UTF-8 or UTF-16, or raise an InputError."""
    data = read_bytes(path, limit)
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        got = kind_of(data) or f"bytes that are none (at {error.start})"
        raise InputError(f"{path}: expected text in UTF-8, got {got}. Save it as UTF-8.") from error


def read_json(path: Path) -> tuple[Any, str]:
    """Return what a json file holds, and its encoding: "utf-8" where any program reads it.

    Raises:
        InputError: it cannot be read, or is no json.
    """
    data = read_bytes(path)
    encoding = json.detect_encoding(data[:4])
    try:
        return json.loads(data.decode(encoding, "surrogatepass")), encoding
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else f"not ({error})"
        got = kind_of(data) or f"text that is {reason}; check that it was written completely"
        raise InputError(f"{path}: expected json, got {got}.") from error


def kind_of(data: bytes) -> str | None:
    """Say what a file is that should be something else, by its first bytes; None: unknown."""
    start = data[:2000].lstrip().lower()
    if not start.strip(b"\x00"):
        return "only zero bytes (an incomplete copy)" if start else "an empty file"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page (download the file itself)"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in its place (run `git lfs pull`)"
    if data.startswith(_ARCHIVES) or data[257:262] == b"ustar":
        return "an archive (unpack it and give the folder)"
    return "an image" if data.startswith((b"\x89PNG", b"\xff\xd8\xff")) else None


@dataclass
class Listing:
    """The files below a folder: regular files and links to such, sorted, not resolved."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # {reason: how many}

    def of(self, *suffixes: str) -> list[Path]:
        """Return the files of some suffixes, given in lower case."""
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def images(self) -> list[Path]:
        """Return the images among the files."""
        return self.of(*IMAGE_SUFFIXES)

    def notes(self) -> list[str]:
        """Return a line on what is left out, if there is anything: by suffix, and by reason."""
        suffixes = Counter(path.suffix.lower() for path in self.files)
        kinds = [
            f"{count} x {suffix or 'no suffix'}"
            + (f" ({UNREADABLE_SUFFIXES[suffix]})" if suffix in UNREADABLE_SUFFIXES else "")
            for suffix, count in suffixes.most_common()
            if suffix not in IMAGE_SUFFIXES | _NO_IMAGES
        ]
        kinds = [*kinds[:8], *(f"{n} x {reason}" for reason, n in self.left_out.most_common())]
        return [one_line(f"left out in {self.folder}: {', '.join(kinds)}")] if kinds else []


def list_files(folder: Path) -> Listing:
    """List the files below a folder; links to folders are followed, hidden names passed over.

    What is no data is left out and counted (`_reason`); an OSError where the folder itself cannot
    be read. What has the name of a file of labels stays, whatever it is: reading it says what is
    wrong.
    """
    found, visits, real = Listing(folder), Counter[Any](), folder.resolve()
    todo = [(folder, frozenset(_identity(each.stat()) for each in (real, *real.parents)))]
    while todo:
        place, above = todo.pop()
        entries = _entries(place, found)
        results = read_json(place / RESULT_MARKER)[0] if RESULT_MARKER in entries else {}
        for name in sorted(entries):
            if name.startswith(".") or name == "__MACOSX":
                continue
            reason, identity = _reason(entries[name], results)
            visits[identity] += identity is not None
            if identity in above or visits[identity] > _MAX_VISITS:
                reason = "folder that links lead to again"
            if reason:
                found.left_out[reason] += 1
            elif identity is None:
                found.files.append(place / name)
            else:
                todo.append((place / name, above | {identity}))
    found.files.sort()
    return found


def _entries(place: Path, found: Listing) -> dict[str, os.DirEntry[str]]:
    """Return what lies in a folder by name; {} where the folder is left out."""
    try:
        with os.scandir(place) as inside:
            entries = {each.name: each for each in inside}
    except OSError:
        if place == found.folder:
            raise
        found.left_out["folder that cannot be read"] += 1
        return {}
    run = "config.yaml" in entries and entries.keys() & {"run.json", "last_checkpoint"}
    if run and place != found.folder:
        found.left_out["folder of a run"] += 1
        return {}
    return entries


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _reason(entry: os.DirEntry[str], results: Any) -> tuple[str, tuple[int, int] | None]:
    """Return why something is left out ("" for what stays), and the identity of a folder.

    `results` is {name of a result without suffix: its input} as `vitdet predict` notes it.
    """
    path = Path(entry.path)
    labels = path.suffix.lower() in _LABELS
    try:
        entry.name.encode()
        status = entry.stat()
    except UnicodeEncodeError:
        return "name that is no UTF-8", None
    except OSError:
        reason = "link that leads nowhere" if entry.is_symlink() else "file that cannot be read"
        return "" if labels else reason, None
    if stat.S_ISDIR(status.st_mode):
        return "", _identity(status)
    if not stat.S_ISREG(status.st_mode):
        return "" if labels else "pipe, socket or device", None
    source = results.get(path.stem) if isinstance(results, dict) else None
    result = isinstance(source, str) and Path(source) != path.absolute()
    return "result of vitdet" if result else "", None
