"""What of a backbone learns: all, its last blocks, adapters beside frozen weights, nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitdet.utils.checks import InputError

logger = logging.getLogger(__name__)

TUNE = ("all", "lora", "head")  # train.tune
_ADAPTERS = "lora"  # in a checkpoint: the states that it has merged, as they are trained

State = Mapping[str, Any]  # of a module


def set_up(detector: nn.Module, train: Any) -> list[str]:
    """Stop parameters of the backbone from learning, and add adapters; return the frozen names.

    Call it before optimizer, average and parallel wrapper are made. With `train.freeze_blocks` the
    embeddings and so many blocks are frozen, with `train.tune` "lora" all of them. BatchNorm among
    them uses its running statistics; propagation blocks, which no pretraining has, learn on. With
    "head" the network below the pyramid is frozen whole, and stays in evaluation mode.

    Args:
        detector: the model, on its device.
        train: of the recipe.

    Raises:
        InputError: a number outside the backbone's blocks, or a backbone that does not know them.
    """
    if train.tune == "all" and not train.freeze_blocks:
        return []
    backbone: Any = getattr(detector, "backbone", None)
    net, depth = getattr(backbone, "net", backbone), getattr(backbone, "num_layers", None)
    key, usual = ("freeze_blocks", 0) if train.tune == "all" else ("tune", "all")
    if not isinstance(depth, int) or not hasattr(backbone, "layer_id"):
        text = f"{type(net).__name__} has no layer_id(). Set it to {usual}"
        raise InputError(f"train.{key}: {text}.")
    blocks, whole = train.freeze_blocks or depth, train.tune == "head"
    if not 0 <= blocks <= depth:
        raise InputError(f"train.{key}: expected 0 to {depth} blocks, got {blocks}.")
    inside, frozen = set(net.parameters()) if whole else set(), []
    for name, module in list(backbone.named_modules()):
        own = dict(module.named_parameters(name, recurse=False))
        names = [each for each in own if own[each] in inside or backbone.layer_id(each) <= blocks]
        for each in names:
            own[each].requires_grad_(False)
        if names and isinstance(module, _BatchNorm):
            _stay_in_evaluation(module)
        if train.tune == "lora" and names and isinstance(module, nn.Linear):
            _adapt(module, train.lora_rank, train.lora_alpha)
        frozen += [f"backbone.{each}" for each in names]
    if whole:
        _stay_in_evaluation(net)
    sizes = [(each.numel() / 1e6, each.requires_grad) for each in detector.parameters()]
    count, learn = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    how = f"{key}={getattr(train, key)}"
    logger.info("train.%s: %.2f M of the model's %.2f M parameters learn", how, learn, count)
    return frozen


def _stay_in_evaluation(module: Any) -> None:
    module.eval()
    module.train = lambda *_: module  # what trains the whole detector passes by


# --- adapters -------------------------------------------------------------------------------------


def _adapt(linear: nn.Linear, rank: int, alpha: float) -> None:
    """Let a layer compute W x + alpha / rank B A x, B zero at first (LoRA, arXiv 2106.09685)."""
    like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    linear.lora_a = type(linear)(linear.in_features, rank, bias=False, **like)
    linear.lora_b = type(linear)(rank, linear.out_features, bias=False, **like)
    nn.init.zeros_(linear.lora_b.weight)
    linear.lora_scale = alpha / rank  # pyright: ignore[reportArgumentType] (no parameter)
    linear.register_forward_hook(_add)


def _add(linear: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output + linear.lora_scale * linear.lora_b(linear.lora_a(*inputs))


def adapted(detector: nn.Module) -> dict[str, Any]:
    """Return the layers with adapters by name."""
    return {name: each for name, each in detector.named_modules() if hasattr(each, "lora_scale")}


def adapter_names(detector: nn.Module) -> list[str]:
    """Return the names of the adapters in a state of `detector`."""
    return [f"{name}.lora_{each}.weight" for name in adapted(detector) for each in "ab"]


def merged(detector: nn.Module, state: State) -> dict[str, Any]:
    """Return a state of `detector` under the names that it has without adapters: W + s B A."""
    found = dict(state)
    for name, layer in adapted(detector).items():
        a, b = (found.pop(f"{name}.lora_{each}.weight") for each in "ab")
        whole = f"{name}.weight"  # its place in the order stays
        found[whole] = torch.addmm(found[whole], b, a, alpha=layer.lora_scale)
    return found


@contextmanager
def merging(detector: nn.Module) -> Iterator[None]:
    """Within the block the weights are those of a file, to the bit, and the adapters add zero."""
    own = detector.state_dict()
    new, layers = merged(detector, own), adapted(detector)
    changed = [f"{name}.{last}" for name in layers for last in ("weight", "lora_b.weight")]
    kept = {key: own[key].clone() for key in changed}
    try:
        for key in kept:
            own[key].copy_(new[key]) if key in new else own[key].zero_()
        yield
    finally:
        for key, value in kept.items():
            own[key].copy_(value)


def for_file(detector: nn.Module, states: Mapping[str, State]) -> dict[str, Any]:
    """Return named states of `detector` merged, for whoever reads them, and as they are beside.

    What both have is one memory, and in a file once.
    """
    if not adapted(detector):
        return dict(states)
    return {name: merged(detector, each) for name, each in states.items()} | {_ADAPTERS: states}


def of_file(detector: nn.Module, content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a checkpoint's content with the states as `detector` trains them.

    Raises:
        InputError: only one of both has adapters.
    """
    kept = content.get(_ADAPTERS)
    if isinstance(kept, dict) != bool(adapted(detector)):
        began, got = ("lora", "another") if isinstance(kept, dict) else ("all or head", "lora")
        text = f"expected {began}, with which the run began, got {got}. See its config.yaml"
        raise InputError(f"train.tune for resuming {source}: {text}.")
    return {**content, **(kept or {})}
