"""Steps whose loss or gradient is not finite: their report, a file of the batch, what follows.

A bad step is not made: the weights stay as they were before it. Its batch is run once more under
the same random numbers, this time watched (`vitdet.engine.examine`), to name what is at fault.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from vitdet import checkpoint
from vitdet.engine.examine import Finding, bad_gradients, examine
from vitdet.engine.losses import Batch, cut
from vitdet.engine.parallel import is_sharded
from vitdet.utils.checks import InputError, fail
from vitdet.utils.distributed import all_gather_object, rank, world_size
from vitdet.utils.env import seed_from

if TYPE_CHECKING:
    from vitdet.engine.trainer import Trainer

logger = logging.getLogger(__name__)

POLICIES = ("stop", "skip")


class NonFiniteLossError(InputError):
    """A loss or a gradient is infinite or not a number. Nothing of its step has been saved."""


class BadSteps:
    """What a run does about bad steps, and those that it has met.

    Args:
        policy: "stop", or "skip": go on with the next batch.
        limit: bad steps that a run may meet; one more stops it. With "stop" there is none.
        folder: where the batches are written, None for nowhere.

    Raises:
        InputError: an unknown policy, a negative limit.
    """

    def __init__(
        self,
        policy: str = "stop",
        *,
        limit: int = 10,
        folder: Path | None = None,
    ) -> None:
        if policy not in POLICIES:
            remedy = "stop is the default."
            fail("train.on_bad_step", expected=" or ".join(POLICIES), got=policy, remedy=remedy)
        if limit < 0:
            remedy = "0 stops at the first."
            fail("train.max_bad_steps", expected="0 or more", got=limit, remedy=remedy)
        self.policy = policy
        self.limit = 0 if policy == "stop" else limit
        self.folder = folder
        self.met: list[str] = []  # a line each; part of a run's state

    def meet(self, trainer: Trainer, batch: Batch, fault: str) -> None:
        """Report a step that was not made, then do what the policy says.

        Every process calls this at the same step, unless steps are not checked as they are made.

        Args:
            trainer: as it was before the step.
            batch: this process's part of the batch.
            fault: what was seen in this process, "" when it was another one's or the gradient's.

        Raises:
            NonFiniteLossError: the policy is "stop", or there were too many.
        """
        text = self._report(trainer, batch, fault)
        self.met.append(text)
        if len(self.met) > self.limit:
            if self.policy != "stop":
                text = f"{len(self.met)} bad steps, more than train.max_bad_steps={self.limit}: "
                text += "; ".join(self.met)
            raise NonFiniteLossError(diverged(text))
        number, most = len(self.met), self.limit
        logger.warning("bad step %d of at most %d, passed over: %s", number, most, text)

    def _report(self, trainer: Trainer, batch: Batch, fault: str) -> str:
        """Return the step in a line, and write the batches of the processes at fault."""
        together = trainer.check_each_step and world_size() > 1
        found = _examine(trainer, batch) if together or world_size() == 1 else Finding(seen=False)
        what = fault or "a gradient that is not finite"
        if details := found.text(_rates(trainer)):
            what += f" ({details})"
        lr = max(group["lr"] for group in trainer.optimizer.param_groups)
        text = step_text(what, trainer.images_seen, lr, file_names(batch))
        path = self._path(trainer)
        if path is not None:
            text += f", written to {path}"
        guilty = {rank(): text}
        if together:
            gathered = enumerate(all_gather_object((bool(fault or found), text)))
            every = {number: (flag, line) for number, (flag, line) in gathered}
            # Nobody's, when the sum over the processes was too large or the fault did not come back
            named = [number for number, (flag, _) in every.items() if flag] or list(every)
            guilty = {number: every[number][1] for number in named}
        if path is not None and rank() in guilty:
            first = not self.met and rank() == min(guilty)
            content = _content(trainer, batch, found, text)
            if first and not is_sharded(trainer.detector):  # once a run: it may be gigabytes
                content["model"] = trainer.detector.state_dict()
            _make_folder(path.parent)
            checkpoint.write(path, content)
        if not together:
            return text
        return "; ".join(f"process {number}: {line}" for number, line in guilty.items())

    def _path(self, trainer: Trainer) -> Path | None:
        if self.folder is None:
            return None
        process = f".rank{rank()}" if world_size() > 1 else ""
        return self.folder / f"{trainer.images_seen:09d}{process}.pth"


def step_seed(seed: int, images_seen: int, process: int | None = None) -> int:
    """Return the seed of a process's (this one's) random numbers in a step."""
    return seed_from(seed, rank() if process is None else process, images_seen)


def step_text(what: str, images_seen: int, lr: float, files: Sequence[str]) -> str:
    """Return what happened in a step in words."""
    images = f" with images {', '.join(files)}" if files else ""
    return f"{what} after {images_seen} images at lr {lr:.3g}{images}"


def diverged(what: str) -> str:
    """Return the text of a NonFiniteLossError."""
    return (
        f"training: expected finite losses and weights, got {what}. Look at these images, lower "
        "optimizer.lr or lengthen the warm-up, or use train.precision=bf16 or fp32; then continue "
        "with --resume, with train.on_bad_step=skip to pass over such steps."
    )


def file_names(batch: Batch) -> list[str]:
    """Return file name and id of every image."""
    ids = [f" (id {record['image_id']})" if "image_id" in record else "" for record in batch]
    return [f"{each.get('file_name', '?')}{id_}" for each, id_ in zip(batch, ids, strict=True)]


def _examine(trainer: Trainer, batch: Batch) -> Finding:
    """Run the step once more; the trainer has no gradient afterwards."""
    shared_out = is_sharded(trainer.detector)
    parameters = bad_gradients(trainer.detector) if shared_out else []
    trainer.optimizer.zero_grad(set_to_none=True)  # gives the memory back for another one
    found = examine(
        trainer.loss if shared_out else trainer.detector_loss,
        cut(batch, trainer.accumulate),
        step_seed(trainer.seed, trainer.images_seen),
        trainer.dtype,
    )
    found.parameters += parameters
    return found


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"{folder}: it cannot be made ({error.strerror})"
        raise InputError(f"{what}, so a bad step has no record. Check disk and rights.") from error


def _content(trainer: Trainer, batch: Batch, found: Finding, text: str) -> dict[str, Any]:
    return {
        "reason": text,
        "module": found.module,
        "parameters": found.parameters,
        "images": [_plain(record) for record in batch],
        "images_seen": trainer.images_seen,
        "seed": trainer.seed,
        "rank": rank(),
        "accumulate": trainer.accumulate,
        "autocast": "" if trainer.dtype is None else str(trainer.dtype).removeprefix("torch."),
    }


def _rates(trainer: Trainer) -> dict[str, float]:
    """Learning rates of this step by the names of the parameters."""
    groups = trainer.optimizer.param_groups
    by_id = {id(value): group["lr"] for group in groups for value in group["params"]}
    named = trainer.detector.named_parameters()
    return {name: by_id[id(value)] for name, value in named if id(value) in by_id}


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """A model input as tensors and plain values, which a file may hold."""
    plain = {k: v for k, v in record.items() if isinstance(v, torch.Tensor | str | int | float)}
    if "instances" not in record:
        return plain
    truth: Instances = record["instances"]
    fields: dict[str, Any] = {"image_size": list(truth.image_size)}
    for name, value in truth.get_fields().items():
        if isinstance(value, Boxes | BitMasks):
            fields[name] = value.tensor
        elif isinstance(value, PolygonMasks):
            fields[name] = [[torch.as_tensor(p) for p in parts] for parts in value.polygons]
        elif isinstance(value, torch.Tensor):
            fields[name] = value
    return {**plain, "instances": fields}
