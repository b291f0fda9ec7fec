"""The checkpoints of a run: when they are written, which stay, which one a resume takes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vitdet import checkpoint
from vitdet.engine.hooks import due
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import fail
from vitdet.utils.distributed import barrier, is_main
from vitdet.utils.files import write_text

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
FINAL = "model_final.pth"


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the file that `--resume` continues from, None when the folder holds no run.

    Raises:
        InputError: the file that is named there is gone.
    """
    pointer = output_dir / LAST
    if not pointer.exists():
        return None
    path = output_dir / pointer.read_text(encoding="utf-8").strip()
    if not path.is_file():
        others = sorted(item.name for item in output_dir.glob("model_*.pth"))
        fail(
            str(pointer),
            expected="the name of a checkpoint in the same folder",
            got=f"{path.name}, which is not there",
            remedy=f"Write another name into it (there are: {', '.join(others) or 'none'}), "
            "or remove it to start anew.",
        )
    return path


class Checkpoints:
    """Write `model_<images>.pth` every so many images and `model_final.pth` at the end.

    Args:
        output_dir: folder of the run.
        every: images between checkpoints, 0 for only the last one.
        keep: how many of the newest `model_<images>.pth` stay.
        total_batch_size: images a step over all processes.
        note: stored under "vitdet": class names, the config as text, versions.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        every: int,
        keep: int,
        total_batch_size: int,
        note: dict[str, Any],
    ) -> None:
        self.output_dir = output_dir
        self.every = every
        self.keep = max(keep, 1)
        self.total_batch_size = total_batch_size
        self.note = note
        if is_main():  # what a killed process left
            for partial in output_dir.glob(".*.partial"):
                partial.unlink()

    def after_step(self, trainer: Trainer) -> None:
        """Write a checkpoint when one is due and training goes on."""
        if trainer.images_seen < trainer.num_images and due(
            trainer, self.every, self.total_batch_size
        ):
            self._write(trainer, f"model_{trainer.images_seen:09d}.pth")

    def after_train(self, trainer: Trainer) -> None:
        """Write the last checkpoint."""
        self._write(trainer, FINAL)

    def _write(self, trainer: Trainer, name: str) -> None:
        trainer.check_finite()
        trainer.check_weights()
        if is_main():
            content = {**trainer.state_dict(), "vitdet": self.note}
            checkpoint.write(self.output_dir / name, content)
            # Only now is the new file complete: a kill before this line loses no checkpoint.
            write_text(self.output_dir / LAST, name + "\n")
            numbered = sorted(self.output_dir.glob("model_" + "[0-9]" * 9 + ".pth"))
            for old in numbered[: -self.keep]:
                old.unlink()
            logger.info("saved %s", self.output_dir / name)
        barrier()
