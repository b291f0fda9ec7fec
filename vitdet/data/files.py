"""What lies in a folder of data, and the one reader of its small files.

A folder of strangers holds links that lead nowhere or in circles, pipes, devices, names that are no
text, results of earlier runs, and files that are not what their names say. Nothing of it hangs or
ends in a traceback: it is left out and counted, or is an error of one line.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitdet.data.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES
from vitdet.utils.checks import InputError, one_line
from vitdet.utils.files import RESULT_MARKER

MAX_TEXT = 64 << 20  # bytes of a list, a yaml, an xml or a file of labels
_MAX_DEPTH = 24
_MAX_VISITS = 8  # of one folder, by several links
_LABELS = {".json", ".xml", ".yaml", ".yml", ".txt"}
_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_UNPACK = "unpack it and give the folder"
_KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS in its place (run `git lfs pull`)"),
    (b"PK\x03\x04", f"a zip archive ({_UNPACK})"),
    (b"\x1f\x8b", f"a gzip archive ({_UNPACK})"),
    (b"BZh", f"a bzip2 archive ({_UNPACK})"),
    (b"\xfd7zXZ", f"an xz archive ({_UNPACK})"),
    (b"7z\xbc\xaf", f"a 7z archive ({_UNPACK})"),
    (b"Rar!", f"a rar archive ({_UNPACK})"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF"),
    (b"SQLite format 3", "an SQLite data base"),
)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Files that belong to a data set or to its tools and are no images that somebody may miss.
_NO_IMAGES = {
    *(".txt", ".xml", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".md", ".names", ".data"),
    *(".labels", ".cache", ".ini", ".db", ".py", ".html", ".log", ".zip", ".gz", ".tar", ".sh"),
    *(".pth", ".safetensors", ".lock"),
}


def is_file(path: Path) -> bool:
    """Whether a regular file, or a link to one, is there; a name that none can have is not."""
    try:
        return path.is_file()
    except OSError:  # too long, or a circle of links
        return False


def exists(path: Path) -> bool:
    """Whether anything is there, as `is_file`."""
    try:
        return path.exists()
    except OSError:
        return False


def is_link(path: Path) -> bool:
    """Whether a symbolic link is there, as `is_file`."""
    try:
        return path.is_symlink()
    except OSError:
        return False


def written(path: Path) -> Path:
    """Return the absolute path as it is written: without "..", links are not followed."""
    plain = Path(os.path.normpath(path.absolute()))
    return plain if exists(plain) or not exists(path) else path.resolve()


def home(text: str) -> Path:
    """Return a path in which ~ stands for a home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # a user that is not known here
        return Path(text)


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Return what a regular file holds.

    Args:
        path: of the file; a link is followed.
        limit: bytes that it may have.

    Raises:
        InputError: nothing there, no regular file, not to be read, or larger.
    """
    try:
        status = path.stat()
        special = next((name for test, name in _SPECIAL if test(status.st_mode)), None)
        if special is not None:
            raise InputError(f"{path}: expected a file, got {special}. Check the path.")
        if limit is not None and status.st_size > limit:
            raise InputError(
                f"{path}: expected at most {limit} bytes of text, got {status.st_size}. "
                "Check what the file is."
            )
        return path.read_bytes()
    except InputError:
        raise
    except OSError as error:
        link = " (a link that leads nowhere)" if is_link(path) else ""
        got = f"{error.strerror}{link}"
        raise InputError(f"{path}: expected a file that can be read, got {got}.") from error
    except ValueError as error:  # a zero byte or half a character in the name
        raise InputError(f"{str(path)!r}: expected the name of a file, got {error}.") from error


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Return the text of a small file in UTF-8, or in what its first bytes say.

    Raises:
        InputError: as `read_bytes`, or no text.
    """
    data = read_bytes(path, limit)
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        got = kind_of(data) or f"bytes that are none (at {error.start})"
        raise InputError(f"{path}: expected text in UTF-8, got {got}. Save it as UTF-8.") from error


def kind_of(data: bytes) -> str | None:
    """Say what a file is that should be something else, by its first bytes; None: unknown."""
    head = data[:2000]
    start = head.lstrip().lower()
    if not start.strip(b"\x00"):
        return "only zero bytes (an incomplete copy)" if start else "an empty file"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page (download the file itself)"
    if data[257:262] == b"ustar":
        return f"a tar archive ({_UNPACK})"
    return next((kind for magic, kind in _KINDS if head.startswith(magic)), None)


def read_json(path: Path) -> tuple[Any, str]:
    """Return what a json file holds, and its encoding: "utf-8" where any program reads it.

    Raises:
        InputError: as `read_bytes`, or no json.
    """
    data = read_bytes(path)
    encoding = json.detect_encoding(data[:4])
    try:
        return json.loads(data.decode(encoding, "surrogatepass")), encoding
    except (ValueError, RecursionError) as error:
        got = kind_of(data)
        if got is None:
            got = "text nested too deep" if isinstance(error, RecursionError) else None
        if got is None:
            got = f"text that is not ({error}); check that it was written completely"
        raise InputError(f"{path}: expected json, got {got}.") from error


