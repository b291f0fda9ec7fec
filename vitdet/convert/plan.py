"""Which tensors of a file every weight of a model is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vitdet.convert.places import Places
from vitdet.convert.rules import Make, Rule, Shape, Shapes


@dataclass(frozen=True)
class Given:
    """What a file gives for one inner name.

    Attributes:
        keys: the file's keys, more than one when tensors were put together.
        tensor: the numbers.
        rule: the format's rule for the key, None for none.
    """

    keys: tuple[str, ...]
    tensor: torch.Tensor
    rule: Rule | None


@dataclass(frozen=True)
class Step:
    """How one weight of a model is filled.

    Attributes:
        name: the model's.
        inner: its inner name.
        sources: inner names of the file, None for an absent optional one.
        make: the rule, None to take the only source as it is.
    """

    name: str
    inner: str
    sources: tuple[str | None, ...]
    make: Make | None

    def compute(self, tensors: Sequence[torch.Tensor | None], shape: Shape) -> torch.Tensor:
        """Return the weight, not yet fitted to the model's shape."""
        if self.make is not None:
            return self.make.function(tensors, shape)
        (tensor,) = tensors
        assert tensor is not None
        return tensor


def plan(given: Mapping[str, Given], places: Places, target: Shapes) -> list[Step]:
    """Return a step for every weight of the model that the file has something for."""
    steps = []
    for name in target:
        inner = places.inner_of_target(name)
        step = next(
            (s for make in places.fmt.makes if (s := _made(name, inner, make, given))), None
        )
        if step is None and inner in given:
            step = Step(name, inner, (inner,), None)
        if step is not None:
            steps.append(step)
    return steps


def _made(name: str, inner: str, make: Make, given: Mapping[str, Given]) -> Step | None:
    wanted = make.names(inner)
    if not any(each in given for each, _ in wanted):
        return None
    if inner in given and all(each != inner for each, _ in wanted):
        return None
    if not all(optional or each in given for each, optional in wanted):
        return None
    return Step(name, inner, tuple(each if each in given else None for each, _ in wanted), make)
