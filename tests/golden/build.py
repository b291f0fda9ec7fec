"""Build vitdet's modules from the config of a golden case, load its weights and run it.

Every key of a config is either used, or named as one that cannot change the compared numbers, or
makes the case fail: nothing is ignored silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from vitdet.backbones.base import LayeredBackbone
from vitdet.backbones.plain import PlainViT
from vitdet.backbones.vit import ViT
from vitdet.convert import convert

from .cases import Case, Options, UnsupportedCase
from .compare import Comparison, compare, loss_of

Change = Callable[[nn.Module], None]
Prepare = Callable[[str, torch.Tensor], torch.Tensor]
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

    They may be more than the case stores. `parameters` gives for each parameter name of the case
    the name of ours. Where the weights went through `converted`, `leaves` holds the tensors under
    the case's names that gather gradients.
    """

    model: nn.Module
    call: Callable[[list[torch.Tensor]], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]
    parameters: dict[str, str]
    not_offered: frozenset[str] = frozenset()
    leaves: Mapping[str, torch.Tensor] | None = None


def run(built: Built, case: Case, mode: Mode, change: Change | None = None) -> Comparison:
    """Run a built case forward and backward and compare everything it stores.

    Args:
        built: the model.
        case: the case.
        mode: sets training mode.
        change: applied to the model first; the self-test spoils it with this.
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
    own = dict(built.model.named_parameters()) if built.leaves is None else built.leaves
    names = built.parameters if built.leaves is None else {name: name for name in built.parameters}
    gradients = {name: own[mine].grad for name, mine in names.items()}
    input_gradients = [image.grad for image in images]
    return compare(case, outputs, extra, gradients, input_gradients, built.not_offered)


# --- configs -----------------------------------------------------------------------------------


def given(options: Options, *same: str, of: Any = ViT, **renamed: str) -> dict[str, Any]:
    """Take the keys that a config has, under our names; a switch must be a bool.

    Args:
        options: the config.
        same: keys that have our names.
        of: our builder, whose defaults tell which arguments are switches.
        renamed: our names and theirs.
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

    Args:
        options: the config.
        more: further keys that have our names.
        eps: of a norm that the config does not name.
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


def load(case: Case, model: nn.Module, source_format: str) -> dict[str, str]:
    """Load weights through `vitdet.convert`; return our parameter's name under the case's name."""
    own = model.state_dict()
    target = {name: tuple(value.shape) for name, value in own.items()}
    state, report = convert(case.weights(), target, source_format=source_format)
    buffers = case.info["buffers_not_filled"]
    left = [name for name in report.initialised if list(own[name].shape) != buffers.get(name)]
    if report.resized or left:
        text = f"{case.name}: conversion resized {report.resized}, left {left}"
        raise UnsupportedCase(text)
    model.load_state_dict(own | state, strict=True)
    parameters = {name for name, _ in model.named_parameters()}
    used = {name: mine for name, mine in report.used.items() if mine in parameters}
    assert sorted(used.values()) == sorted(parameters), "a name of ours is from none of the case"
    return used


def converted(
    case: Case,
    model: nn.Module,
    source_format: str,
    prefix: str = "",
    beside: Mapping[str, torch.Tensor] | None = None,
    prepare: Prepare | None = None,
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Put the case's weights through `vitdet.convert` into the model, with their gradients.

    The model's parameters become functions of tensors that carry the case's names: a gradient norm
    is then that of the published parameter, whatever the conversion does (scaling, joining).

    Args:
        case: the case.
        model: ours; its parameters are replaced by plain tensors.
        source_format: name of the format.
        prefix: put before the case's names, to make them those of a detector.
        beside: weights of other parts, that a file needs and the case lacks, by the file's names.
        prepare: changes a weight of the case, given its name, before the conversion.

    Returns:
        (parameters, leaves) of `Built`.
    """
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    trained = {name for name, _ in model.named_parameters()}
    target = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    leaves = case.weights() | {n: torch.from_numpy(value) for n, value in case.buffers.items()}
    for name, shape in case.info["buffers_not_filled"].items():
        leaves.setdefault(name, torch.zeros(shape, dtype=torch.int64))  # batches seen
    for value in leaves.values():
        value.requires_grad_(value.is_floating_point())
    source = {prefix + n: prepare(n, v) if prepare else v for n, v in leaves.items()}
    state, report = convert(source | dict(beside or {}), target, source_format=source_format)
    # What the file may hold beside: another name of the same tensor, tables of no tokens, and what
    # the published code does not learn either.
    spare = {*case.info["buffers_not_filled"], *case.info["parameters_without_grad"]}
    spare |= {*case.info.get("aliases", {}), *(n for n, v in leaves.items() if not v.numel())}
    surplus = set(report.dropped) - {prefix + name for name in spare}
    counters = ("num_batches_tracked", "num_redraws")
    left = [name for name in report.initialised if not name.endswith(counters)]
    if report.resized or left or surplus:
        raise UnsupportedCase(
            f"{case.name}: conversion resized {report.resized}, left {left}, {surplus}"
        )
    for name, value in state.items():
        module = model.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        if name in trained:
            del module._parameters[last]
            setattr(module, last, value.detach() if name in frozen else value)
        else:
            module._buffers[last] = value.detach()
    used = {name: report.used.get(prefix + name, "") for name in leaves}
    found = {name: mine for name, mine in used.items() if mine in trained}
    found = {name: mine for name, mine in found.items() if name not in case.info.get("aliases", {})}
    for name, value in leaves.items():  # tables of no tokens have an empty gradient
        if not value.numel() and value.is_floating_point():
            value.grad, found[name] = torch.zeros_like(value), name
    return found, leaves


# --- backbones ---------------------------------------------------------------------------------


class Recorder:
    """Keeps the tokens before block 0 and after every block of a ViT."""

    def __init__(self, vit: PlainViT) -> None:
        self.tokens: list[torch.Tensor] = []
        self._count = len(vit.blocks) + 1
        self.clear()
        vit.blocks[0].register_forward_pre_hook(lambda _, given: self._keep(0, given[0]))
        for i, block in enumerate(vit.blocks, 1):
            block.register_forward_hook(lambda _, __, output, i=i: self._keep(i, output))

    def clear(self) -> None:
        """Forget, to record another run."""
        self.tokens = [torch.empty(0)] * self._count

    def _keep(self, i: int, tokens: torch.Tensor) -> None:
        if self.tokens[i].numel() == 0:  # checkpointing calls a block again in the backward pass
            self.tokens[i] = tokens

    def extra(self, case: Case) -> dict[str, torch.Tensor]:
        """Return the tokens by the names that the cases have, as sequences where they are."""
        found = {f"blocks.{i}": tokens for i, tokens in enumerate(self.tokens[1:])}
        found["tokens_with_pos"] = self.tokens[0]
        shapes = case.info["extra"]
        return {
            name: x.flatten(1, 2) if x.ndim > len(shapes.get(name, x.shape)) else x
            for name, x in found.items()
        }


def whole_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut off what the published patch embedding drops; ours fills up the last patch instead."""
    height, width = (side - side % patch_size for side in images.shape[-2:])
    return images[..., :height, :width]
