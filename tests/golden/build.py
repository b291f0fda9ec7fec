"""Build vitdet's modules from the config of a golden case, load its weights and run it.

What a config asks for and nobody reads shows in the numbers: outputs, gradients and every stored
intermediate result are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from vitdet.backbones.base import LayeredBackbone
from vitdet.convert import convert

from .cases import UnsupportedCase
from .compare import compare, loss_of

Change = Callable[[nn.Module], None]
Prepare = Callable[[str, torch.Tensor], torch.Tensor]
Weights = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Mode:
    """How to run a case: attention kernel, and whether activations are recomputed."""

    backend: str = "auto"
    checkpointed: bool = False

    def __str__(self):
        return "checkpointed" if self.checkpointed else self.backend

    def of(self, arguments, blocks=0):
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


def run(built, case, mode, change=None):
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


def given(options, *same, **renamed):
    """Take the keys that a config has, under our names (`renamed`: ours=theirs)."""
    names = dict(zip(same, same, strict=True)) | renamed
    found = {ours: options.get(theirs) for ours, theirs in names.items()}
    return {name: value for name, value in found.items() if value is not None}


SIZES = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
SHARED = ("img_size", *SIZES, "qkv_bias", "drop_path_rate", "use_abs_pos", "window_size")
SHARED += ("pretrain_img_size", "pretrain_use_cls_token", "residual_block_indexes", "out_feature")


def vit_options(options, *more, eps=1e-5, **renamed):
    """Translate the arguments of detectron2's ViT, from which the others descend, to ours.

    `eps` is that of a norm that the config does not name.
    """
    arguments = given(options, *SHARED, "use_rel_pos", *more, **renamed)
    arguments["global_block_indexes"] = global_blocks(options, "window_block_indexes")
    arguments["norm_eps"] = norm_eps(options, eps)
    return arguments


def global_blocks(options, key, depth="depth"):
    """Return the blocks that are not among those of `key`."""
    windows = options.get(key, ())
    return [i for i in range(options.get(depth, 12)) if i not in windows]


def norm_eps(options, default):
    """Return the eps of {"name": "LayerNorm", "eps": ...}; without eps it is torch's default."""
    norm = options.get("norm_layer")
    return norm.get("eps", 1e-5) if isinstance(norm, dict) else default


def pyramid_options(options):
    """Translate the arguments of detectron2's SimpleFeaturePyramid to ours."""
    top = LastLevelMaxPool() if options.get("top_block") else None
    arguments = {"in_feature": "last_feat", "out_channels": 256, "norm": "LN", "square_pad": 0}
    return arguments | given(options, *arguments, "scale_factors") | {"top_block": top}


# --- weights -----------------------------------------------------------------------------------


def leaves_of(case):
    """Return the case's weights as leaves that gather gradients."""
    leaves = case.weights()
    return {name: x.requires_grad_(x.is_floating_point()) for name, x in leaves.items()}


def put(model, leaves, weights):
    """Put weights of our names, functions of the leaves, into the model."""
    values = {name: value.detach() for name, value in weights.items()}
    model.load_state_dict(model.state_dict() | values)
    return leaves, weights


def load(case, model, source_format, prefix="", beside=None, prepare=None):
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

    def __init__(self, vit):
        self.clear()
        vit.blocks[0].register_forward_pre_hook(lambda _, given: self._keep(0, given[0]))
        for i, block in enumerate(vit.blocks, 1):
            block.register_forward_hook(lambda _, __, output, i=i: self._keep(i, output))

    def clear(self):
        """Forget, to record another run."""
        self._kept = {}

    def _keep(self, i, tokens):
        self._kept.setdefault(i, tokens)  # checkpointing calls a block again in the backward pass

    @property
    def tokens(self):
        """All that was kept, in order."""
        return [*self._kept.values()]

    def extra(self, case):
        """Return the tokens by the names that the cases have, as sequences where they are."""
        found = {f"blocks.{i - 1}": tokens for i, tokens in self._kept.items()}
        found["tokens_with_pos"] = self._kept[0]
        shapes = case.info["extra"]
        return {
            name: x.flatten(1, 2) if x.ndim > len(shapes.get(name, x.shape)) else x
            for name, x in found.items()
        }


def outputs_of_parts(case, net, prefix=""):
    """Return what will hold the first output of every module that the case names in `extra`."""
    values = {}

    def keep(name, _, __, output):
        tokens = output[0] if isinstance(output, tuple) else output
        as_sequence = len(case.info["extra"][name]) < tokens.ndim
        # checkpointing calls a block again in the backward pass
        values.setdefault(name, tokens.flatten(1, 2) if as_sequence else tokens)

    for name in case.info["extra"]:
        module = net.get_submodule(name.removeprefix(prefix))
        module.register_forward_hook(partial(keep, name))
    return values


def whole_patches(images, patch_size):
    """Cut off what the published patch embedding drops; ours fills up the last patch instead."""
    height, width = (side - side % patch_size for side in images.shape[-2:])
    return images[..., :height, :width]
