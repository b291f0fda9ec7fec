"""Steps whose loss or gradient is not finite: their report, a file of the batch, what follows.

A bad step is not made: the weights stay as they were before it. Its batch is run once more under
the same random numbers, with hooks on every module, to name what is at fault.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Instances
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from vitdet import checkpoint
from vitdet.engine.losses import Batch, cut
from vitdet.engine.parallel import give_up_step, is_sharded
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import all_gather_object, rank, world_size
from vitdet.utils.env import seed_all, seed_from

logger = logging.getLogger(__name__)

POLICIES = ("stop", "skip")
_MOST_NAMES = 8  # of parameters in a text


class NonFiniteLossError(InputError):
    """A loss or a gradient is infinite or not a number. Nothing of its step has been saved."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"training: expected finite losses and weights, got {what}. Look at these images, "
            "lower optimizer.lr or lengthen the warm-up, or use train.precision=bf16 or fp32; then "
            "continue with --resume, with train.on_bad_step=skip to pass over such steps."
        )


@dataclass
class Step:
    """A step that was not made, as this process knows it."""

    loss: Any  # a DetectorLoss; of sharded weights what `distributed` made of it
    optimizer: torch.optim.Optimizer  # with the learning rates of the step
    batch: Batch  # this process's part
    accumulate: int  # parts in which it was taken
    seed: int  # of the run
    images_seen: int  # before the step
    dtype: torch.dtype | None  # of autocast
    fault: str  # seen in this process; "" when it was another one's or the gradient's
    together: bool  # whether all processes report this step


class BadSteps:
    """What a run does about bad steps, and those that it has met.

    Args:
        policy: "stop", or "skip": go on with the next batch.
        limit: bad steps that a run may meet; one more stops it. With "stop" there is none.
        folder: where the batches are written, None for nowhere.

    Raises:
        InputError: a negative limit.
    """

    def __init__(
        self, policy: str = "stop", *, limit: int = 10, folder: Path | None = None
    ) -> None:
        if limit < 0:
            raise InputError(f"train.max_bad_steps: expected 0 or more, got {limit}.")
        self.policy = policy
        self.limit = 0 if policy == "stop" else limit
        self.folder = folder
        self.met: list[str] = []  # a line each; part of a run's state

    def meet(self, step: Step) -> None:
        """Report a step, then do what the policy says.

        Raises:
            NonFiniteLossError: the policy is "stop", or there were too many.
        """
        text = self._report(step)
        self.met.append(text)
        if len(self.met) > self.limit:
            if self.policy != "stop":
                text = f"{len(self.met)} bad steps, more than train.max_bad_steps={self.limit}: "
                text += "; ".join(self.met)
            raise NonFiniteLossError(text)
        number, most = len(self.met), self.limit
        logger.warning("bad step %d of at most %d, passed over: %s", number, most, text)

    def _report(self, step: Step) -> str:
        """Return the step in a line, and write the batches of the processes at fault."""
        several = world_size() > 1
        together = step.together and several
        details, faulty = examine(step) if together or not several else ("", False)
        what = step.fault or "a gradient that is not finite"
        lr = max(group["lr"] for group in step.optimizer.param_groups)
        what += f" ({details})" if details else ""
        text = step_text(what, step.images_seen, lr, file_names(step.batch))
        path = None
        if self.folder is not None:
            name = f"{step.images_seen:09d}{f'.rank{rank()}' * several}.pth"
            path = self.folder / name
            text += f", written to {path}"
        guilty = {rank(): text}
        if together:
            every = dict(enumerate(all_gather_object((bool(step.fault) or faulty, text))))
            # Nobody's, when the sum over the processes was too large or the fault did not come back
            named = [number for number, (flag, _) in every.items() if flag] or list(every)
            guilty = {number: every[number][1] for number in named}
        if path is not None and rank() in guilty:
            first = not self.met and rank() == min(guilty)  # weights once: they may be gigabytes
            _write(path, step, text, weights=first and not is_sharded(step.loss.detector))
        if not together:
            return text
        return "; ".join(f"process {number}: {line}" for number, line in guilty.items())


def step_seed(seed: int, images_seen: int) -> int:
    """Return the seed of this process's random numbers in a step."""
    return seed_from(seed, rank(), images_seen)


def step_text(what: str, images_seen: int, lr: float, files: Sequence[str]) -> str:
    """Return what happened in a step in words."""
    images = f" with images {', '.join(files)}" if files else ""
    return f"{what} after {images_seen} images at lr {lr:.3g}{images}"


def file_names(batch: Batch) -> list[str]:
    """Return file name and id of every image."""
    ids = [f" (id {record['image_id']})" if "image_id" in record else "" for record in batch]
    return [f"{each.get('file_name', '?')}{id_}" for each, id_ in zip(batch, ids, strict=True)]


