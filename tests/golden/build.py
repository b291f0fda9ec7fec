"""Build vitdet's modules from the config of a golden case, load its weights and run it.

Every key of a config is either used, or named as one that cannot change the compared numbers, or
makes the case fail: nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from vitdet.backbones.base import LayeredBackbone
from vitdet.backbones.vit import PlainViT, ViT
from vitdet.convert import convert
from vitdet.layers.attention import KERNELS
from vitdet.layers.positions import RelPos
from vitdet.pyramid import SimpleFeaturePyramid

from .cases import Case, Options, UnsupportedCase
from .compare import Comparison, compare, loss_of

Change = Callable[[nn.Module], None]
Prepare = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mode:
    """How to run a case: attention kernel, and whether activations are recomputed."""

    backend: str = "auto"
    checkpointed: bool = False

    def __str__(self) -> str:
        return "checkpointed" if self.checkpointed else self.backend


def cpu_backends() -> list[str]:
    """Return the names of the attention kernels that run here on the CPU."""
    q = torch.zeros(1, 2, 4, 16)
    rel_pos = RelPos(torch.zeros(1, 2, 4, 2), torch.zeros(1, 2, 4, 2))
    return [
        name
        for name, kernel in KERNELS.items()
        if kernel.can_run(q, None) and kernel.can_run(q, rel_pos)
    ]


MODES = [Mode(backend) for backend in cpu_backends()] + [Mode(checkpointed=True)]


@dataclass
class Built:
    """A finished model: `call` maps the images to (outputs, extra), both by the case's names.

    `parameters` gives for each parameter name of the case the name of ours. Where the weights went
    through `converted`, `leaves` holds the tensors under the case's names that gather gradients.
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
    if built.leaves is not None:
        gradients = {name: built.leaves[name].grad for name in built.parameters}
    else:
        own = dict(built.model.named_parameters())
        gradients = {name: own[mine].grad for name, mine in built.parameters.items()}
    input_gradients = [image.grad for image in images]
    return compare(case, outputs, extra, gradients, input_gradients, built.not_offered)


# --- configs -----------------------------------------------------------------------------------


def vit_options(options: Options) -> dict[str, Any]:
    """Translate the arguments of detectron2's ViT to ours; defaults are its own."""
    depth = options.take("depth", 12)
    windows = set(options.take("window_block_indexes", ()))
    arguments = {
        "img_size": options.take("img_size", 1024),
        "patch_size": options.take("patch_size", 16),
        "in_chans": options.take("in_chans", 3),
        "embed_dim": options.take("embed_dim", 768),
        "depth": depth,
        "num_heads": options.take("num_heads", 12),
        "mlp_ratio": options.take("mlp_ratio", 4.0),
        "qkv_bias": options.only("qkv_bias", (True, False), True),
        "drop_path_rate": options.take("drop_path_rate", 0.0),
        "norm_eps": norm_eps(options),
        "use_abs_pos": options.only("use_abs_pos", (True, False), True),
        "use_rel_pos": options.only("use_rel_pos", (True, False), False),
        "window_size": options.take("window_size", 0),
        "global_block_indexes": [i for i in range(depth) if i not in windows],
        "residual_block_indexes": list(options.take("residual_block_indexes", ())),
        "pretrain_img_size": options.take("pretrain_img_size", 224),
        "pretrain_use_cls_token": options.only("pretrain_use_cls_token", (True, False), True),
        "out_feature": options.take("out_feature", "last_feat"),
    }
    check_gelu(options)
    options.inert("rel_pos_zero_init", "use_act_checkpoint")  # weights are given; a way to compute
    options.done()
    return arguments


def norm_eps(options: Options) -> float:
    """Return the eps of {"name": "LayerNorm", "eps": ...}; torch's default where there is none."""
    if options.take("norm_layer", None) is None:
        return 1e-5
    norm = options.section("norm_layer")
    norm.only("name", ("LayerNorm",))
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


def for_mode(arguments: dict[str, Any], mode: Mode) -> dict[str, Any]:
    """Return the arguments of our ViT for a mode."""
    arguments = dict(arguments, attention_backend=mode.backend)
    if mode.checkpointed:
        arguments["checkpoint_blocks"] = list(range(arguments["depth"]))
        arguments["drop_path_rate"] = 0.0
    return arguments


# --- weights -----------------------------------------------------------------------------------


