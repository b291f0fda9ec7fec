"""The checkpoints in a run's folder: their names, their checksums, and which one can be used."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vitdet import checkpoint
from vitdet.engine import sharded
from vitdet.utils.checks import InputError, fail
from vitdet.utils.distributed import broadcast_object, is_main
from vitdet.utils.files import digest, write_text

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"  # names the checkpoint that --resume continues from
FINAL = "model_final.pth"
BEST = "model_best.pth"
INDEX = "checkpoints.json"
_NAME = re.compile(rf"model_(?P<images>\d{{9,}}|final|best)(\.pth|{re.escape(sharded.SUFFIX)})")
ReadParts = Callable[[Path], dict[str, Any]]
_NEEDED = ("model", "optimizer", "images_seen", "seed")


class Found(NamedTuple):
    """A checkpoint that can be used, and what is in it."""

    path: Path
    content: dict[str, Any]


def numbered(images_seen: int) -> str:
    """Return the name of the checkpoint after so many images."""
    return f"model_{images_seen:09d}.pth"


def number_of(name: str) -> int | None:
    """Return the images in the name of a numbered checkpoint, None for other names."""
    found = _NAME.fullmatch(name)
    return int(found["images"]) if found and found["images"].isdecimal() else None


def in_folder(output_dir: Path) -> list[Path]:
    """Return the checkpoints that a folder holds, in no order."""
    return [path for path in output_dir.glob("model_*") if _NAME.fullmatch(path.name)]


class Index:
    """checkpoints.json: the SHA-256 of each checkpoint, and the images seen when it was written.

    A name is entered before the file takes its place, with the checksums of both the new and the
    old content: whichever a kill leaves there is known. A checkpoint without entry is judged by its
    format's own checksums.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / INDEX
        self.entries: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return {
                str(name): {"images_seen": int(e["images_seen"]), "sha256": list(e["sha256"])}
                for name, e in content.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s is damaged: checkpoints are read without its checksums", self.path)
            return {}

    def add(self, name: str, images_seen: int, sha256: str) -> None:
        """Enter what will stand under `name` in a moment."""
        old = self.entries.get(name, {}).get("sha256", [])[:1]
        present = {k: e for k, e in self.entries.items() if (self.folder / k).exists()}
        known = [sha256, *(each for each in old if each != sha256)]
        self.entries = {**present, name: {"images_seen": images_seen, "sha256": known}}
        write_text(self.path, json.dumps(self.entries, indent=1) + "\n")

    def check(self, path: Path) -> None:
        """Raise InputError when a checkpoint is not what was written."""
        entry = self.entries.get(path.name)
        if entry is None:
            return
        try:
            found = digest(path)
        except OSError as error:
            raise InputError(f"checkpoint {path}: it cannot be read ({error}).") from error
        if found not in entry["sha256"]:
            raise InputError(
                f"checkpoint {path}: it is damaged (its SHA-256 is not the one in {INDEX})."
            )

    def images(self, name: str) -> int | None:
        """Return the images seen of a checkpoint, None when nobody knows."""
        entry = self.entries.get(name)
        return number_of(name) if entry is None else entry["images_seen"]


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint that `last_checkpoint` names, None when the folder holds no run.

    Raises:
        InputError: what is named there is gone.
    """
    pointer = output_dir / LAST
    if not pointer.exists():
        return None
    path = output_dir / _pointed(pointer)
    if not path.exists() or path == output_dir:
        others = sorted(item.name for item in in_folder(output_dir))
        fail(
            str(pointer),
            expected="the name of a checkpoint in the same folder",
            got=f"{path.name}, which is not there",
            remedy=f"Write another name into it (there are: {', '.join(others) or 'none'}), "
            "or remove it to start anew.",
        )
    return path


def usable(output_dir: Path, read_parts: ReadParts = sharded.read) -> Found | None:
    """Return the last checkpoint, or the newest before it that is not damaged.

    The main process looks, and all take the same. None when the folder holds no run.

    Args:
        output_dir: of the run.
        read_parts: reads a checkpoint that is a folder; all processes call it at once.

    Raises:
        InputError: there are checkpoints, but none that can be read.
    """
    found: Found | None = None
    failure = None
    if is_main():
        try:
            found = _usable(output_dir)
        except InputError as error:
            failure = str(error)
    name, failure = broadcast_object((None if found is None else found.path.name, failure))
    if failure is not None:
        raise InputError(failure)
    if name is None:
        return None
    path = output_dir / name
    if path.is_dir():
        return Found(path, read_state(path, read_parts))
    return found or Found(path, read_state(path))


def read_state(path: Path, read_parts: ReadParts = sharded.read) -> dict[str, Any]:
    """Return the content of a checkpoint, a file or a folder.

    Raises:
        InputError: damaged, or weights alone, from which no training continues.
    """
    content = read_parts(path) if path.is_dir() else checkpoint.read(path)
    missing = [key for key in _NEEDED if key not in content]
    if missing:
        fail(
            f"checkpoint {path}",
            expected="the state of a training",
            got=f"a file without {', '.join(missing)}",
            remedy="Start from it with train.init_checkpoint.",
        )
    return content


def _usable(output_dir: Path) -> Found | None:
    if not (output_dir / LAST).exists():
        return None
    index = Index(output_dir)
    reasons = []
    for path in _candidates(output_dir, index):
        try:
            index.check(path)
            # of a folder that is as it was written, each process is to read its own part only
            sound = path.is_dir() and path.name in index.entries
            found = Found(path, {} if sound else read_state(path))
        except InputError as error:
            reasons.append(str(error))
            logger.warning("%s Trying the checkpoint before it.", error)
            continue
        if reasons:
            logger.warning("using %s instead", path)
        return found
    fail(
        f"checkpoints in {output_dir}",
        expected="one that can be read",
        got=f"{len(reasons)} that cannot ({reasons[0]})",
        remedy=f"Put a copy back, or remove {LAST} to start anew.",
    )


def _candidates(output_dir: Path, index: Index) -> Iterator[Path]:
    """The checkpoint that `last_checkpoint` names, then those before it, newest first."""
    last = output_dir / _pointed(output_dir / LAST)
    yield last
    limit = index.images(last.name)
    ages = {path: index.images(path.name) for path in in_folder(output_dir)}
    before = [(images if images is not None else -1, path) for path, images in ages.items()]
    for images, path in sorted(before, reverse=True):
        if path != last and (limit is None or images <= limit):
            yield path


def _pointed(pointer: Path) -> str:
    return pointer.read_text(encoding="utf-8", errors="replace").strip()


def made_folder(path: Path) -> Path:
    """Make the folder of a run, unless it is there, and return it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        return path
    except OSError as error:
        raise InputError(
            f"train.output_dir={path}: expected a folder that can be made, got {error.strerror}. "
            "Choose another one."
        ) from error
