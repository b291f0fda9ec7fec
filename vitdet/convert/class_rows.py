"""The class token's row of `pos_embed`, where source and model keep it in different places."""

from __future__ import annotations

from vitdet.convert.fit import class_rows
from vitdet.convert.places import Places
from vitdet.convert.plan import Given
from vitdet.convert.report import Report
from vitdet.convert.rules import Shapes

_CLASS, _POSITIONS = "cls_token", "pos_embed"


def settle(
    given: dict[str, Given], places: Places, target: Shapes, report: Report, source: str
) -> None:
    """Add the row to the class token when the model has the token and no row for it.

    The first block reads the sum of both, so the network stays the same. timm does so for DINOv2
    with registers (huggingface/pytorch-image-models, models/vision_transformer.py).
    """
    token, positions = given.get(_CLASS), given.get(_POSITIONS)
    shape = target.get(places.target(_POSITIONS) or "")
    if token is None or positions is None or shape is None or places.target(_CLASS) not in target:
        return
    grid = positions.tensor
    if grid.ndim not in (2, 3):
        return
    grid = grid[None] if grid.ndim == 2 else grid
    has = class_rows(grid.shape[1], f"{source}: pos_embed of the file")
    wants = class_rows(shape[1], f"{source}: pos_embed of the model")
    if has and not wants:
        row, rest = grid[:, :1], grid[:, 1:]
        tensor = token.tensor + row.reshape(token.tensor.shape)
        given[_CLASS] = Given((*token.keys, *positions.keys), tensor, token.rule)
        given[_POSITIONS] = Given(positions.keys, rest, positions.rule)
        report.notes.append("pos_embed: class row added to cls_token, the model has none")
