"""The checkpoints of a run: their names, when they are written, which stay, which can be used."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vitdet import checkpoint
from vitdet.engine.background import Writer, on_cpu
from vitdet.engine.parallel import whole
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError, fail
from vitdet.utils.distributed import barrier, is_main, main_only
from vitdet.utils.files import link_or_copy, read_small, tidy, write_text

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"  # names the checkpoint that --resume continues from
FINAL = "model_final.pth"
BEST = "model_best.pth"
_NAME = re.compile(r"model_(?P<images>\d{9,}|final|best)\.pth")
_NEEDED: dict[str, type] = {"model": dict, "optimizer": dict, "images_seen": int, "seed": int}
_LONGEST_NAME = 255  # bytes, of common file systems


class Found(NamedTuple):
    """A checkpoint that can be used, and what is in it."""

    path: Path
    content: dict[str, Any]


def due(trainer: Trainer, every: int, images: int) -> bool:
    """Whether the last step, of `images` images, passed a multiple of `every` (0: never)."""
    if every <= 0:
        return False
    return trainer.images_seen // every > (trainer.images_seen - images) // every


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


# --- which can be used ---------------------------------------------------------------------------


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint that `last_checkpoint` names, None when the folder holds no run.

    Raises:
        InputError: what is named there is gone.
    """
    pointer = output_dir / LAST
    if not pointer.exists():
        return None
    name = _pointed(pointer)
    path = output_dir / name
    if not name or not path.exists():
        others = sorted(item.name for item in in_folder(output_dir))
        fail(
            str(pointer),
            expected="the name of a checkpoint in the same folder",
            got=f"{name}, which is not there" if name else "none",
            remedy=f"Write another name into it (there are: {', '.join(others) or 'none'}), "
            "or remove it to start anew.",
        )
    return path


