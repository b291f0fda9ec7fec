"""Where the numbers of a run go: files, TensorBoard, and what `train.loggers` names.

Each writer takes lines of {name: value} at a number of images seen. Only the main process has any.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vitdet.utils.checks import fail, nearest
from vitdet.utils.files import write_text

Values = Mapping[str, float]
IMAGES = "images_seen"
_PROJECT = "vitdet"
_LONGEST = 6000  # characters of a value that MLflow keeps
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
        tags: words to find the run by.
        facts: {name: text}: versions, data.
    """

    config: dict[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
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
            remedy = f"Install it (pip install 'vitdet[{name}]'), or leave it out of train.loggers."
            fail("train.loggers", expected=f"the package {name}", got="none", remedy=remedy)


def open_writers(
    folder: Path, images_seen: int, loggers: Sequence[str], about: About
) -> list[Writer]:
    """Return the writers of a run's folder; what was written after `images_seen` goes."""
    lines = JsonLines(folder / "metrics.json", images_seen)
    table = Table(folder / "metrics.csv", lines.kept)
    board = TensorBoard(folder, images_seen)
    return [lines, table, board, *(LOGGERS[name](folder, about) for name in loggers)]


# --- files ---------------------------------------------------------------------------------------


class JsonLines:
    """metrics.json: a JSON object a line.

    Attributes:
        kept: the lines that were there and stay.
    """

    def __init__(self, path: Path, images_seen: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        known = [_parsed(line) for line in lines] if images_seen else []
        self.kept = [each for each in known if each is not None and each[IMAGES] <= images_seen]
        write_text(path, "".join(json.dumps(each) + "\n" for each in self.kept))

    def write(self, images_seen: int, values: Values) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({IMAGES: images_seen, **values}) + "\n")

    def close(self, *, failed: bool) -> None:
        """Nothing: the file is closed after every line."""


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
        return found if IMAGES in found else None
    except json.JSONDecodeError:  # a line cut off by a kill
        return None


class Table:
    """metrics.csv: the lines of metrics.json as a table, a column for every name so far.

    A new name (the first evaluation brings some) is a new last column; the file is then written
    anew as a whole, with nothing in that column before. Columns never change their order.

    Args:
        path: of the file.
        rows: what it begins with.
    """

    def __init__(self, path: Path, rows: Sequence[Values]) -> None:
        self.path = path
        self.rows = [dict(row) for row in rows]
        self.names = list(dict.fromkeys([IMAGES, *(name for row in self.rows for name in row)]))
        self._rewrite()

    def write(self, images_seen: int, values: Values) -> None:
        """Append a row, or write all of them when it has new columns."""
        row = {IMAGES: images_seen, **values}
        self.rows.append(row)
        new = [name for name in row if name not in self.names]
        if new:
            self.names += new
            self._rewrite()
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.names, lineterminator="\n").writerow(row)

    def close(self, *, failed: bool) -> None:
        """Nothing: the file is closed after every row."""

    def _rewrite(self) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, self.names, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_text(self.path, text.getvalue())


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


# --- W&B and MLflow ------------------------------------------------------------------------------


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
                tags=list(about.tags),
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


class MlFlow:
    """MLflow: the store of MLFLOW_TRACKING_URI, by default a database in the run's folder.

    (Its store of plain files is refused by MLflow 3.) A resumed run goes on with the run of the
    folder; points that it makes again stand there twice, with the same numbers.

    Raises:
        InputError: the store refuses.
    """

    def __init__(self, folder: Path, about: About) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        own = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        store = os.environ.get("MLFLOW_TRACKING_URI", own)
        try:
            self.client = MlflowClient(tracking_uri=store)
            known = _identity(folder, "mlflow")
            self.run_id = known or self._new_run(folder, about)
            if known:
                self.client.update_run(known, status="RUNNING")
        except MlflowException as error:
            remedy = "Correct MLFLOW_TRACKING_URI, or leave it unset for a database in the folder."
            fail("train.loggers, mlflow", expected=f"a store at {store}", got=error, remedy=remedy)
        _remember(folder, "mlflow", self.run_id)

    def _new_run(self, folder: Path, about: About) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        tags = {f"vitdet.{key}": text for key, text in about.facts.items()}
        tags |= {"vitdet.tags": ", ".join(about.tags)}
        run = self.client.create_run(experiment, tags=tags, run_name=folder.resolve().name)
        params = [Param(key, value) for key, value in _flat(about.config)]
        for start in range(0, len(params), 100):  # the most that it takes at once
            self.client.log_batch(run.info.run_id, params=params[start : start + 100])
        return run.info.run_id

    def write(self, images_seen: int, values: Values) -> None:
        """Add a point a name."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(re.sub(r"[^\w\-. /:]", "_", name), float(value), now, images_seen)
            for name, value in values.items()
        ]
        self.client.log_batch(self.run_id, metrics=points)

    def close(self, *, failed: bool) -> None:
        """Finish the run there, with its state."""
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


LOGGERS: dict[str, type[Wandb] | type[MlFlow]] = {"wandb": Wandb, "mlflow": MlFlow}


def _identity(folder: Path, name: str) -> str | None:
    path = folder / _IDENTITIES
    return json.loads(path.read_text(encoding="utf-8")).get(name) if path.exists() else None


def _remember(folder: Path, name: str, identity: str) -> None:
    path = folder / _IDENTITIES
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_text(path, json.dumps({**known, name: identity}, indent=1) + "\n")


def _flat(config: Any, key: str = "") -> list[tuple[str, str]]:
    """{"a": {"b": 1}} -> [("a.b", "1")]; what is longer than MLflow keeps is cut, with dots."""
    if isinstance(config, dict) and config:
        parts = (_flat(value, f"{key}.{name}" if key else name) for name, value in config.items())
        return [pair for part in parts for pair in part]
    text = str(config)
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return [(re.sub(r"[^\w\-. /:]", "_", key), text)]
