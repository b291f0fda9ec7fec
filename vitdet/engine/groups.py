"""What an optimizer does with each parameter of a recipe's model, without data or memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vitdet.config import build_model
from vitdet.engine.freezing import freeze_blocks
from vitdet.engine.inference import build
from vitdet.utils.checks import fail


def group_lines(cfg: DictConfig) -> Iterator[str]:
    """Yield a table of every parameter: name, shape, lr, weight decay; then how many there are.

    Model and optimizer are those that the recipe describes, on the meta device. The lr is the one
    that the schedule multiplies. A parameter that the optimizer does not have is "frozen". The
    number of classes is the recipe's, as no data set is read.

    Raises:
        InputError: no optimizer, and what building the model or the optimizer raises.
    """
    if "optimizer" not in cfg:
        fail(
            "recipe for --print-groups",
            expected="an optimizer",
            got=f"only {', '.join(map(str, cfg))}",
            remedy="Add one to the file; configs/common/optim.py has ViTDet's.",
        )
    model = build_model(cfg.model, device="meta")
    freeze_blocks(model, OmegaConf.select(cfg, "train.freeze_blocks") or 0)
    optimizer = build(cfg.optimizer, model=model)
    found = {
        id(parameter): (f"{group['lr']:.6g}", f"{group['weight_decay']:.6g}")
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    rows = [("name", "shape", "lr", "weight decay")]
    rows += [
        (name, " x ".join(map(str, value.shape)), *found.get(id(value), ("frozen", "-")))
        for name, value in model.named_parameters()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, shape, lr, decay in rows:
        yield f"{name:{widths[0]}}  {shape:>{widths[1]}}  {lr:>{widths[2]}}  {decay:>{widths[3]}}"
    trained = [value.numel() for value in model.parameters() if id(value) in found]
    every = [value.numel() for value in model.parameters()]
    yield (
        f"{len(every)} parameters with {sum(every)} numbers; {len(trained)} with {sum(trained)} "
        f"are trained, in {len(optimizer.param_groups)} groups"
    )


def named_rates(detector: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the highest learning rate now of the parts that a user asks for.

    Returns:
        {"lr/head", "lr/pyramid", "lr/block_0", "lr/block_11"}: the first and the last block. A
        backbone without layers is "lr/backbone"; a part that is frozen is left out.
    """
    parts = {id(value): _part(detector, name) for name, value in detector.named_parameters()}
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        for part in {parts.get(id(value)) for value in group["params"]} - {None}:
            rates[f"lr/{part}"] = max(group["lr"], rates.get(f"lr/{part}", 0.0))
    return dict(sorted(rates.items()))


def _part(detector: nn.Module, name: str) -> str | None:
    """Return the part that a parameter belongs to, None for blocks between first and last."""
    backbone = getattr(detector, "backbone", None)
    inside = name.removeprefix("backbone.")
    if backbone is None or inside == name:
        return "head"
    if not hasattr(backbone, "layer_id"):
        return "backbone"
    layer, last = backbone.layer_id(inside), backbone.num_layers
    if layer > last:
        return "pyramid"
    return f"block_{layer - 1}" if layer in (1, last) else None
