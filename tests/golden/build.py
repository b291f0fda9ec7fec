"""Build vitdet's modules from the config of a golden case, load its weights and run it.

Every key of a config is either used, or named as one that cannot change the compared numbers, or
makes the case fail: nothing is ignored silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from vitdet.backbones.base import LayeredBackbone
from vitdet.backbones.vit import PlainViT, ViT
from vitdet.convert import convert

from .cases import Case, Options, UnsupportedCase
from .compare import Comparison, compare, loss_of

Change = Callable[[nn.Module], None]
Prepare = Callable[[str, torch.Tensor], torch.Tensor]
Weights = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
BOTH = (True, False)


@dataclass(frozen=True)
class Mode:
    """How to run a case: attention kernel, and whether activations are recomputed."""

    backend: str = "auto"
    checkpointed: bool = False

    def __str__(self) -> str:
        return "checkpointed" if self.checkpointed else self.backend

    def of(self, arguments: dict[str, Any], blocks: int = 0) -> dict[str, Any]:
        """Return the arguments of one of our backbones of so many blocks for this mode."""
        arguments = dict(arguments, attention_backend=self.backend)
        if self.checkpointed:
            every = range(blocks or arguments.get("depth", 12))
            arguments |= {"checkpoint_blocks": list(every), "drop_path_rate": 0.0}
        return arguments


# "auto" is blocks with relative positions, sdpa without
MODES = [Mode("eager"), Mode("blocks"), Mode("sdpa"), Mode(checkpointed=True)]


@dataclass
class Built:
    """A finished model: `call` maps the images to (outputs, extra), both by the case's names.

    They may be more than the case stores. `weights` are the case's, by its names, and ours as
    functions of them: the gradient of ours becomes that of the published parameter, whatever the
    conversion does (scaling, joining).
    """

    model: nn.Module
    call: Callable[[list[torch.Tensor]], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]
    weights: Weights = field(default_factory=lambda: ({}, {}))
    not_offered: frozenset[str] = frozenset()


def run(built: Built, case: Case, mode: Mode, change: Change | None = None) -> Comparison:
    """Run a built case forward and backward and compare everything it stores.

    `change` is applied to the model first; the self-test spoils it with this.
    """
    for module in built.model.modules():
        # Blocks are checkpointed in training only; in training a detector would compute losses.
        module.training = mode.checkpointed and isinstance(module, LayeredBackbone)
    if change is not None:
        change(built.model)
    images = case.images()
    outputs, extra = built.call(images)
    missing = [name for name in case.info["outputs"] if name not in outputs]
    if missing:
        raise UnsupportedCase(
            f"{case.name}: vitdet has no output {missing}, it has {list(outputs)}"
        )
    outputs = {name: outputs[name] for name in case.info["outputs"]}
    loss_of(case, outputs).backward()
    leaves, ours = built.weights
    reached = {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}
    reached = {name: grad for name, grad in reached.items() if ours[name].requires_grad}
    if reached:
        torch.autograd.backward([ours[name] for name in reached], [*reached.values()])
    none = case.info["parameters_without_grad"]
    gradients = {
        name: leaf.grad
        for name, leaf in leaves.items()
        if leaf.grad is not None or name in none or f"grad_norm/{name}" in case.arrays
        if name not in case.info.get("aliases", ())
    }
    input_gradients = [image.grad for image in images]
    return compare(case, outputs, extra, gradients, input_gradients, built.not_offered)


# --- configs -----------------------------------------------------------------------------------


def given(options: Options, *same: str, of: Any = ViT, **renamed: str) -> dict[str, Any]:
    """Take the keys that a config has, under our names (`renamed`: ours=theirs).

    A switch must be a bool; the defaults of our builder `of` tell which arguments are switches.
    """
    defaults = inspect.signature(of).parameters
    found = {}
    for ours, theirs in {**dict(zip(same, same, strict=True)), **renamed}.items():
        is_switch = theirs in options.values and isinstance(defaults[ours].default, bool)
        value = options.only(theirs, BOTH) if is_switch else options.take(theirs, None)
        if value is not None:
            found[ours] = value
    return found


SIZES = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
SHARED = ("img_size", *SIZES, "qkv_bias", "drop_path_rate", "use_abs_pos", "window_size")
SHARED += ("pretrain_img_size", "pretrain_use_cls_token", "residual_block_indexes", "out_feature")


def vit_options(options: Options, *more: str, eps: float = 1e-5) -> dict[str, Any]:
    """Translate the arguments of detectron2's ViT, from which the others descend, to ours.

    `eps` is that of a norm that the config does not name.
    """
    arguments = given(options, *SHARED, "use_rel_pos", *more)
    arguments["global_block_indexes"] = global_blocks(options, "window_block_indexes")
    arguments["norm_eps"] = norm_eps(options, eps)
    check_gelu(options)
    options.inert("rel_pos_zero_init", "use_act_checkpoint")  # weights are given; a way to compute
    options.done()
    return arguments


def global_blocks(options: Options, key: str, depth: str = "depth") -> list[int]:
    """Return the blocks that are not among those of `key`."""
    windows = options.take(key, ())
    return [i for i in range(options.take(depth, 12)) if i not in windows]


def norm_eps(options: Options, default: float, names: tuple[str, ...] = ("LayerNorm",)) -> float:
    """Return the eps of {"name": "LayerNorm", "eps": ...}; without eps it is torch's default."""
    if options.take("norm_layer", None) is None:
        return default
    norm = options.section("norm_layer")
    norm.only("name", names)
    eps = norm.take("eps", 1e-5)
    norm.done()
    return eps


