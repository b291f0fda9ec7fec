"""The training loop. Everything is counted in images, so a resume is exact (as in NVlabs/edm2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.distributed.tensor import DTensor

from vitdet.checkpoint import AVERAGE
from vitdet.engine import parameters, tune
from vitdet.engine.bad_steps import (
    BadSteps,
    NonFiniteLossError,
    bad_gradients,
    file_names,
    first_bad_output,
    step_text,
)
from vitdet.engine.losses import Batch, DetectorLoss
from vitdet.engine.parallel import (
    distributed,
    give_up_step,
    is_sharded,
    sync_buffers,
    without_sync,
)
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import any_rank, rank, world_size
from vitdet.utils.env import seed_all, seed_from
from vitdet.utils.precision import autocast_dtype

_SMALLEST_SCALE = 1.0  # of fp16's loss; it begins at 65536 and halves at every overflow


class Hook(Protocol):
    """What happens between steps: logging, checkpoints. A subclass may leave out a method."""

    def after_step(self, trainer: Trainer) -> None:
        """Run after each step, which `trainer.images_seen` already counts."""

    def after_train(self, trainer: Trainer) -> None:
        """Run once after the last step."""


class HeadStatistics(EventStorage):
    """Keep the latest numbers that detectron2's heads report, without a wait for the device."""

    def __init__(self) -> None:
        super().__init__(0)
        self.latest_values: dict[str, Any] = {}

    def put_scalar(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        """Keep the value: the parent class converts it to a float at each call."""
        self.latest_values[name] = value.detach() if isinstance(value, torch.Tensor) else value


@dataclass
class StepRecord:
    """What is known of one step until the next log line; tensors stay on the device."""

    losses: torch.Tensor  # (number of losses,) in the order of `names`, of the whole step, detached
    names: tuple[str, ...]
    files: list[str]
    lr: float
    grad_norm: torch.Tensor | None = None  # of the whole gradient, before it is clipped


@dataclass
class Window:
    """Steps and times since the last log line."""

    steps: list[StepRecord] = field(default_factory=list)
    images: int = 0  # over all processes
    data_seconds: float = 0.0  # waited for the loader
    started: float = field(default_factory=time.perf_counter)


class Trainer:
    """Detector, optimizer and schedule, and the steps that join them.

    Args:
        detector: detectron2 meta-architecture on its device.
        optimizer: over the parameters of `detector`. Each group's learning rate at a step is its
            "initial_lr" (by default its "lr") times `schedule(images_seen)`.
        schedule: images seen -> multiplier.
        precision: see `vitdet.utils.precision`; fp16 has a loss scaler.
        seed: with the rank and the images seen it fixes every random number of a step.
        clip_grad_norm: largest norm of the whole gradient, None for no limit.
        accumulate: parts in which a process takes its images of a step, to save memory.
        bad_steps: what follows a loss or gradient that is not finite; by default the run stops.
        ema_decay: of a moving average of the weights (`vitdet.engine.parameters.Ema`).
        ddp: see `vitdet.engine.parallel.distributed`.
    """

    def __init__(
        self,
        detector: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        *,
        precision: str = "fp32",
        seed: int = 0,
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
        bad_steps: BadSteps | None = None,
        ema_decay: float | None = None,
        ddp: dict[str, Any] | None = None,
    ) -> None:
        self.detector = detector
        self.optimizer = optimizer
        self.schedule = schedule
        self.seed = seed
        self.clip_grad_norm = clip_grad_norm
        self.accumulate = accumulate
        self.bad_steps = bad_steps or BadSteps()
        self.ema = None if ema_decay is None else parameters.Ema(detector, ema_decay)
        self.device = next(detector.parameters()).device
        self.dtype = autocast_dtype(precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.detector_loss = DetectorLoss(detector, seed=seed)
        self.detector_loss.check_parts(accumulate)
        self.loss = distributed(self.detector_loss, self.device, ddp or {}, self.dtype)
        self.images_seen = 0
        self.num_images = 0
        self.window = Window()
        self.statistics = HeadStatistics()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def run(self, batches: Iterator[Batch], num_images: int, hooks: Sequence[Hook] = ()) -> None:
        """Train until `num_images` images have been seen by all processes together."""
        self.num_images = num_images
        if self.ema is not None and self.images_seen == 0:
            self.ema.restart()  # weights may have been loaded since the trainer was made
        self.detector.train()
        self.window = Window()
        with self.statistics:
            while self.images_seen < self.num_images:  # a hook may set an earlier end
                waiting = time.perf_counter()
                batch = next(batches)
                self.window.data_seconds += time.perf_counter() - waiting
                self.step(batch)
                ended = time.perf_counter()
                for hook in hooks:
                    hook.after_step(self)
                # Evaluations and checkpoints are no part of the training speed.
                self.window.started += time.perf_counter() - ended
        for hook in hooks:
            hook.after_train(self)

    def step(self, batch: Batch) -> None:
        """Take one step with this process's part of the batch, unless it is a bad one."""
        seed_all(seed_from(self.seed, rank(), self.images_seen))
        multiplier = self.schedule(self.images_seen)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [each.clone() for each in self.detector.buffers()]
        record, fault = self._gradient(batch)
        if fault is None:
            fault = self._update(record)
        if fault is None:
            self.window.steps.append(record)
        else:
            self._give_up(batch, record, fault)
            for buffer, value in zip(self.detector.buffers(), buffers, strict=True):
                buffer.copy_(value)  # a forward pass has moved the statistics of BatchNorm
        images = len(batch) * world_size()
        self.images_seen += images
        self.window.images += images

    def _gradient(self, batch: Batch) -> tuple[StepRecord, str | None]:
        """Leave the gradient of the mean loss in the parameters.

        Returns the step's record, and what is wrong: None for nothing, "" for another process's
        loss.
        """
        nothing = torch.zeros((), device=self.device)
        record = StepRecord(nothing, (), file_names(batch), self._lr())
        parts = self._parts(batch)
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else without_sync(self.loss):
                loss, fault = self._loss(part, record, share=1 / len(parts))
                if any_rank(fault is not None):
                    give_up_step(self.loss)
                    return record, fault or ""
                self.scaler.scale(loss).backward()
        return record, None

    def _parts(self, batch: Batch) -> list[Batch]:
        assert len(batch) % self.accumulate == 0, "the loader shares a batch out equally"
        size = len(batch) // self.accumulate
        return [batch[first : first + size] for first in range(0, len(batch), size)]

    def _loss(
        self, part: Batch, record: StepRecord, share: float
    ) -> tuple[torch.Tensor, str | None]:
        """Return the part's share in the loss of the step, and what is wrong with it."""
        try:
            with self._autocast():
                losses = self.loss(part)
        except FloatingPointError as error:  # detectron2's proposals found a NaN before us
            return record.losses, str(error).rstrip(".")
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        record.names = tuple(losses)
        record.losses = record.losses + values * share
        fault = None
        if not bool(values.isfinite().all()):
            terms = zip(record.names, values.tolist(), strict=True)
            fault = ", ".join(f"{name}={value:.4g}" for name, value in terms)
        return torch.stack(list(losses.values())).sum() * share, fault

    def _update(self, record: StepRecord) -> str | None:
        """Move weights and average along the gradient; return why not, None when they moved."""
        self.scaler.unscale_(self.optimizer)
        weights = list(self.detector.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        record.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # fp16 overflows now and then: its scaler passes over the step by itself.
        if not self.scaler.is_enabled() and not bool(record.grad_norm.isfinite()):
            return ""
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(weights, self.clip_grad_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and (scale := self.scaler.get_scale()) < _SMALLEST_SCALE:
            return f"gradients that overflow in fp16 again and again (loss scale {scale:.3g})"
        if self.ema is not None:
            self.ema.update()
        return None

    def _give_up(self, batch: Batch, record: StepRecord, fault: str) -> None:
        """Report a bad step; its batch is run once more under the same random numbers for that."""
        gradients = bad_gradients(self.detector, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss if is_sharded(self.detector) else self.detector_loss

        def forward() -> None:
            seed_all(seed_from(self.seed, rank(), self.images_seen))
            for part in self._parts(batch):
                with self._autocast(), suppress(FloatingPointError):
                    loss(part)
                give_up_step(loss)

        output = first_bad_output(self.detector, forward)
        what, found = fault or "a gradient that is not finite", output or gradients
        what += f" ({found})" if found else ""
        text = step_text(what, self.images_seen, record.lr, record.files)
        about = {"images_seen": self.images_seen, "seed": self.seed, "accumulate": self.accumulate}
        about["autocast"] = "" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        self.bad_steps.meet(text, batch, about, guilty=bool(fault or output))

    def check_weights(self) -> None:
        """Raise a NonFiniteLossError if a weight is not finite, as after such a gradient."""
        state = self.detector.state_dict()
        if self.ema is not None:
            state |= {f"{AVERAGE}.{name}": value for name, value in self.ema.state.items()}
        bad = [name for name, value in state.items() if not bool(value.isfinite().all())]
        if bad:
            what = f"{len(bad)} tensors that are not ({bad[0]}, ...)"
            files = self.window.steps[-1].files if self.window.steps else []
            raise NonFiniteLossError(step_text(what, self.images_seen, self._lr(), files))

    def next_window(self) -> Window:
        """Return the steps since the last call, and start anew."""
        window, self.window = self.window, Window()
        return window

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs; random numbers follow from seed and images seen.

        All processes must call it: from then on they have the same buffers.
        """
        sync_buffers(self.detector.buffers())
        states = {"model": self.detector.state_dict()}
        if self.ema is not None:
            named = dict(self.detector.named_buffers())
            sync_buffers(value for name, value in self.ema.state.items() if name in named)
            states[AVERAGE] = self.ema.state
        met = {"bad_steps": list(self.bad_steps.met)} if self.bad_steps.met else {}
        return {
            **tune.for_file(self.detector, states),
            **met,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "images_seen": self.images_seen,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any], *, source: str) -> None:
        """Continue from `state_dict()` of `source`; the caller loads the weights.

        The learning rates and weight decays stay those of the config.

        Raises:
            InputError: another seed or optimizer, or only one of both has an average.
        """
        if state["seed"] != self.seed:
            text = f"expected {state['seed']}, with which the run began, got {self.seed}"
            raise InputError(f"train.seed for resuming {source}: {text}. Give that one.")
        self._load_average(state, source)
        mine = self.optimizer.state_dict()
        try:
            moments = parameters.moments_of(self.detector, self.optimizer, state, source)
            self.optimizer.load_state_dict({**mine, "state": moments})
            if state["scaler"] and self.scaler.is_enabled():  # empty when the run had no fp16
                self.scaler.load_state_dict(state["scaler"])
            self.bad_steps.met = list(state.get("bad_steps", ()))
        except (LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"checkpoint {source}: expected the state of an optimizer and a loss scaler, got "
                f"something else ({type(error).__name__}: {error}). Take the one before it."
            ) from error
        self.images_seen = state["images_seen"]

    def _load_average(self, state: dict[str, Any], source: str) -> None:
        """Continue the average of the weights; what a run began with, it goes on with."""
        if (self.ema is None) != (AVERAGE not in state):
            has = "no average" if AVERAGE not in state else "an average"
            got = None if self.ema is None else self.ema.decay
            text = f"the file holds {has} of the weights, got {got}. See config.yaml of the run"
            raise InputError(f"train.ema_decay for resuming {source}: {text}.")
        if self.ema is not None:
            self.ema.load(state[AVERAGE])
