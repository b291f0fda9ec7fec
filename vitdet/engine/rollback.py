"""Going back to the last checkpoint after a bad step (train.on_bad_step=rollback)."""

from __future__ import annotations

from collections.abc import Iterable

from vitdet.engine.checkpoints import Checkpoints
from vitdet.engine.run_folder import last_checkpoint, usable
from vitdet.engine.trainer import Trainer
from vitdet.engine.weights import load_weights
from vitdet.utils.checks import fail
from vitdet.utils.distributed import broadcast_object


def enable_rollback(trainer: Trainer, checkpoints: Checkpoints, class_names: Iterable[str]) -> None:
    """Give the trainer a way back to the last checkpoint of its run.

    A run without one, a new run, gets one of its start. Every process must call this.

    Args:
        trainer: with the weights that the run begins with.
        checkpoints: of the run.
        class_names: of the data.
    """
    if trainer.bad_steps.policy != "rollback":
        return
    names = tuple(class_names)

    def go_back(trainer: Trainer) -> str:
        checkpoints.wait()
        found = usable(checkpoints.output_dir)
        if found is None:
            fail(
                f"checkpoints in {checkpoints.output_dir}",
                expected="one to go back to (train.on_bad_step=rollback)",
                got="none",
                remedy="Start the run anew, and leave its folder alone meanwhile.",
            )
        source = str(found.path)
        load_weights(trainer.detector, found.content, source, names)
        trainer.load_state_dict(found.content, source=source)
        return source

    trainer.bad_steps.go_back = go_back
    if broadcast_object(last_checkpoint(checkpoints.output_dir)) is None:
        if trainer.ema is not None:
            trainer.ema.restart()  # as at the first step
        checkpoints.save_now(trainer)
