"""The parameters of a detector: which learn, how fast, and the compiled blocks that they are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitdet.config import build_model, instantiate
from vitdet.utils.checks import InputError

# Compiled versions of the one function that all blocks share: window or global attention, with or
# without stochastic depth, training or evaluation, one size or any. torch's limit is 8, beyond
# which it goes on uncompiled.
_VERSIONS = 64


def freeze_blocks(detector: nn.Module, blocks: int) -> list[str]:
    """Stop the embeddings (patches, positions) and the first `blocks` blocks from learning.

    Their parameters get no gradient, so a step keeps nothing of them for the backward pass. Call
    it before optimizer, average and parallel wrapper are made. BatchNorm among them keeps its
    running statistics and uses them. Names of weights stay; propagation blocks, which no
    pretraining has, learn on. Stochastic depth stays as the recipe says.

    Args:
        detector: its `backbone` tells the layer of a parameter (`vitdet.backbones.base`).
        blocks: 0 freezes nothing, not even the embeddings.

    Returns:
        The names of the frozen parameters.

    Raises:
        InputError: a number outside the backbone's blocks, or a backbone that does not know them.
    """
    if blocks == 0:
        return []
    backbone: Any = getattr(detector, "backbone", None)
    depth = getattr(backbone, "num_layers", None)  # a pyramid passes the question on to its network
    if not isinstance(depth, int) or not hasattr(backbone, "layer_id"):
        kind = type(getattr(backbone, "net", backbone)).__name__
        raise InputError(
            f"train.freeze_blocks: expected a backbone with layer_id() and num_layers, got {kind}. "
            "Set it to 0 for this backbone."
        )
    if not 0 <= blocks <= depth:
        expected = f"expected 0 to {depth}, the blocks of the backbone"
        raise InputError(f"train.freeze_blocks: {expected}, got {blocks}.")
    frozen = []
    for name, module in backbone.named_modules():
        own = dict(module.named_parameters(name, recurse=False))
        names = [each for each in own if backbone.layer_id(each) <= blocks]
        for each in names:
            own[each].requires_grad_(False)
        if names and isinstance(module, _BatchNorm):
            _keep_statistics(module)
        frozen += [f"backbone.{each}" for each in names]
    return frozen


def _keep_statistics(norm: Any) -> None:
    norm.eval()
    norm.train = lambda *_: norm  # what trains or evaluates the whole detector passes by


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile every transformer block in place by `torch.compile`; names of weights stay.

    A block is compiled when it first runs: once for the first size of image, once more for all
    others. Blocks of the same kind share the work.

    Returns:
        The number of blocks.

    Raises:
        InputError: no module of the model has a list of `blocks`.
    """
    lists = [getattr(module, "blocks", None) for module in model.modules()]
    blocks = [block for each in lists if isinstance(each, nn.ModuleList) for block in each]
    if not blocks:
        raise InputError(
            "train.compile: expected a backbone with blocks (ViT, EVA-01, EVA-02 or ViTAE), got "
            f"none in {type(model).__name__}. Set train.compile=False."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS)
    for block in blocks:
        block.compile(fullgraph=True, **options)
    return len(blocks)


def group_lines(cfg: DictConfig) -> Iterator[str]:
    """Yield a table of every parameter: name, shape, lr, weight decay; then how many there are.

    Model and optimizer are those that the recipe describes, on the meta device. The lr is the one
    that the schedule multiplies. A parameter that the optimizer does not have is "frozen". The
    number of classes is the recipe's, as no data set is read.

    Raises:
        InputError: no optimizer, and what building the model or the optimizer raises.
    """
    if "optimizer" not in cfg:
        keys = ", ".join(map(str, cfg))
        raise InputError(f"recipe for --print-groups: expected an optimizer, got only {keys}.")
    model = build_model(cfg.model, device="meta")
    freeze_blocks(model, OmegaConf.select(cfg, "train.freeze_blocks") or 0)
    optimizer = instantiate(cfg.optimizer, model=model)
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
    """Return the highest learning rate now of head, pyramid, first and last block.

    Returns:
        {"lr/head", "lr/pyramid", "lr/block_0", "lr/block_11"}. A backbone without layers is
        "lr/backbone"; a part that is frozen is left out.
    """
    parts = {id(value): _part(detector, name) for name, value in detector.named_parameters()}
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        for part in {parts.get(id(value)) for value in group["params"]} - {None}:
            rates[f"lr/{part}"] = max(group["lr"], rates.get(f"lr/{part}", 0.0))
    return dict(sorted(rates.items()))


def _part(detector: nn.Module, name: str) -> str | None:
    """Return the part that a parameter belongs to, None for blocks between first and last."""
    backbone: Any = getattr(detector, "backbone", None)
    inside = name.removeprefix("backbone.")
    if backbone is None or inside == name:
        return "head"
    if not hasattr(backbone, "layer_id"):
        return "backbone"
    layer, last = backbone.layer_id(inside), backbone.num_layers
    if layer > last:
        return "pyramid"
    return f"block_{layer - 1}" if layer in (1, last) else None


def names_by_group(
    detector: nn.Module, optimizer: torch.optim.Optimizer, model: Iterable[str], source: str
) -> list[list[str]]:
    """Return the names of an optimizer's parameters, group by group, as a file numbers them.

    Args:
        detector: whose parameters the optimizer has.
        optimizer: of `vitdet.optim.adamw`, or one of your own.
        model: names of the file's weights, in its order. An earlier version may have had the parts
            of a backbone in another order, and `adamw` numbers them group by group in that order.
        source: the file, for messages.

    Raises:
        InputError: another order, and an optimizer that does not follow the order of its model.
    """
    named = {id(parameter): name for name, parameter in detector.named_parameters()}
    ours = [[named[id(each)] for each in group["params"]] for group in optimizer.param_groups]
    group_of = {name: number for number, group in enumerate(ours) for name in group}

    def grouped(order: Iterable[str]) -> list[list[str]]:
        found: dict[int, list[str]] = {}
        for name in order:
            if name in group_of:
                found.setdefault(group_of[name], []).append(name)
        return list(found.values())

    now, then = ([name for name in each if name in group_of] for each in (named.values(), model))
    if now == then:
        return ours
    if grouped(now) != ours:
        raise InputError(
            f"optimizer state in {source}: its model has its parameters in another order, and this "
            "optimizer one of its own. Start from the file with train.init_checkpoint."
        )
    return grouped(then)
