"""The training loop. Everything is counted in images, so a resume is exact (as in NVlabs/edm2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from vitdet.engine import ema
from vitdet.engine.losses import Batch, DetectorLoss, Losses
from vitdet.engine.parallel import distributed
from vitdet.engine.precision import autocast_dtype
from vitdet.utils.checks import InputError, fail
from vitdet.utils.distributed import rank, world_size
from vitdet.utils.env import seed_all, seed_from


class NonFiniteLossError(InputError):
    """The loss is infinite or not a number. Nothing of the step that made it has been saved."""


class Hook(Protocol):
    """What happens beside the steps: logging, checkpoints, evaluation."""

    def after_step(self, trainer: Trainer) -> None:
        """Run after each step, when `trainer.images_seen` already counts the step's images."""

    def after_train(self, trainer: Trainer) -> None:
        """Run once after the last step."""


class HeadStatistics(EventStorage):
    """Keep the latest numbers that detectron2's heads report, without a wait for the device."""

    def __init__(self) -> None:
        super().__init__(0)
        self.latest_values: dict[str, Any] = {}

    def put_scalar(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        """Keep the value as it is: the parent class converts it to a float at each call."""
        self.latest_values[name] = value.detach() if isinstance(value, torch.Tensor) else value


@dataclass
class StepRecord:
    """What is known of one step until the next log line."""

    losses: torch.Tensor  # (number of losses,) in the order of `names`, detached, on the device
    names: tuple[str, ...]
    files: list[str]
    lr: float
    images_seen: int


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
        precision: see `vitdet.engine.precision`; fp16 has a loss scaler.
        seed: with the rank and the images seen it fixes every random number of a step.
        clip_grad_norm: largest norm of the whole gradient, None for no limit.
        ema_decay: keep an exponential moving average of the weights, see `vitdet.engine.ema`; None
            for none. It starts from the weights with which `run` begins at the first image.
        ddp: arguments for DistributedDataParallel when there are several processes, and
            `fp16_compression` (halves the traffic; CUDA).
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
        ema_decay: float | None = None,
        ddp: dict[str, Any] | None = None,
    ) -> None:
        self.detector = detector
        self.optimizer = optimizer
        self.schedule = schedule
        self.seed = seed
        self.clip_grad_norm = clip_grad_norm
        self.ema = None if ema_decay is None else ema.Ema(detector, ema_decay)
        self.device = next(detector.parameters()).device
        self.dtype = autocast_dtype(precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.loss = distributed(DetectorLoss(detector, seed=seed), self.device, ddp or {})
        # On other devices a look at the numbers would wait for the device: see check_finite.
        self.check_each_step = self.device.type == "cpu"
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
            while self.images_seen < num_images:
                waiting = time.perf_counter()
                batch = next(batches)
                self.window.data_seconds += time.perf_counter() - waiting
                self.step(batch)
                beside = time.perf_counter()
                for hook in hooks:
                    hook.after_step(self)
                # Evaluations and checkpoints are no part of the training speed.
                self.window.started += time.perf_counter() - beside
        for hook in hooks:
            hook.after_train(self)

    def step(self, batch: Batch) -> None:
        """Take one step with this process's part of the batch."""
        seed_all(seed_from(self.seed, rank(), self.images_seen))
        multiplier = self.schedule(self.images_seen)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(batch)
        self.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        if self.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.detector.parameters(), self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()
        images = len(batch) * world_size()
        self.images_seen += images
        self.window.images += images

    def _losses(self, batch: Batch) -> Losses:
        try:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                losses: Losses = self.loss(batch)
        except FloatingPointError as error:  # detectron2's proposals found a NaN before us
            self.check_finite()
            raise NonFiniteLossError(_diverged(str(error), _files(batch), self._lr())) from error
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        record = StepRecord(values, tuple(losses), _files(batch), self._lr(), self.images_seen)
        self.window.steps.append(record)
        if self.check_each_step:
            _check_step(record)
        return losses

    def check_finite(self) -> None:
        """Look at the losses since the last log line; call it before anything is saved.

        Raises:
            NonFiniteLossError: one of them is infinite or not a number.
        """
        for record in self.window.steps:
            _check_step(record)

    def check_weights(self) -> None:
        """Look at all weights; call it before they are saved. It waits for the device.

        Raises:
            NonFiniteLossError: some hold a value that is infinite or not a number, which finite
                losses with a gradient that is not finite leave behind.
        """
        state = self.detector.state_dict()
        if self.ema is not None:
            state |= {f"{ema.KEY}.{name}": value for name, value in self.ema.state.items()}
        bad = [name for name, value in state.items() if not bool(value.isfinite().all())]
        if bad:
            files = self.window.steps[-1].files if self.window.steps else []
            what = f"{len(bad)} tensors that are not ({bad[0]}, ...)"
            raise NonFiniteLossError(_diverged(what, files, self._lr()))

    def next_window(self) -> Window:
        """Return the steps since the last call, checked, and start anew."""
        self.check_finite()
        window, self.window = self.window, Window()
        return window

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs; random numbers follow from seed and images seen."""
        average = {} if self.ema is None else {ema.KEY: self.ema.state}
        return {
            "model": self.detector.state_dict(),
            **average,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "images_seen": self.images_seen,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any], *, source: str) -> None:
        """Continue from `state_dict()`; weights are loaded by the caller, who knows their rules.

        The learning rates and weight decays stay those of the config.

        Args:
            state: what `state_dict()` returned.
            source: file name for error messages.

        Raises:
            InputError: the state is of another seed, of an optimizer with other parameters, or
                only one of state and trainer has an average of the weights.
        """
        if state["seed"] != self.seed:
            fail(
                f"train.seed for resuming {source}",
                expected=f"{state['seed']}, with which the run began",
                got=self.seed,
                remedy=f"Add train.seed={state['seed']}, or start anew in another folder.",
            )
        mine = self.optimizer.state_dict()
        saved = state["optimizer"]
        grouping = [[len(group["params"]) for group in s["param_groups"]] for s in (mine, saved)]
        if grouping[0] != grouping[1]:
            fail(
                f"optimizer state in {source}",
                expected=f"{sum(grouping[0])} parameters in {len(grouping[0])} groups",
                got=f"{sum(grouping[1])} in {len(grouping[1])}",
                remedy="Resume with the optimizer settings of the run (see its config.yaml).",
            )
        self._load_average(state, source)
        self.optimizer.load_state_dict({**mine, "state": saved["state"]})
        if state["scaler"] and self.scaler.is_enabled():  # empty when the run had no fp16
            self.scaler.load_state_dict(state["scaler"])
        self.images_seen = state["images_seen"]

    def _load_average(self, state: dict[str, Any], source: str) -> None:
        """Continue the average of the weights; what a run began with, it goes on with."""
        if (self.ema is None) != (ema.KEY not in state):
            fail(
                f"train.ema_decay for resuming {source}",
                expected="the run's: the file holds an average of the weights"
                if self.ema is None
                else "null: the file holds no average of the weights",
                got="null" if self.ema is None else self.ema.decay,
                remedy="Take the value of the run (see its config.yaml), or start a new run from "
                "the file with train.init_checkpoint.",
            )
        if self.ema is not None:
            self.ema.load(state[ema.KEY])


def _files(batch: Batch) -> list[str]:
    return [str(record.get("file_name", "?")) for record in batch]


def _check_step(record: StepRecord) -> None:
    if bool(record.losses.isfinite().all()):
        return
    values = zip(record.names, record.losses.tolist(), strict=True)
    terms = ", ".join(f"{name}={value:.4g}" for name, value in values)
    raise NonFiniteLossError(
        _diverged(f"{terms} after {record.images_seen} images", record.files, record.lr)
    )


def _diverged(what: str, files: list[str], lr: float) -> str:
    images = f" with images {', '.join(files)}" if files else ""
    return (
        f"training: expected finite losses and weights, got {what} at lr {lr:.3g}{images}. "
        "Look at these images, lower optimizer.lr or lengthen the warm-up, or use "
        "train.precision=bf16 or fp32; then continue with --resume."
    )
