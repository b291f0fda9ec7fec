"""What a lr_decay table is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig
from torch import nn


@dataclass
class Table:
    """A model, the arguments of `parameter_table`, and {our name: published name}.

    `recipe` is the project's recipe with the published optimizer, where there is one; `published`
    are arguments of the optimizer that the table itself does not depend on.
    """

    model: nn.Module
    arguments: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)
    recipe: DictConfig | None = None
    published: dict[str, Any] = field(default_factory=dict)