def usable(output_dir: Path) -> Found | None:
    """Return the last checkpoint, or the newest before it that is not damaged.

    The main process looks, and all take the same. None when the folder holds no run.

    Raises:
        InputError: there are checkpoints, but none that can be read.
    """
    found: Found | None = None

    def look() -> str | None:
        nonlocal found
        found = _usable(output_dir)
        return None if found is None else found.path.name

    name = main_only(look)
    if name is None:
        return None
    return found or Found(output_dir / name, read_state(output_dir / name))


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Raises:
        InputError: damaged, or weights alone, from which no training continues.
    """
    content = checkpoint.read(path)
    missing = [key for key in _NEEDED if key not in content]
    if missing:
        fail(
            f"checkpoint {path}",
            expected="the state of a training",
            got=f"a file without {', '.join(missing)}",
            remedy="Start from it with train.init_checkpoint.",
        )
    for key, kind in _NEEDED.items():
        if type(content[key]) is not kind:
            got = f"{type(content[key]).__name__} in {key}"
            raise InputError(f"checkpoint {path}: expected {kind.__name__}, got {got}.")
    images, named = content["images_seen"], number_of(path.name)
    if images < 0 or named not in (None, images):
        raise InputError(f"checkpoint {path}: its name does not fit its {images} images seen.")
    return content


def _usable(output_dir: Path) -> Found | None:
    if not (output_dir / LAST).exists():
        return None
    reasons = []
    for path in _candidates(output_dir):
        try:
            found = Found(path, read_state(path))
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
        got=f"{len(reasons)} that cannot ({reasons[0]})" if reasons else "none",
        remedy=f"Put a copy back, or remove {LAST} to start anew.",
    )


def _candidates(output_dir: Path) -> Iterator[Path]:
    """The checkpoint that `last_checkpoint` names, then those before it, newest first.

    The final and the best do not tell their age: the final is the newest, the best comes last.
    """
    name = _pointed(output_dir / LAST)
    if name:
        yield output_dir / name
    limit = number_of(name)
    order = []
    for path in in_folder(output_dir):
        images = number_of(path.name)
        if path.name == name or (limit is not None and (images is None or images > limit)):
            continue
        order.append((images if images is not None else -1, path.name == FINAL, path))
    if limit is None and name != FINAL:  # the pointer is damaged
        order.sort(key=lambda each: (each[1], each[0]), reverse=True)
    else:
        order.sort(reverse=True)
    for _, _, path in order:
        yield path


def _pointed(pointer: Path) -> str:
    """The name in `last_checkpoint`, "" for what is none."""
    name = read_small(pointer, str.strip, "")
    plain = name == Path(name).name and len(name.encode()) <= _LONGEST_NAME and "\0" not in name
    return name if plain else ""


# --- when they are written -----------------------------------------------------------------------


class Checkpoints:
    """Write `model_<images>.pth` every so many images and `model_final.pth` at the end.

    The main process writes. In the background, the state of the step is copied to the CPU
    and a thread writes the copy while training goes on. The next checkpoint and the end wait for
    it; an error of it is raised after the next step.

    Args:
        output_dir: folder of the run.
        every: images between checkpoints, 0 for only the last one.
        keep: how many of the newest `model_<images>.pth` stay.
        total_batch_size: images a step over all processes.
        note: stored under "vitdet": class names, the config as text, versions.
        background: write in a thread.
        beside: gives what else a resume needs, {name: plain values}.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        every: int,
        keep: int,
        total_batch_size: int,
        note: dict[str, Any],
        background: bool = True,
        beside: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.output_dir = output_dir
        self.every = every
        self.keep = max(keep, 1)
        self.total_batch_size = total_batch_size
        self.note = note
        self.beside = beside
        self.writer = Writer(background=background)
        self.newest: str | None = None  # name of the one of this very step, if there is one
        if is_main():
            tidy(output_dir)

    def after_step(self, trainer: Trainer) -> None:
        """Write a checkpoint when one is due and training goes on."""
        self.writer.check()
        self.newest = None
        if trainer.images_seen < trainer.num_images and due(
            trainer, self.every, self.total_batch_size
        ):
            self.ensure(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Write the last checkpoint, and wait until it is on the disk."""
        self.save(trainer, FINAL)
        self.wait()

    def ensure(self, trainer: Trainer) -> None:
        """Have a checkpoint of this moment written, unless there is one already."""
        if self.newest is None:
            self.save(trainer, numbered(trainer.images_seen))

    def save_now(self, trainer: Trainer) -> Path:
        """Have a checkpoint of this moment on the disk when this returns."""
        self.ensure(trainer)
        self.wait()
        assert self.newest is not None
        return self.output_dir / self.newest

    def resumed(self, path: Path | None) -> None:
        """Know the checkpoint that the run goes on from (None: it begins): it holds this moment."""
        self.newest = None if path is None else path.name

    def keep_best(self, then: Callable[[], None] = lambda: None) -> None:
        """Give the checkpoint of this moment a second name, `model_best.pth`; then do `then`."""
        assert self.newest is not None, "an evaluation comes after a checkpoint"
        if is_main():
            self.writer.submit(partial(self._link, self.newest), then)

    def submit(self, job: Callable[[], None]) -> None:
        """Do a job of the main process after what is being written."""
        if is_main():
            self.writer.submit(job)

    def save(self, trainer: Trainer, name: str) -> None:
        """Write a checkpoint under a name, now or in the background.

        Raises:
            NonFiniteLossError: losses or weights are not finite; nothing is written.
            InputError: the disk refuses, this time or the last.
        """
        trainer.check_finite()
        trainer.check_weights()
        self.writer.wait()
        state = whole({**trainer.state_dict(), **self.beside(), "vitdet": self.note})
        if is_main():
            kept = on_cpu(state) if self.writer.background else state
            self.writer.submit(partial(self._write, name, kept, trainer.images_seen))
        self.newest = name
        if not self.writer.background:
            barrier()

    def wait(self) -> None:
        """Wait until everything is written, in every process."""
        self.writer.wait()
        barrier()

    def close(self) -> None:
        """Complete what was begun, at an end of any kind."""
        self.writer.close()

    def _write(self, name: str, content: dict[str, Any], images_seen: int) -> None:
        """Only when the pointer is written is the checkpoint complete: a kill loses none."""
        checkpoint.write(self.output_dir / name, content)
        write_text(self.output_dir / LAST, name + "\n")
        self._prune(name, images_seen)
        logger.info("saved %s", self.output_dir / name)

    def _link(self, name: str) -> None:
        link_or_copy(self.output_dir / name, self.output_dir / BEST)
        logger.info("%s is %s", self.output_dir / BEST, name)

    def _prune(self, name: str, images_seen: int) -> None:
        """Remove old numbered checkpoints; those beyond this moment are of a run gone back."""
        ages = {path: number_of(path.name) for path in in_folder(self.output_dir)}
        known = [(age, path) for path, age in ages.items() if age is not None]
        old = sorted((age, path) for age, path in known if age <= images_seen)
        for _, path in old[: -self.keep]:
            if path.name != name:
                path.unlink(missing_ok=True)
