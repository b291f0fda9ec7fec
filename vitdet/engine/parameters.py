"""The parameters of a detector: how fast they learn, moments, average, compiled blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import nn

from vitdet.config import build_model, complete, instantiate
from vitdet.engine.parallel import shard_like
from vitdet.engine.tune import set_up
from vitdet.utils.checks import InputError

# Compiled versions of the one function that all blocks share: window or global attention, with or
# without stochastic depth, training or evaluation, one size or any. torch's limit is 8, beyond
# which it goes on uncompiled.
_VERSIONS = 64


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile every transformer block in place by `torch.compile`; return how many.

    A block is compiled when it first runs: once for the first size of image, once more for all
    others. Blocks of the same kind share the work. Names of weights stay.
    """
    lists = [getattr(module, "blocks", None) for module in model.modules()]
    blocks = [block for each in lists if isinstance(each, nn.ModuleList) for block in each]
    if not blocks:
        raise InputError("train.compile: the backbone has no blocks. Set it to False.")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS)
    for block in blocks:
        block.compile(fullgraph=True, **options)
    return len(blocks)


def group_lines(cfg: DictConfig) -> Iterator[str]:
    """Yield a table of every parameter: name, shape, lr, weight decay; then how many there are.

    The lr is the one that the schedule multiplies. A parameter that the optimizer does not have is
    "frozen". No data are read: the number of classes is the recipe's.
    """
    if "optimizer" not in cfg:
        keys = ", ".join(map(str, cfg))
        raise InputError(f"recipe for --print-groups: expected an optimizer, got only {keys}.")
    model = build_model(cfg.model, device="meta")
    set_up(model, complete(cfg.get("train") or OmegaConf.create()))
    optimizer = instantiate(cfg.optimizer, model=model)
    found = {
        id(parameter): (f"{group['lr']:.6g}", f"{group['weight_decay']:.6g}")
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    rows = [
        (name, " x ".join(map(str, value.shape)), *found.get(id(value), ("frozen", "-")))
        for name, value in model.named_parameters()
    ]
    head = ("name", "shape", "lr", "weight decay")
    right = ("left", *["right"] * 3)
    table = tabulate(rows, head, "plain", disable_numparse=True, colalign=right)
    yield from table.splitlines()
    trained = [value.numel() for value in model.parameters() if id(value) in found]
    every = [value.numel() for value in model.parameters()]
    yield (
        f"{len(every)} parameters with {sum(every)} numbers; {len(trained)} with {sum(trained)} "
        f"are trained, in {len(optimizer.param_groups)} groups"
    )


def moments_of(
    detector: nn.Module, optimizer: torch.optim.Optimizer, content: Mapping[str, Any], source: str
) -> dict[int, Any]:
    """Return the moments in a checkpoint by the numbers of our parameters, sharded as they are.

    A file numbers its parameters group by group in the order of its model. An earlier version may
    have had the parts of a backbone in another order, so they are found by name. They are copies:
    the tensors of a file are mapped, and the file is to go.

    Raises:
        InputError: other parameters or groups, or another order of an optimizer of one's own.
    """
    parameters = dict(detector.named_parameters())
    named = {id(parameter): name for name, parameter in parameters.items()}
    ours = [[named[id(each)] for each in group["params"]] for group in optimizer.param_groups]
    group_of = {name: number for number, group in enumerate(ours) for name in group}

    def grouped(order: Iterable[str]) -> list[list[str]]:
        found: dict[int, list[str]] = {}
        for name in order:
            found.setdefault(group_of[name], []).append(name)
        return list(found.values())

    now, then = ([n for n in each if n in group_of] for each in (parameters, content["model"]))
    if now != then and grouped(now) != ours:
        what = "its parameters are in another order, and this optimizer has one of its own"
        raise InputError(f"optimizer state in {source}: {what}. Give it as train.init_checkpoint.")
    theirs, saved = ours if now == then else grouped(then), content["optimizer"]
    counts = [len(group["params"]) for group in saved["param_groups"]]
    if counts != [len(group) for group in theirs]:
        ours_text = f"expected {len(group_of)} parameters in {len(theirs)} groups"
        theirs_text = f"got {sum(counts)} in {len(counts)}. Resume with the run's own config.yaml"
        raise InputError(f"optimizer state in {source}: {ours_text}, {theirs_text}.")
    numbers = {name: number for number, name in enumerate(name for each in ours for name in each)}
    names = [name for group in theirs for name in group]
    found: dict[int, Any] = {}
    for index, moments in saved["state"].items():
        name, made = names[index], dict(moments)
        found[numbers[name]] = made
        for key, value in made.items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.ndim and value.shape != parameters[name].shape:
                shape = f"{key} of {name} has the shape {tuple(value.shape)}"
                raise InputError(f"optimizer state in {source}: {shape}. Take another checkpoint.")
            made[key] = shard_like(parameters[name], value).clone()
    return found


class Ema:
    """average <- decay * average + (1 - decay) * weights, once a step.

    Everything in the state dict of `module` is averaged, also buffers; what is not a floating-point
    number is copied. Every process has the same average of the parameters; that of BatchNorm's
    statistics differs until `Trainer.state_dict` gives all of them the main one's.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"train.ema_decay: expected 0 <= decay < 1 or null, got {decay}.")
        self.module = module
        self.decay = decay
        self.state: dict[str, torch.Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are now."""
        self.state = {name: value.clone() for name, value in self.module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        pairs: dict[type, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():  # parameters that are sharded are of another type
                pairs.setdefault(type(value), []).append((self.state[name], value))
            else:
                self.state[name].copy_(value)
        for of_type in pairs.values():
            averages, values = zip(*of_type, strict=True)
            torch._foreach_lerp_(averages, values, 1 - self.decay)

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from the average of a checkpoint, with the same names and shapes."""
        for name, value in self.state.items():
            value.copy_(shard_like(value, state[name]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within the block; afterwards it has its own again."""
        own = self.module.state_dict()
        kept = {name: value.clone() for name, value in own.items()}
        try:
            for name, value in own.items():
                value.copy_(self.state[name])
            yield
        finally:
            for name, value in own.items():
                value.copy_(kept[name])
