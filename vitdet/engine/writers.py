"""Where the numbers of a run go: files, TensorBoard, and what `train.loggers` names.

Each writer takes lines of {name: value} at a number of images seen. Only the main process has any.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vitdet.utils.checks import fail, nearest
from vitdet.utils.files import read_small, write_text

Values = Mapping[str, float]
IMAGES = "images_seen"
_PROJECT = "vitdet"
_IDENTITIES = "loggers.json"  # {logger: id of the run there}, so that a resume goes on with it


class Writer(Protocol):
    """Takes the numbers of a run."""

    def write(self, images_seen: int, values: Values) -> None:
        """Add one line."""

    def close(self, *, failed: bool) -> None:
        """Finish; `failed` when the run did not come to its end."""


@dataclass(frozen=True)
class About:
    """What a logger gets to know of a run.

    Attributes:
        config: the recipe, plain.
        facts: {name: text}: versions, data.
    """

    config: dict[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def check_loggers(names: Sequence[str] | None) -> None:
    """Check `train.loggers`.

    Raises:
        InputError: a name that is none, a package that is not installed.
    """
    for name in names or ():
        if name not in LOGGERS:
            close = nearest(str(name), LOGGERS)
            remedy = f"Did you mean {close}?" if close else "Leave it out."
            expected = f"names of {', '.join(LOGGERS)}"
            fail("train.loggers", expected=expected, got=repr(name), remedy=remedy)
        if importlib.util.find_spec(name) is None:
            remedy = f"Install it (pip install {name}), or leave it out of train.loggers."
            fail("train.loggers", expected=f"the package {name}", got="none", remedy=remedy)


def open_writers(
    folder: Path, images_seen: int, loggers: Sequence[str], about: About
) -> list[Writer]:
    """Return the writers of a run's folder; what was written after `images_seen` goes."""
    lines = JsonLines(folder / "metrics.json", images_seen)
    board = TensorBoard(folder, images_seen)
    return [lines, board, *(LOGGERS[name](folder, about) for name in loggers)]


# --- files ---------------------------------------------------------------------------------------


class JsonLines:
    """metrics.json: a JSON object a line."""

    def __init__(self, path: Path, images_seen: int) -> None:
        self.path = path
        lines = read_small(path, str.splitlines, []) if images_seen else []
        known = [_parsed(line) for line in lines]
        kept = [each for each in known if each is not None and each[IMAGES] <= images_seen]
        write_text(path, "".join(json.dumps(each) + "\n" for each in kept))

    def write(self, images_seen: int, values: Values) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({IMAGES: images_seen, **values}) + "\n")

    def close(self, *, failed: bool) -> None:
        """Nothing: the file is closed after every line."""


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError):  # a line cut off by a kill, or a foreign one
        return None
    known = isinstance(found, dict) and isinstance(found.get(IMAGES), int)
    return found if known else None


class TensorBoard:
    """A TensorBoard file; of a resumed run it hides the points after the checkpoint."""

    def __init__(self, folder: Path, images_seen: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=images_seen + 1)

    def write(self, images_seen: int, values: Values) -> None:
        """Add a point a name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, images_seen)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002 (this writer has no such state)
        """Flush and close the file."""
        self.writer.close()


# --- Weights & Biases ----------------------------------------------------------------------------


class Wandb:
    """Weights & Biases. Its own environment says where to (WANDB_PROJECT, WANDB_MODE=offline, ...).

    A step is an image seen. A resumed run goes on with the run of the folder; the points between
    its checkpoint and its end are there already, and the same ones are not taken twice.

    Raises:
        InputError: the service refuses (no login, no connection).
    """

    def __init__(self, folder: Path, about: About) -> None:
        import wandb

        identity = _identity(folder, "wandb") or uuid.uuid4().hex[:12]
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                id=identity,
                resume="allow",
                dir=str(folder),
                config={**about.config, "about": dict(about.facts)},
                settings=wandb.Settings(console="off"),  # log.txt has the lines
            )
        except wandb.Error as error:
            fail(
                "train.loggers, wandb",
                expected="a run that can be opened",
                got=error,
                remedy="Log in with `wandb login`, or set WANDB_MODE=offline and send it later: "
                "`wandb sync`.",
            )
        _remember(folder, "wandb", identity)

    def write(self, images_seen: int, values: Values) -> None:
        """Add a point a name."""
        self.run.log(dict(values), step=images_seen)

    def close(self, *, failed: bool) -> None:
        """Finish the run there, with its state."""
        self.run.finish(exit_code=int(failed))


LOGGERS = {"wandb": Wandb}


def _identity(folder: Path, name: str) -> str | None:
    return _identities(folder).get(name)


def _identities(folder: Path) -> dict[str, str]:
    return read_small(folder / _IDENTITIES, lambda text: dict(json.loads(text)), {})


def _remember(folder: Path, name: str, identity: str) -> None:
    known = {**_identities(folder), name: identity}
    write_text(folder / _IDENTITIES, json.dumps(known, indent=1) + "\n")
