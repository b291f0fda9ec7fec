"""The checkpoints of a run: their names, when they are written, which stay, which can be used."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vitdet import checkpoint
from vitdet.engine.parallel import cpu_copy
from vitdet.engine.trainer import Hook, Trainer
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import barrier, is_main, main_only
from vitdet.utils.files import link_or_copy, read_small, tidy, write_text

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"  # names the checkpoint that --resume continues from
FINAL = "model_final.pth"
BEST = "model_best.pth"
_NUMBERED = re.compile(r"model_(\d{9,})\.pth")
_NEEDED: dict[str, type] = {"model": dict, "optimizer": dict, "images_seen": int, "seed": int}


class Found(NamedTuple):
    """A checkpoint that can be used, and what is in it."""

    path: Path
    content: dict[str, Any]


def due(trainer: Trainer, every: int, images: int) -> bool:
    """Whether the last step, of `images` images, passed a multiple of `every` (0: never)."""
    return every > 0 and trainer.images_seen // every > (trainer.images_seen - images) // every


def _ages(folder: Path) -> dict[str, float]:
    """Images of the numbered checkpoints by name, and the final one, which is the newest."""
    found = {path.name: _NUMBERED.fullmatch(path.name) for path in folder.glob("model_*.pth")}
    ages = {name: float(match[1]) for name, match in found.items() if match}
    return ages | ({FINAL: float("inf")} if (folder / FINAL).exists() else {})


# --- which can be used ---------------------------------------------------------------------------


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the path that `last_checkpoint` names, None when the folder holds no run."""
    there = (output_dir / LAST).exists()
    return output_dir / (_pointed(output_dir) or LAST) if there else None


