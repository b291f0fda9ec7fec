"""What happens beside the steps of training, every so many images."""

from __future__ import annotations

from collections.abc import Callable

from vitdet.engine.trainer import Trainer


def due(trainer: Trainer, every: int, images: int) -> bool:
    """Whether the last step, of `images` images, passed a multiple of `every` (0: never)."""
    if every <= 0:
        return False
    return trainer.images_seen // every > (trainer.images_seen - images) // every


class Evaluations:
    """Evaluate every so many images, between the first and the last step.

    Args:
        every: images between evaluations, 0 for none before the end of training.
        total_batch_size: images a step over all processes.
        evaluate: no arguments; evaluates, prints, and returns to training mode.
    """

    def __init__(
        self, *, every: int, total_batch_size: int, evaluate: Callable[[], object]
    ) -> None:
        self.every = every
        self.total_batch_size = total_batch_size
        self.evaluate = evaluate

    def after_step(self, trainer: Trainer) -> None:
        """Evaluate when it is due and training goes on (the end has its own evaluation)."""
        if trainer.images_seen < trainer.num_images and due(
            trainer, self.every, self.total_batch_size
        ):
            self.evaluate()

    def after_train(self, trainer: Trainer) -> None:
        """Nothing: the caller evaluates the final weights."""