@dataclass
class Listing:
    """The files below a folder.

    Attributes:
        folder: as it was given; paths below begin with it, links are not resolved.
        files: regular files and links to such, sorted.
        left_out: {reason: how many} of what cannot be used.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def images(self) -> list[Path]:
        """Return the images among the files."""
        return [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]

    def of(self, *suffixes: str) -> list[Path]:
        """Return the files of some suffixes, given in lower case."""
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def other_suffixes(self) -> Counter[str]:
        """Return {suffix: how many} of files that may be images and are not read."""
        suffixes = (path.suffix.lower() for path in self.files)
        known = IMAGE_SUFFIXES | _NO_IMAGES
        return Counter(suffix or "no suffix" for suffix in suffixes if suffix not in known)

    def notes(self) -> Iterator[str]:
        """Yield a line on what is left out, if there is anything."""
        kinds = [
            f"{count} x {suffix}"
            + (f" ({UNREADABLE_SUFFIXES[suffix]})" if suffix in UNREADABLE_SUFFIXES else "")
            for suffix, count in self.other_suffixes().most_common(8)
        ]
        kinds += [f"{count} x {reason}" for reason, count in self.left_out.most_common()]
        if kinds:
            yield one_line(f"left out in {self.folder}: {', '.join(kinds)}")


def list_files(folder: Path) -> Listing:
    """List the files below a folder; links to folders are followed, hidden names passed over.

    Results of `vitdet predict`, folders of runs, links that lead nowhere or in circles, special
    files, folders that cannot be read and names that are no text are left out and counted. What
    has the name of a file of labels stays, whatever it is: reading it says what is wrong.

    Raises:
        InputError: a marker of results that cannot be read.
        OSError: the folder itself cannot be read.
    """
    walk = _Walk(Listing(folder))
    real = folder.resolve()
    walk.todo.append((folder, tuple(map(_identity, (real, *real.parents)))))
    while walk.todo:
        walk.enter(*walk.todo.pop())
    walk.found.files.sort()
    return walk.found


Identity = tuple[int, int]  # of a folder: device and inode


def _identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


@dataclass
class _Walk:
    """What was found so far, folders to enter with the identities above them, visits of each."""

    found: Listing
    todo: list[tuple[Path, tuple[Identity, ...]]] = field(default_factory=list)
    visits: Counter[Identity] = field(default_factory=Counter)

    def enter(self, place: Path, above: tuple[Identity, ...]) -> None:
        try:
            with os.scandir(place) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            if place == self.found.folder:
                raise
            self.found.left_out["folder that cannot be read"] += 1
            return
        names = {entry.name for entry in inside}
        run = "config.yaml" in names and names & {"run.json", "last_checkpoint"}
        if run and place != self.found.folder:
            self.found.left_out["folder of a run"] += 1
            return
        results = _results(place / RESULT_MARKER) if RESULT_MARKER in names else {}
        for entry in inside:
            if not entry.name.startswith(".") and entry.name != "__MACOSX":
                self._take(entry, place / entry.name, above, results)

    def _take(
        self,
        entry: os.DirEntry[str],
        path: Path,
        above: tuple[Identity, ...],
        results: dict[str, Any],
    ) -> None:
        kind, reason = self._kind(entry, path, above, results)
        if kind == "file" or (kind == "special" and path.suffix.lower() in _LABELS):
            self.found.files.append(path)
        elif kind == "folder":
            self.todo.append((path, (*above, _identity(path))))
        else:
            self.found.left_out[reason] += 1

    def _kind(
        self,
        entry: os.DirEntry[str],
        path: Path,
        above: tuple[Identity, ...],
        results: dict[str, Any],
    ) -> tuple[str, str]:
        """Return "file", "folder", "special" or "other", and why it is left out."""
        try:
            entry.name.encode()
            status = entry.stat()
        except UnicodeEncodeError:
            return "other", "name that is no UTF-8"
        except OSError:
            link = entry.is_symlink()
            return "special", "link that leads nowhere" if link else "file that cannot be read"
        if stat.S_ISDIR(status.st_mode):
            reason = self._why_not_entered(path, (status.st_dev, status.st_ino), above)
            kind = "special" if path.suffix.lower() in _LABELS else "folder"
            return ("other", reason) if reason else (kind, "")
        if not stat.S_ISREG(status.st_mode):
            return "special", "pipe, socket or device"
        source = results.get(path.stem)
        result = isinstance(source, str) and Path(source) != path.absolute()
        return ("other", "result of vitdet") if result else ("file", "")

    def _why_not_entered(self, path: Path, identity: Identity, above: tuple[Identity, ...]) -> str:
        deep = len(path.parts) - len(self.found.folder.parts) > _MAX_DEPTH
        if identity in above or deep:
            return "folder that leads in a circle"
        self.visits[identity] += 1
        return "folder that many links lead to" if self.visits[identity] > _MAX_VISITS else ""


def _results(marker: Path) -> dict[str, Any]:
    """Return {name of a result without suffix: its input} as `vitdet predict` notes it."""
    content, _ = read_json(marker)
    return content if isinstance(content, dict) else {}