def usable(output_dir: Path) -> Found | None:
    """Return the last checkpoint, or the newest before it that is not damaged.

    The main process looks, and all take the same. None when the folder holds no run.

    Raises:
        InputError: there are checkpoints, but none that can be read.
    """
    found: list[Found] = []

    def look() -> str | None:
        if (output_dir / LAST).exists():
            found.append(_newest_whole(output_dir))
        return found[0].path.name if found else None

    name = main_only(look)
    if name is None:
        return None
    return found[0] if found else Found(output_dir / name, read_state(output_dir / name))


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint; weights alone, from which none continues, are refused."""
    content = checkpoint.read(path)
    if missing := [key for key in _NEEDED if key not in content]:
        raise InputError(
            f"checkpoint {path}: expected the state of a training, got a file without "
            f"{', '.join(missing)}. Start from it with train.init_checkpoint."
        )
    for key, kind in _NEEDED.items():
        if type(got := content[key]) is not kind:
            text = f"expected {kind.__name__}, got {type(got).__name__} in {key}"
            raise InputError(f"checkpoint {path}: {text}.")
    images, named = content["images_seen"], _NUMBERED.fullmatch(path.name)
    if images < 0 or (named and int(named[1]) != images):
        raise InputError(f"checkpoint {path}: its name does not fit its {images} images seen.")
    return content


def _newest_whole(folder: Path) -> Found:
    """Return the checkpoint that the pointer names, or the newest one that can be read."""
    ages, reasons = _ages(folder), list[str]()
    names = _pointed(folder), *sorted(ages, key=ages.__getitem__, reverse=True)
    for each in dict.fromkeys(filter(None, names)):
        try:
            found = Found(folder / each, read_state(folder / each))
        except InputError as error:
            reasons.append(str(error))
            logger.warning("%s Trying the checkpoint before it.", error)
            continue
        if reasons:
            logger.warning("using %s instead", found.path)
        return found
    got = f"{len(reasons)} that cannot ({reasons[0]})" if reasons else "none"
    raise InputError(
        f"checkpoints in {folder}: expected one that can be read, got {got}. Put a copy back, or "
        f"remove {LAST} to start anew."
    )


def _pointed(folder: Path) -> str:
    """The name in `last_checkpoint`, "" for what is none."""
    name = read_small(folder / LAST, str.strip, "")
    return name if name in (FINAL, BEST) or _NUMBERED.fullmatch(name) else ""


# --- when they are written -----------------------------------------------------------------------


class Checkpoints(Hook):
    """A hook that writes `model_<images>.pth` every so many images, `model_final.pth` at the end.

    The state of the step is copied to the CPU, and a thread of the main process writes the copy
    while training goes on. The next checkpoint and the end wait for it; an error of it is raised
    after the next step. Python waits for the thread when it ends, so what was begun is completed.

    Args:
        output_dir: folder of the run.
        every: images between checkpoints, 0 for only the last one.
        keep: how many of the newest `model_<images>.pth` stay.
        total_batch_size: images a step over all processes.
        note: stored under "vitdet": class names, the config as text, versions.
        resumed: checkpoint that the run goes on from, which holds this moment.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        every: int,
        keep: int,
        total_batch_size: int,
        note: dict[str, Any],
        resumed: Path | None = None,
    ) -> None:
        self.output_dir = output_dir
        self.every = every
        self.keep = max(keep, 1)
        self.total_batch_size = total_batch_size
        self.note = note
        self.newest = resumed and resumed.name  # of this very step, if there is one
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._jobs: list[Future[None]] = []
        if is_main():
            tidy(output_dir)

    def after_step(self, trainer: Trainer) -> None:
        """Write a checkpoint when one is due and training goes on."""
        while self._jobs and self._jobs[0].done():
            self._jobs.pop(0).result()
        self.newest = None
        going_on = trainer.images_seen < trainer.num_images
        if going_on and due(trainer, self.every, self.total_batch_size):
            self.ensure(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Write the last checkpoint, and wait until it is on the disk."""
        self.save(trainer, FINAL)
        self.wait()

    def ensure(self, trainer: Trainer) -> None:
        """Have a checkpoint of this moment written, unless there is one already."""
        if self.newest is None:
            self.save(trainer, f"model_{trainer.images_seen:09d}.pth")

    def save_now(self, trainer: Trainer) -> Path:
        """Have a checkpoint of this moment on the disk when this returns."""
        self.ensure(trainer)
        self.wait()
        assert self.newest is not None
        return self.output_dir / self.newest

    def add_note(self, found: Mapping[str, Any]) -> None:
        """Add what its evaluation found to the note of the checkpoint of this moment."""
        assert self.newest is not None, "an evaluation comes after a checkpoint"
        path = self.output_dir / self.newest

        def add() -> None:
            content = checkpoint.read(path)
            content["vitdet"] = {**content["vitdet"], **found}
            checkpoint.write(path, content)

        if found:
            self._submit(add)

    def keep_best(self) -> None:
        """Give the checkpoint of this moment a second name, `model_best.pth`."""
        assert self.newest is not None, "an evaluation comes after a checkpoint"
        source, best = self.output_dir / self.newest, self.output_dir / BEST
        self._submit(lambda: link_or_copy(source, best))

    def save(self, trainer: Trainer, name: str) -> None:
        """Write a checkpoint under a name.

        Raises:
            NonFiniteLossError: a weight is not finite; nothing is written.
            InputError: the disk refuses, this time or the last.
        """
        trainer.check_weights()
        self._finish()
        state = cpu_copy({**trainer.state_dict(), "vitdet": self.note})
        images_seen = trainer.images_seen
        self._submit(lambda: self._write(name, state, images_seen))
        self.newest = name

    def wait(self) -> None:
        """Wait until everything is written, in every process; raise what went wrong."""
        self._finish()
        barrier()

    def close(self) -> None:
        """Complete what was begun. For an end that has its own error: another is only logged."""
        self._thread.shutdown()
        for job in self._jobs:
            if (error := job.exception()) is not None:
                logger.error("%s", error)

    def _submit(self, job: Callable[[], None]) -> None:
        if is_main():
            self._jobs.append(self._thread.submit(job))

    def _finish(self) -> None:
        while self._jobs:
            self._jobs.pop(0).result()

    def _write(self, name: str, content: dict[str, Any], images_seen: int) -> None:
        """Only when the pointer is written is the checkpoint complete: a kill loses none."""
        checkpoint.write(self.output_dir / name, content)
        write_text(self.output_dir / LAST, name + "\n")
        # those beyond this moment are of a run gone back, and stay
        ages = {each: age for each, age in _ages(self.output_dir).items() if age <= images_seen}
        for old in sorted(ages, key=ages.__getitem__)[: -self.keep]:
            (self.output_dir / old).unlink(missing_ok=True)
        logger.info("saved %s", name)
