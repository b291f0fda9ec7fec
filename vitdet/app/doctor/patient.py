"""Goes through the checks in their order; what one of them finds, the next ones can use."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from vitdet.app.doctor.finding import FAULT, Finding
from vitdet.utils.checks import InputError, one_line

Check = Callable[["Patient"], Iterator[Finding]]

# What constructors and functions of a recipe raise for values that do not fit together.
BUILD_ERRORS = (
    *(TypeError, ValueError, AssertionError, KeyError, IndexError, AttributeError),
    *(RuntimeError, ArithmeticError, ImportError, OSError, OmegaConfBaseException),
)


@dataclass
class Patient:
    """A recipe, and what is known of it so far.

    Attributes:
        cfg: the recipe; checks work on copies where they change something.
        processes: that share the batch.
        memory: bytes that each has, None for what is free here.
        train: the training data, None when they cannot be read.
        test: the test data.
        model: on the meta device, None when it cannot be built.
        lengths: a copy of the recipe, durations in images, None when they cannot be known.
    """

    cfg: DictConfig
    processes: int = 1
    memory: int | None = None
    train: Any = None
    test: Any = None
    model: nn.Module | None = None
    lengths: DictConfig | None = None


def examine(
    cfg: DictConfig, *, processes: int, memory_gib: float | None, quick: bool
) -> list[Finding]:
    """Return what every check finds, in the order of a training's start."""
    from vitdet.app.doctor import data, machine, model, settings

    memory = None if memory_gib is None else int(memory_gib * 2**30)
    patient = Patient(cfg, processes, memory)
    findings = list(_guarded("recipe", settings.recipe, patient))
    if findings[0].subject == "parts":  # it lacks what the others look at
        return findings
    checks: list[tuple[str, Check]] = [
        ("batch", settings.batch),
        ("data", data.data),
        ("classes", data.classes),
        ("model", model.model),
        ("sizes", model.sizes),
        ("schedule", settings.schedule),
        ("optimizer", settings.optimizer),
        ("weights", model.weights),
        ("device", machine.device),
        ("memory", machine.memory),
        ("disk", machine.disk),
        ("folder", machine.folder),
        ("packages", machine.packages),
    ]
    for subject, check in checks:
        if not (quick and subject == "memory"):
            findings += _guarded(subject, check, patient)
    return findings


def _guarded(subject: str, check: Check, patient: Patient) -> Iterator[Finding]:
    """Yield what a check finds; an error of the recipe's own parts becomes a fault."""
    try:
        yield from check(patient)
    except InputError as error:
        text, _, remedy = str(error).rpartition(". ")
        yield Finding(FAULT, subject, text or remedy, remedy if text else "")
    except BUILD_ERRORS as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: "
        said = one_line(f"{said}{error}")[:400]
        remedy = "A value of the recipe does not fit: compare it with a recipe under configs/."
        yield Finding(FAULT, subject, said, remedy)