def check_gelu(options: Options) -> None:
    """Accept the exact GELU, the only activation that vitdet's ViT has."""
    layer = options.take("act_layer", None)
    if isinstance(layer, Mapping):
        layer = options.section("act_layer")
        layer.only("name", ("GELU",))
        layer.done()
    else:
        options.only("act_layer", (None, "GELU", "gelu"), None)


def pyramid_options(options: Options) -> dict[str, Any]:
    """Translate the arguments of detectron2's SimpleFeaturePyramid to ours."""
    arguments = {
        "in_feature": options.take("in_feature", "last_feat"),
        "out_channels": options.take("out_channels", 256),
        "scale_factors": options.take("scale_factors"),
        "norm": options.only("norm", ("LN", ""), "LN"),
        "square_pad": options.take("square_pad", 0),
    }
    top_block = options.only("top_block", ("LastLevelMaxPool", None), None)
    arguments["top_block"] = None if top_block is None else LastLevelMaxPool()
    options.done()
    return arguments


# --- weights -----------------------------------------------------------------------------------


def leaves_of(case: Case) -> dict[str, torch.Tensor]:
    """Return the case's weights as leaves that gather gradients."""
    leaves = case.weights()
    return {name: x.requires_grad_(x.is_floating_point()) for name, x in leaves.items()}


def put(
    model: nn.Module, leaves: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> Weights:
    """Put weights of our names, functions of the leaves, into the model."""
    values = {name: value.detach() for name, value in weights.items()}
    model.load_state_dict(model.state_dict() | values)
    return leaves, weights


def load(
    case: Case,
    model: nn.Module,
    source_format: str,
    prefix: str = "",
    beside: Mapping[str, torch.Tensor] | None = None,
    prepare: Prepare | None = None,
) -> Weights:
    """Put the case's weights through `vitdet.convert` into the model.

    `prefix` makes the case's names those of a detector, `beside` are weights of other parts that a
    file needs, and `prepare` changes a weight of the case, given its name, before the conversion.
    """
    leaves = leaves_of(case)
    source = {prefix + n: prepare(n, value) if prepare else value for n, value in leaves.items()}
    for name, shape in case.info["buffers_not_filled"].items():  # batches seen, tables of numbers
        source.setdefault(prefix + name, torch.zeros(shape, dtype=torch.int64))
    target = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state, report = convert(source | dict(beside or {}), target, source_format=source_format)
    counters = ("num_batches_tracked", "num_redraws")
    left = [name for name in report.initialised if not name.endswith(counters)]
    if report.resized or left:
        raise UnsupportedCase(f"{case.name}: conversion resized {report.resized}, left {left}")
    return put(model, leaves, state)


# --- backbones ---------------------------------------------------------------------------------


class Recorder:
    """Keeps the tokens before block 0 and after every block of a ViT."""

    def __init__(self, vit: PlainViT) -> None:
        self.clear()
        vit.blocks[0].register_forward_pre_hook(lambda _, given: self._keep(0, given[0]))
        for i, block in enumerate(vit.blocks, 1):
            block.register_forward_hook(lambda _, __, output, i=i: self._keep(i, output))

    def clear(self) -> None:
        """Forget, to record another run."""
        self._kept: dict[int, torch.Tensor] = {}

    def _keep(self, i: int, tokens: torch.Tensor) -> None:
        self._kept.setdefault(i, tokens)  # checkpointing calls a block again in the backward pass

    @property
    def tokens(self) -> list[torch.Tensor]:
        """All that was kept, in order."""
        return [*self._kept.values()]

    def extra(self, case: Case) -> dict[str, torch.Tensor]:
        """Return the tokens by the names that the cases have, as sequences where they are."""
        found = {f"blocks.{i - 1}": tokens for i, tokens in self._kept.items()}
        found["tokens_with_pos"] = self._kept[0]
        shapes = case.info["extra"]
        return {
            name: x.flatten(1, 2) if x.ndim > len(shapes.get(name, x.shape)) else x
            for name, x in found.items()
        }


def outputs_of_parts(case: Case, net: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return what will hold the first output of every module that the case names in `extra`."""
    values: dict[str, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        as_sequence = len(case.info["extra"][name]) < tokens.ndim
        # checkpointing calls a block again in the backward pass
        values.setdefault(name, tokens.flatten(1, 2) if as_sequence else tokens)

    for name in case.info["extra"]:
        module = net.get_submodule(name.removeprefix(prefix))
        module.register_forward_hook(partial(keep, name))
    return values


def whole_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut off what the published patch embedding drops; ours fills up the last patch instead."""
    height, width = (side - side % patch_size for side in images.shape[-2:])
    return images[..., :height, :width]