def _write(path: Path, step: Step, text: str, *, weights: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "reason": text,
        "images": [_plain(record) for record in step.batch],
        "images_seen": step.images_seen,
        "seed": step.seed,
        "rank": rank(),
        "accumulate": step.accumulate,
        "autocast": "" if step.dtype is None else str(step.dtype).removeprefix("torch."),
    }
    checkpoint.write(
        path, content | ({"model": step.loss.detector.state_dict()} if weights else {})
    )


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """A model input as tensors and plain values, which a file may hold."""
    plain = {k: v for k, v in record.items() if isinstance(v, torch.Tensor | str | int | float)}
    if "instances" not in record:
        return plain
    truth: Instances = record["instances"]
    # of Boxes and BitMasks; of PolygonMasks arrays
    fields = {name: getattr(value, "tensor", value) for name, value in truth.get_fields().items()}
    for name, value in fields.items():
        if hasattr(value, "polygons"):
            fields[name] = [[torch.as_tensor(p) for p in parts] for parts in value.polygons]
    return {**plain, "instances": {"image_size": list(truth.image_size), **fields}}


def examine(step: Step) -> tuple[str, bool]:
    """Run the step once more, and look at the output of every module and at the gradient.

    Of weights that are sharded over processes there is no gradient of one process: that of the step
    is looked at, this process's part. Afterwards no parameter has a gradient.

    Returns:
        What is not finite, in words, and whether anything was.
    """
    detector = step.loss.detector
    sharded = is_sharded(detector)
    learning = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    bad = [n for n, p in learning.items() if sharded and not _finite(p.grad)]
    step.optimizer.zero_grad(set_to_none=True)  # gives the memory back for another one
    sums = [] if sharded else [torch.zeros_like(each) for each in learning.values()]
    buffers = [(buffer, buffer.clone()) for buffer in detector.buffers()]  # BatchNorm's statistics
    seed_all(step_seed(step.seed, step.images_seen))
    eager = torch.compiler.set_stance("force_eager")  # compiled blocks would not call the hooks
    text, finite = "", True
    with eager, torch.set_grad_enabled(not sharded), _hooked(detector) as first:
        for part in cut(step.batch, step.accumulate):
            try:
                losses = _loss(step, part)
            except FloatingPointError:  # detectron2's proposals; the module is known by now
                give_up_step(step.loss)
                text = "the proposals are not finite"
                break
            finite = finite and _finite(losses)
            if sharded or first:  # of such an output every gradient is as bad
                give_up_step(step.loss)
                continue
            # Not backward(): it would add to the parameters' gradients and call their hooks.
            total = losses.sum() / step.accumulate
            weights = list(learning.values())
            torch._foreach_add_(sums, torch.autograd.grad(total, weights, materialize_grads=True))
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    if first:
        return f"first not finite: the output of {first[0]}", True
    if text:
        return text, True
    bad += [name for name, each in zip(learning, sums, strict=False) if not _finite(each)]
    if bad:
        return f"gradient not finite in {len(bad)} parameters: {_named(bad, step)}", True
    if not _finite(nn.utils.get_total_norm(sums)):
        return "every number of it is finite, its norm is not", True
    return ("finite when the batch was run once more", False) if finite else ("", True)


def _loss(step: Step, part: Batch) -> torch.Tensor:
    device = next(step.loss.detector.parameters()).device
    with torch.autocast(device.type, step.dtype, enabled=step.dtype is not None):
        return torch.stack(list(step.loss(part).values()))


def _named(names: list[str], step: Step) -> str:
    """The parameters with their learning rates in the step."""
    groups = step.optimizer.param_groups
    rates = {id(value): group["lr"] for group in groups for value in group["params"]}
    parameters = dict(step.loss.detector.named_parameters())
    lrs = [rates.get(id(parameters[name])) for name in names[:_MOST_NAMES]]
    shown = [n if lr is None else f"{n} at lr {lr:.3g}" for n, lr in zip(names, lrs, strict=False)]
    return ", ".join(shown + ["..."] * (len(names) > _MOST_NAMES))


@contextmanager
def _hooked(detector: nn.Module) -> Iterator[list[str]]:
    """Give the first module whose output is not finite: the innermost one, as it ends first."""
    found: list[str] = []

    def hook_of(name: str) -> Any:
        def look(module: nn.Module, _: Any, output: Any) -> None:
            tensors = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor)]
            if not found and not all(map(_finite, tensors)):
                sound = all(map(_finite, module.parameters(recurse=False)))
                found.append(name if sound else f"{name}, its own weights are not finite")

        return look

    named = detector.named_modules()
    handles = [part.register_forward_hook(hook_of(name or "the detector")) for name, part in named]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: torch.Tensor | None) -> bool:
    local = value.to_local() if isinstance(value, DTensor) else value
    return local is None or bool(local.detach().isfinite().all())
