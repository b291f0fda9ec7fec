"""Recipes as rows of a table: configs/paper/t4_in1k_b.py is a row of configs/paper.py.

A row has its record and the changes that make it out of its family's parts. `vitdet.load_config`
reads the table anew for every recipe, so a change may alter the parts in place.
"""

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

KEYS = ("model", "dataloader", "optimizer", "schedule", "train")  # of a recipe
Change = Callable[[SimpleNamespace], None]

MAE_B, MAE_L = "mae_pretrain_vit_base.pth", "mae_pretrain_vit_large.pth"
MAE_H = "mae_pretrain_vit_huge_p14to16.pth"  # MAE's, with its patches of 14 pixels resized to 16
PE_CORE_G, PE_SPATIAL_G = "PE-Core-G14-448.pt", "PE-Spatial-G14-448.pt"


class Row(NamedTuple):
    """One recipe.

    `published` is box AP / mask AP of the source's own weights on COCO val2017 or LVIS v1 val, ""
    where there are none; `millions` counts parameters.
    """

    published: str
    millions: float
    source: str
    changes: tuple[Change, ...] = ()
    start: str = MAE_B  # the file that converter.py makes train.init_checkpoint of; "": none
    note: str = ""


class Recipes:
    """The recipes of a table by name; calling it with a name makes that recipe's nodes."""

    def __init__(self, rows: Mapping[str, Row], weights: str, table: Mapping[str, Any]) -> None:
        self.rows, self.weights = dict(rows), weights
        self.parts = {key: table[key] for key in KEYS}

    def __call__(self, name: str) -> dict[str, Any]:
        """Return {"model": node, "dataloader": node, ...} of the row."""
        row, parts = self.rows[name], SimpleNamespace(**self.parts)
        for change in row.changes:
            change(parts)
        if row.start:
            stem = re.sub(r"_\d+ep$", "", name)
            parts.train.init_checkpoint = f"weights/{self.weights}_{stem}_init.pth"
        return vars(parts)


def steps(iterations: int, *milestones: int, batch: int = 64, warmup: float = 250) -> Change:
    """Train for so many iterations; the rate is a tenth after each milestone."""

    def change(parts: SimpleNamespace) -> None:
        parts.train.num_images = parts.schedule.num_images = iterations * batch
        parts.schedule.milestones = [milestone * batch for milestone in milestones]
        parts.schedule.warmup = warmup * batch

    return change


def optimizer(**values: Any) -> Change:
    """Set values of the optimizer."""
    return lambda parts: parts.optimizer.update(values)


def training(**values: Any) -> Change:
    """Set values of `train`."""
    return lambda parts: parts.train.update(values)


def net(**values: Any) -> Change:
    """Set arguments of the transformer."""

    def change(parts: SimpleNamespace) -> None:
        backbone = parts.model.backbone
        (backbone.get("net") or backbone.bottom_up).update(values)

    return change
