"""Optimizer groups with layer-wise lr decay, and schedules.

Layer-wise lr decay: a parameter of layer i of n learns at rate ** (n + 1 - i) of the base rate
(ViTDet, Appendix A.2; facebookresearch/detectron2, modeling/backbone/vit.py get_vit_lr_decay_rate
and solver/build.py get_default_optimizer_params).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from vitdet.utils.checks import InputError, passes_on

# The norms whose weight decay `weight_decay_norm` sets: torch's own, as in the published training.
# The channel LayerNorm of pyramid and heads is not among them and keeps `weight_decay`.
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


class Setting(NamedTuple):
    """How one parameter is trained: its lr over the base lr, and its weight decay."""

    lr_multiplier: float
    weight_decay: float


def parameter_table(
    model: nn.Module,
    *,
    weight_decay: float = 0.1,
    weight_decay_norm: float | None = 0.0,
    weight_decay_vectors: float | None = None,
    no_decay: Collection[str] = ("pos_embed",),
    layer_decay_rate: float | None = None,
    num_layers: int | None = None,
    backbone: str = "backbone",
    backbone_lr_multiplier: float = 1.0,
    pyramid_lr_multiplier: float = 1.0,
    head_lr_multiplier: float = 1.0,
    lr_multipliers: Mapping[str, float] | None = None,
) -> dict[str, Setting]:
    """Return lr multiplier and weight decay of every parameter that is trained.

    The last rule of weight decay that fits counts. The lr multiplier is a product:
    layer_decay_rate ** (num_layers + 1 - layer), that of the part, and the last of
    `lr_multipliers` that fits.

    Args:
        model: a detector. With `layer_decay_rate` its backbone must know its layers.
        weight_decay: for every parameter without another rule.
        weight_decay_norm: for parameters of torch's norm modules; None for no such rule.
        weight_decay_vectors: for 1-D parameters and those named bias; None for no such rule.
        no_decay: regular expressions; a name in which one is found gets no weight decay.
        layer_decay_rate: factor from a layer to the one before it, None for one rate everywhere.
        num_layers: layers that the rate counts, None for those of the backbone. What comes after
            the layers keeps the full rate.
        backbone: name of the submodule that is the backbone; "" when the model is one alone.
        backbone_lr_multiplier: for the layers of the backbone, all of it when it knows none
            (StreamPETR's "backbone x 0.1").
        pyramid_lr_multiplier: for what comes after the layers within the backbone: pyramid,
            propagation blocks, last norm.
        head_lr_multiplier: for everything outside the backbone (the "vit_wise" rule of
            NVlabs/OmniDrive, layer_decay_optimizer_constructor.py).
        lr_multipliers: {regular expression: multiplier}; searched in the name.

    Raises:
        InputError: layer decay for a backbone that does not know its layers, no submodule of the
            backbone's name, an expression that is none.
    """
    without = [_expression("no_decay", text) for text in no_decay]
    factors = [
        (_expression("lr_multipliers", text), value)
        for text, value in (lr_multipliers or {}).items()
    ]
    parts = (backbone_lr_multiplier, pyramid_lr_multiplier, head_lr_multiplier)
    lr_of = _lr_rule(model, backbone, layer_decay_rate, num_layers, parts)
    table = {}
    for module_name, module in model.named_modules():
        for last, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{last}" if module_name else last
            if not parameter.requires_grad:
                continue
            decay = weight_decay
            if isinstance(module, _NORMS) and weight_decay_norm is not None:
                decay = weight_decay_norm
            if weight_decay_vectors is not None and (parameter.ndim == 1 or last == "bias"):
                decay = weight_decay_vectors
            if any(expression.search(name) for expression in without):
                decay = 0.0
            fitting = [value for expression, value in factors if expression.search(name)]
            table[name] = Setting(lr_of(name) * (fitting[-1] if fitting else 1.0), decay)
    return {name: table[name] for name, _ in model.named_parameters() if name in table}


def _expression(what: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        expected = f"expected regular expressions, got {text!r} ({error})"
        raise InputError(f"optimizer.{what}: {expected}. Correct it.") from error


def _lr_rule(
    model: nn.Module,
    backbone: str,
    rate: float | None,
    num_layers: int | None,
    parts: tuple[float, float, float],
) -> Callable[[str], float]:
    """Return name -> lr multiplier by layer and by part (layers, pyramid, head)."""
    of_layers, of_pyramid, of_head = parts
    if rate is None and parts == (1.0, 1.0, 1.0):
        return lambda _: 1.0  # any model will do, also one without a backbone
    net: Any = dict(model.named_modules()).get(backbone)
    if net is None:
        has = ", ".join(name for name, _ in model.named_children())
        raise InputError(f"optimizer.backbone: expected one of {has}, got {backbone!r}.")
    knows_layers = hasattr(net, "layer_id") and hasattr(net, "num_layers")
    if rate is not None and not knows_layers:
        text = f"{type(net).__name__} has no layer_id() and num_layers. Set it to null"
        raise InputError(f"optimizer.layer_decay_rate: {text}.")
    prefix = f"{backbone}." if backbone else ""

    def multiplier(name: str) -> float:
        if not name.startswith(prefix):
            return of_head
        layer = net.layer_id(name.removeprefix(prefix)) if knows_layers else 0
        if knows_layers and layer > net.num_layers:
            return of_pyramid
        counted = net.num_layers if num_layers is None and knows_layers else num_layers or 0
        return of_layers if rate is None else of_layers * rate ** (counted + 1 - layer)

    return multiplier


@passes_on(parameter_table)
def adamw(
    model: nn.Module | None = None,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **rules: Any,
) -> torch.optim.AdamW:
    """Return AdamW over the groups of `parameter_table`, whose arguments are the rules.

    Every group has `lr_multiplier` and `initial_lr`, the rate that a schedule multiplies.
    """
    if model is None:
        raise InputError("optimizer.model: expected the detector, got none. Set it first.")
    members: dict[Setting, list[nn.Parameter]] = {}
    for name, setting in parameter_table(model, **rules).items():
        members.setdefault(setting, []).append(model.get_parameter(name))
    groups = []
    for setting, parameters in members.items():
        rates = dict.fromkeys(("lr", "initial_lr"), lr * setting.lr_multiplier)
        groups.append({"params": parameters, **rates, **setting._asdict()})
    if not groups:
        raise InputError("model: expected parameters to train, got none. Unfreeze some.")
    # On a CPU torch's other forms go tensor by tensor (a small model's step: 11 ms, fused 2 ms).
    # Models without data (--print-groups) have none.
    fused = all(parameter.device.type != "meta" for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


class _AfterWarmup(CompositeParamScheduler):
    """A schedule of fvcore after a linear warm-up; called with the share of the training, 0 to 1.

    Lengths are in images and only say what share of `num_images` they are, so a shorter training
    has the same curve. `warmup_factor` is the multiplier at the first image.
    """

    def __init__(
        self,
        schedule: ParamScheduler,
        num_images: float,
        warmup: float,
        warmup_factor: float,
        *,
        rescaled: bool = False,
    ) -> None:
        if not 0 <= warmup <= num_images:
            text = f"expected at most the {num_images} images of its training, got {warmup}"
            raise InputError(f"schedule.warmup: {text}.")
        share = warmup / num_images
        full = schedule(0.0 if rescaled else share)
        super().__init__(
            [LinearParamScheduler(warmup_factor * schedule(0.0), full), schedule],
            lengths=[share, 1 - share],
            interval_scaling=["rescaled", "rescaled" if rescaled else "fixed"],
        )

    def __call__(self, where: float) -> float:
        """Return the factor on every group's rate at a share of the training."""
        return super().__call__(min(where, 1 - 1e-9))  # fvcore's constant ends before 1


class MultiStep(_AfterWarmup):
    """Linear warm-up, then a constant rate cut by `gamma` at every one of growing milestones."""

    def __init__(
        self,
        num_images: float,
        milestones: Sequence[float],
        warmup: float = 0,
        warmup_factor: float = 0.001,
        gamma: float = 0.1,
    ) -> None:
        ends = list(milestones)
        if ends != sorted(ends) or any(not 0 < end <= num_images for end in ends):
            text = f"schedule.milestones: expected growing numbers up to {num_images}, the images"
            raise InputError(f"{text} of its training, got {ends}.")
        ends = [end for end in ends if end < num_images]  # one at the very end changes nothing
        values = [gamma**cuts for cuts in range(len(ends) + 1)]
        lengths: Any = num_images, ends  # annotated as integers
        super().__init__(
            MultiStepParamScheduler(values, *lengths), num_images, warmup, warmup_factor
        )


class Cosine(_AfterWarmup):
    """Linear warm-up, then half a cosine to zero (Loshchilov and Hutter, "SGDR", Eq. 5)."""

    def __init__(self, num_images: float, warmup: float = 0, warmup_factor: float = 0.001) -> None:
        schedule = CosineParamScheduler(1, 0)
        super().__init__(schedule, num_images, warmup, warmup_factor, rescaled=True)


class Constant(_AfterWarmup):
    """Linear warm-up, then one rate to the end."""

    def __init__(self, num_images: float, warmup: float = 0, warmup_factor: float = 0.001) -> None:
        super().__init__(ConstantParamScheduler(1), num_images, warmup, warmup_factor)