def load_by_name(case: Case, model: nn.Module) -> dict[str, str]:
    """Load weights whose names are ours; return every parameter's name under itself."""
    state = case.weights()
    own = model.state_dict()
    for name, shape in case.info["buffers_not_filled"].items():
        if name not in own or list(own[name].shape) != list(shape):
            raise UnsupportedCase(f"{case.name}: vitdet has no buffer {name} of shape {shape}")
        state[name] = own[name]
    model.load_state_dict(state, strict=True)
    return {name: name for name, _ in model.named_parameters()}


def load_by_conversion(case: Case, model: nn.Module, source_format: str) -> dict[str, str]:
    """Load weights through `vitdet.convert`; return our parameter's name under the case's name."""
    target = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state, report = convert(case.weights(), target, source_format=source_format)
    if report.resized or report.initialised:
        raise UnsupportedCase(
            f"{case.name}: conversion resized {report.resized}, left {report.initialised} out"
        )
    model.load_state_dict(state, strict=True)
    aliases = set(case.info.get("aliases", {}))
    used = {name: mine for name, mine in report.used.items() if name not in aliases}
    assert sorted(used.values()) == sorted(target), "a name of ours comes from no name of the case"
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
    own = model.state_dict()
    target = {name: tuple(value.shape) for name, value in own.items()}
    leaves = case.weights()
    for name, shape in case.info["buffers_not_filled"].items():
        leaves[name] = torch.zeros(shape, dtype=torch.int64)  # batches seen
    for value in leaves.values():
        value.requires_grad_(value.is_floating_point())
    given = {name: prepare(name, value) if prepare else value for name, value in leaves.items()}
    source = {prefix + name: value for name, value in given.items()} | dict(beside or {})
    state, report = convert(source, target, source_format=source_format)
    left = [name for name in report.initialised if not name.endswith("num_batches_tracked")]
    if report.resized or left or report.dropped:
        raise UnsupportedCase(
            f"{case.name}: conversion resized {report.resized}, left {left}, {report.dropped}"
        )
    for name, value in state.items():
        module = model.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        if name in trained:
            del module._parameters[last]
            setattr(module, last, value.detach() if name in frozen else value)
        else:
            module._buffers[last] = value.detach()
    used = {name: report.used[prefix + name] for name in leaves}
    return {name: mine for name, mine in used.items() if mine in trained}, leaves


# --- backbones ---------------------------------------------------------------------------------


class Recorder:
    """Keeps the tokens (B, H, W, C) before block 0 and after every block of a ViT."""

    def __init__(self, vit: PlainViT) -> None:
        self.tokens: list[torch.Tensor] = []
        self._count = len(vit.blocks) + 1
        self.clear()
        vit.blocks[0].register_forward_pre_hook(self._before)
        for i, block in enumerate(vit.blocks):
            block.register_forward_hook(self._after(i + 1))

    def clear(self) -> None:
        """Forget, to record another run."""
        self.tokens = [torch.empty(0)] * self._count

    def _before(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._keep(0, arguments[0])

    def _after(self, i: int) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda _, __, output: self._keep(i, output)

    def _keep(self, i: int, tokens: torch.Tensor) -> None:
        if self.tokens[i].numel() == 0:  # checkpointing calls a block again in the backward pass
            self.tokens[i] = tokens


def whole_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut off what the published patch embedding drops; ours fills up the last patch instead."""
    height, width = (side - side % patch_size for side in images.shape[-2:])
    return images[..., :height, :width]


def detectron2_vit(case: Case, mode: Mode) -> Built:
    """Build detectron2's ViT."""
    vit = ViT(**for_mode(vit_options(case.config()), mode))
    return Built(vit, block_outputs(vit), load_by_name(case, vit))


def block_outputs(vit: PlainViT) -> Callable[[list[torch.Tensor]], Any]:
    """Return the call whose intermediate results are the tokens of every block."""
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        outputs = vit(whole_patches(images[0], vit.patch_size))
        extra = {f"blocks.{i}": tokens for i, tokens in enumerate(recorder.tokens[1:])}
        return outputs, extra | {"tokens_with_pos": recorder.tokens[0]}

    return call


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


def detectron2_pyramid(case: Case, mode: Mode) -> Built:
    """Build detectron2's SimpleFeaturePyramid over its ViT."""
    config = case.config()
    vit = ViT(**for_mode(vit_options(config.section("net")), mode))
    model = SimpleFeaturePyramid(vit, **pyramid_options(config.section("pyramid")))
    config.done()
    recorder = Recorder(vit)

    def call(images: list[torch.Tensor]) -> Any:
        levels = model(whole_patches(images[0], vit.patch_size))
        return levels, {"last_feat": recorder.tokens[-1].permute(0, 3, 1, 2)}

    return Built(model, call, load_by_name(case, model))
