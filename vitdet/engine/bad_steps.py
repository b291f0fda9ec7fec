"""Steps whose loss or gradient is not finite: what is at fault, a file of the batch, the policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from vitdet import checkpoint
from vitdet.engine.losses import Batch
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import all_gather_object, rank, world_size

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


class BadSteps:
    """What a run does about bad steps, and those that it has met.

    Args:
        policy: "stop", or "skip": go on with the next batch.
        limit: bad steps that a run may meet; one more stops it. With "stop" there is none.
        folder: where the batches are written, None for nowhere.
    """

    def __init__(
        self, policy: str = "stop", *, limit: int = 10, folder: Path | None = None
    ) -> None:
        self.policy = policy
        self.limit = 0 if policy == "stop" else limit
        self.folder = folder
        self.met: list[str] = []  # a line each; part of a run's state

    def meet(self, text: str, batch: Batch, about: dict[str, Any], *, guilty: bool) -> None:
        """Report a step and write its batch, then do what the policy says; every process calls it.

        Args:
            text: what this process knows of it.
            batch: this process's part.
            about: {"images_seen": ..., "seed": ..., ...} for the file.
            guilty: whether the fault was seen in this process.

        Raises:
            NonFiniteLossError: the policy is "stop", or there were too many.
        """
        several, path = world_size() > 1, None
        if self.folder is not None:
            path = self.folder / f"{about['images_seen']:09d}{f'.rank{rank()}' * several}.pth"
            text += f", written to {path}"
        found = all_gather_object((guilty, text))
        # nobody's, when the sum over the processes was too large
        named = [number for number, (flag, _) in enumerate(found) if flag] or range(len(found))
        if path is not None and rank() in named:
            path.parent.mkdir(parents=True, exist_ok=True)
            images = [_plain(record) for record in batch]
            checkpoint.write(path, {"reason": text, "images": images, "rank": rank(), **about})
        if several:
            text = "; ".join(f"process {number}: {found[number][1]}" for number in named)
        self.met.append(text)
        number, most = len(self.met), self.limit
        if number > most:
            if self.policy != "stop":
                text = f"{number} bad steps, more than train.max_bad_steps={most}: "
                text += "; ".join(self.met)
            raise NonFiniteLossError(text)
        logger.warning("bad step %d of at most %d, passed over: %s", number, most, text)


def step_text(what: str, images_seen: int, lr: float, files: Sequence[str]) -> str:
    """Return what happened in a step in words."""
    images = f" with images {', '.join(files)}" if files else ""
    return f"{what} after {images_seen} images at lr {lr:.3g}{images}"


def file_names(batch: Batch) -> list[str]:
    """Return file name and id of every image."""
    ids = [f" (id {record['image_id']})" if "image_id" in record else "" for record in batch]
    return [f"{each.get('file_name', '?')}{id_}" for each, id_ in zip(batch, ids, strict=True)]


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """A model input as tensors and plain values, which a file may hold."""
    plain = {k: v for k, v in record.items() if isinstance(v, torch.Tensor | str | int | float)}
    truth = record["instances"].get_fields() if "instances" in record else {}
    fields = {name: getattr(value, "tensor", value) for name, value in truth.items()}
    tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
    return {**plain, "instances": tensors}


def bad_gradients(detector: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return the parameters whose gradient is not finite, with their learning rates; "" for none.

    Of sharded weights every process looks at its part.
    """
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    bad = [(name, p) for name, p in detector.named_parameters() if not _finite(p.grad)]
    if not bad:
        return ""
    named = ", ".join(f"{name} at lr {rates[id(p)]:.3g}" for name, p in bad[:_MOST_NAMES])
    more = ", ..." if len(bad) > _MOST_NAMES else ""
    return f"gradient not finite in {len(bad)} parameters: {named}{more}"


@torch.no_grad()
def first_bad_output(detector: nn.Module, forward: Callable[[], None]) -> str:
    """Call `forward` and return the first module whose output is not finite, "" for none.

    It is the innermost one, as that ends first.
    """
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
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would not call the hooks
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return f"first not finite: the output of {found[0]}" if found else ""


def _finite(value: torch.Tensor | None) -> bool:
    local = value.to_local() if isinstance(value, DTensor) else value
    return local is None or bool(local.detach().isfinite().all())
