"""The list of a run's training images that could not be read, over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vitdet.engine.trainer import Trainer
from vitdet.utils.distributed import all_gather_object, is_main
from vitdet.utils.files import write_text

LIST = "bad_images.txt"
STATE = "bad_images"  # in checkpoints


class Collected(Protocol):
    """What a loader keeps of them (`vitdet.data.bad_images.BadImages`)."""

    limit: int
    messages: dict[str, str]  # by file name

    def check(self) -> None:
        """Raise an InputError when there are more than the limit."""
        ...


class BadImageList:
    """Write `bad_images.txt`, a line an image, and hold the limit over all processes.

    A process that passes the limit stops at once. The sum over the processes is known at every
    `every`-th step and at checkpoints only, because it takes a message from each.

    Args:
        output_dir: folder of the run.
        every: steps between the messages.
    """

    def __init__(self, output_dir: Path, *, every: int) -> None:
        self.path = output_dir / LIST
        self.collected: Collected | None = None
        self.every = max(every, 1)
        self.steps = 0
        self.written = 0
        self.known: dict[str, str] = {}  # of the checkpoint that the run goes on from

    def load(self, state: Mapping[str, Any], _: int = 0) -> None:
        """Go on with the count in a checkpoint's content."""
        self.known = dict(state.get(STATE, {}))

    def of(self, loader: Any) -> Any:
        """Take the list of a loader that keeps one (its `bad_images`) and has a limit; return it.

        A recipe may describe a loader of another kind: that has none.
        """
        collected = getattr(loader, "bad_images", None)
        if collected is not None and collected.limit > 0:
            self.collected = collected
            collected.messages.update(self.known)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; every process must ask."""
        self.gather()
        messages = self.known if self.collected is None else dict(self.collected.messages)
        return {STATE: messages} if messages else {}

    def after_step(self, trainer: Trainer) -> None:
        """Bring the lists of all processes together, now and then and after the last step.

        Raises:
            InputError: there are more than the limit.
        """
        self.steps += 1
        if self.steps % self.every == 0 or trainer.images_seen >= trainer.num_images:
            self.gather()

    def after_train(self, trainer: Trainer) -> None:
        """Nothing is left: the last step was counted."""

    def gather(self) -> None:
        """Bring the lists of all processes together; every process must call it.

        Raises:
            InputError: there are more than the limit.
        """
        if self.collected is None:
            return
        for theirs in all_gather_object(self.collected.messages):
            self.collected.messages.update(theirs)
        self.close()
        self.collected.check()

    def close(self) -> None:
        """Write what this process knows, also after an error."""
        if self.collected is None or not is_main() or len(self.collected.messages) == self.written:
            return
        lines = [f"{name}\t{message}\n" for name, message in self.collected.messages.items()]
        write_text(self.path, "".join(lines))
        self.written = len(lines)
