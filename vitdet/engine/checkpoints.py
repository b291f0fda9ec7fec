"""The checkpoints of a run: when they are written, how, and which stay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from vitdet import checkpoint
from vitdet.engine import sharded
from vitdet.engine.background import Writer, on_cpu
from vitdet.engine.hooks import due
from vitdet.engine.parallel import whole
from vitdet.engine.run_folder import (
    BEST,
    FINAL,
    LAST,
    Index,
    in_folder,
    last_checkpoint,
    number_of,
    numbered,
)
from vitdet.engine.trainer import Trainer
from vitdet.utils.distributed import barrier, broadcast_object, is_main
from vitdet.utils.files import digest, link_or_copy, remove, replacing, tidy, write_text

__all__ = ["BEST", "FINAL", "LAST", "Checkpoints", "last_checkpoint"]

logger = logging.getLogger(__name__)


class Checkpoints:
    """Write `model_<images>.pth` every so many images and `model_final.pth` at the end.

    The main process writes a file. In the background, the state of the step is copied to the CPU
    and a thread writes the copy while training goes on. The next checkpoint and the end wait for
    it; an error of it is raised after the next step. With `parts` it is a folder,
    `model_<images>.parts`, to which every process writes what it holds, within the step.

    Args:
        output_dir: folder of the run.
        every: images between checkpoints, 0 for only the last one.
        keep: how many of the newest `model_<images>.pth` stay.
        total_batch_size: images a step over all processes.
        note: stored under "vitdet": class names, the config as text, versions.
        background: write in a thread.
        beside: gives what else a resume needs, {name: plain values}.
        parts: write folders.
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
        parts: bool = False,
    ) -> None:
        self.output_dir = output_dir
        self.every = every
        self.keep = max(keep, 1)
        self.total_batch_size = total_batch_size
        self.note = note
        self.beside = beside
        self.parts = parts
        self.writer = Writer(background=background and not parts)
        self.newest: tuple[str, int] | None = None  # name and images seen, if of this very step
        if is_main():
            tidy(output_dir)
            self.index = Index(output_dir)

    def after_step(self, trainer: Trainer) -> None:
        """Write a checkpoint when one is due and training goes on."""
        self.writer.check()
        self.newest = None
        if trainer.images_seen < trainer.num_images and due(
            trainer, self.every, self.total_batch_size
        ):
            self.save(trainer, self._named(numbered(trainer.images_seen)))

    def after_train(self, trainer: Trainer) -> None:
        """Write the last checkpoint, and wait until it is on the disk."""
        self.save(trainer, self._named(FINAL))
        self.wait()

    def save_now(self, trainer: Trainer) -> Path:
        """Have a checkpoint of this moment on the disk when this returns."""
        name = self._named(numbered(trainer.images_seen))
        if self.newest is None:
            self.save(trainer, name)
        self.wait()
        return self.output_dir / name

    def resumed(self, path: Path | None, images_seen: int) -> None:
        """Know the checkpoint that the run goes on from (None: it begins): it holds this moment."""
        known = path is not None and is_main() and path.name in self.index.entries
        if path is not None and broadcast_object(known):
            self.newest = (path.name, images_seen)

    def save_best(self, trainer: Trainer, then: Callable[[], None]) -> None:
        """Make the state of this moment `model_best.pth`, and do `then` when it is there."""
        if self.newest is None:
            self.save(trainer, self._named(BEST), then)
        elif is_main():
            self.writer.submit(partial(self._link, *self.newest), then)

    def submit(self, job: Callable[[], None]) -> None:
        """Do a job of the main process after what is being written."""
        if is_main():
            self.writer.submit(job)

    def save(self, trainer: Trainer, name: str, *then: Callable[[], None]) -> None:
        """Write a checkpoint under a name, now or in the background.

        Raises:
            NonFiniteLossError: losses or weights are not finite; nothing is written.
            InputError: the disk refuses, this time or the last.
        """
        trainer.check_finite()
        trainer.check_weights()
        self.writer.wait()
        state = {**trainer.state_dict(), **self.beside(), "vitdet": self.note}
        if self.parts:
            self._write_parts(name, state, trainer.images_seen)
            job = partial(self._finish, name, trainer.images_seen)
        else:
            state = whole(state)
            kept = on_cpu(state) if self.writer.background and is_main() else state
            job = partial(self._write, name, kept, trainer.images_seen)
        if is_main():
            self.writer.submit(job, *then)
        if name != self._named(BEST):
            self.newest = (name, trainer.images_seen)
        if not self.writer.background:
            barrier()

    def wait(self) -> None:
        """Wait until everything is written, in every process."""
        self.writer.wait()
        barrier()

    def close(self) -> None:
        """Complete what was begun, at an end of any kind."""
        self.writer.close()

    def _named(self, name: str) -> str:
        return Path(name).with_suffix(sharded.SUFFIX).name if self.parts else name

    def _write(self, name: str, content: dict[str, Any], images_seen: int) -> None:
        checkpoint.write(
            self.output_dir / name,
            content,
            before_rename=lambda partial: self.index.add(name, images_seen, digest(partial)),
        )
        self._finish(name, images_seen)

    def _write_parts(self, name: str, state: dict[str, Any], images_seen: int) -> None:
        """Have every process write its part; the main one gives the folder its name."""
        target = replacing(self.output_dir / name) if is_main() else nullcontext(None)
        with target as mine:
            temporary = broadcast_object(mine)
            sharded.write(temporary, state)
            if is_main():
                self.index.add(name, images_seen, digest(temporary))

    def _finish(self, name: str, images_seen: int) -> None:
        """Only now is the checkpoint complete: a kill before this loses none."""
        if name != self._named(BEST):
            write_text(self.output_dir / LAST, name + "\n")
            self._prune(name, images_seen)
        logger.info("saved %s", self.output_dir / name)

    def _link(self, name: str, images_seen: int) -> None:
        best = self.output_dir / self._named(BEST)
        self.index.add(best.name, images_seen, self.index.entries[name]["sha256"][0])
        link_or_copy(self.output_dir / name, best)
        logger.info("%s is %s", best, name)

    def _prune(self, name: str, images_seen: int) -> None:
        """Remove old numbered checkpoints; those beyond this moment are of a run gone back."""
        ages = {path: number_of(path.name) for path in in_folder(self.output_dir)}
        known = [(age, path) for path, age in ages.items() if age is not None]
        old = sorted((age, path) for age, path in known if age <= images_seen)
        for _, path in old[: -self.keep]:
            if path.name != name:
                remove(path)
