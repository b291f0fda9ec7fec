"""Multi-scale vision longformer: a pyramid of transformer stages with sparse attention.

Zhang et al., "Multi-Scale Vision Longformer: A New Vision Transformer for High-Resolution Image
Encoding". Parameter names of microsoft/VisionLongformerForObjectDetection, msvit/msvit.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone, check_indexes
from vitdet.backbones.msvit.attention import (
    FastAttention,
    FullAttention,
    LinformerAttention,
    OnlyGlobalAttention,
    PerformerAttention,
    SRAttention,
    VilAttention,
)
from vitdet.backbones.msvit.stage import (
    AttentionBlock,
    MlpBlock,
    Size,
    Stage,
    StageEmbed,
    stages_of,
)
from vitdet.layers.parts import drop_path_rates
from vitdet.utils.checks import InputError, passes_on

_KINDS = {
    "vil": VilAttention,
    "full": FullAttention,
    "only_global": OnlyGlobalAttention,
    "srformer": SRAttention,
    "linformer": LinformerAttention,
    "performer": PerformerAttention,
}
_HEAD = "head"
_SEED_STEP = 1_000_003  # between the seeds of two draws of random features


class MsViT(LayeredBackbone):
    """Vision longformer with 3 or 4 stages, each with its own attention.

    Global tokens live in one stage: they are dropped between stages and from the outputs, which
    have no norm.

    Args:
        arch: ARCH string of the published code, see `stage`; None for lists.
        img_size: longest side in pixels that the position tables are made for; rounded up to a
            multiple of the last stage's stride. Other sizes work too, see `stage`.
        in_chans: channels of an image.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        redraw_interval: performer: forward passes in training between two draws of the random
            features; None for never, as in the published detection code.
        frozen_stages: numbers, from 1, of stages that do not learn and are in evaluation mode.
        checkpoint_blocks: blocks, from 0 through all stages, recomputed in the backward pass.
        num_classes: classes of the classifier, 0 for none; it goes with the output "head".
        avg_pool: whether the classifier averages all tokens, instead of taking the first global.
        out_features: outputs: "layer1", "layer2", ... and "head". Stages after the last one that
            is needed are not built.
        stage: the arguments of `stage.Stage`, each a list of one value a stage, or one for all.
    """

    @passes_on(Stage)
    def __init__(
        self,
        *,
        arch: str | None = None,
        img_size: int = 1344,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        redraw_interval: int | None = 1000,
        frozen_stages: Collection[int] = (),
        checkpoint_blocks: Collection[int] = (),
        num_classes: int = 0,
        avg_pool: bool = False,
        out_features: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
        **stage: Any,
    ) -> None:
        super().__init__()
        stages = stages_of(arch, stage)
        self.stages = stages[: _needed(out_features, len(stages), num_classes)]
        self.out_features = tuple(out_features)
        self.redraw_interval, self.avg_pool = redraw_interval, avg_pool
        check_indexes("frozen_stages", frozen_stages, range(1, len(self.stages) + 1))
        check_indexes("checkpoint_blocks", checkpoint_blocks, range(self.num_layers))
        self.frozen_stages = frozenset(frozen_stages)
        self.checkpoint_blocks = frozenset(checkpoint_blocks)

        stride = math.prod(each.patch_size for each in stages)
        side = -(-img_size // stride) * stride
        rates = iter(drop_path_rates(drop_path_rate, sum(each.depth for each in stages)))
        for i, each in enumerate(self.stages):
            side //= each.patch_size
            layers: list[nn.Module] = [StageEmbed(each, in_chans, side)]
            for rate in (next(rates) for _ in range(each.depth)):
                attn = _KINDS[each.attention](each, side)
                layers += [AttentionBlock(each, attn, rate), MlpBlock(each, rate)]
            self.add_module(f"layer{i + 1}", nn.ModuleList(layers))
            in_chans = each.embed_dim
        eps = self.stages[-1].norm_eps
        self.norm = nn.LayerNorm(in_chans, eps=eps) if num_classes else None
        self.head = nn.Linear(in_chans, num_classes) if num_classes else None
        if self._performers():  # how often the features were drawn, and how long ago
            self.register_buffer("calls_since_last_redraw", torch.tensor(0))
            self.register_buffer("num_redraws", torch.tensor(0))
            self.calls_since_last_redraw: torch.Tensor
            self.num_redraws: torch.Tensor
        numbers = {name: _number(name) for name in out_features if name != _HEAD}
        self.set_outputs(
            {name: (self.stages[n - 1].embed_dim, self._stride(n)) for name, n in numbers.items()}
        )
        self._init_weights()
        for number in self.frozen_stages:
            self._layers(number).requires_grad_(False)

    def _layers(self, number: int) -> nn.ModuleList:
        return getattr(self, f"layer{number}")

    def _stride(self, number: int) -> int:
        """Return the stride in pixels of stage `number`, from 1."""
        return math.prod(stage.patch_size for stage in self.stages[:number])

    def _performers(self) -> list[FastAttention]:
        return [module for module in self.modules() if isinstance(module, FastAttention)]

    def _init_weights(self) -> None:
        """Draw linear layers, tokens and tables from a truncated normal, 0.02; biases are zero."""
        for name, parameter in self.named_parameters():
            if "norm" in name.split(".")[-2:-1] or "proj_sr" in name or "norm_embed" in name:
                continue
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim != 4:
                nn.init.trunc_normal_(parameter, std=0.02)
        for i, features in enumerate(self._performers()):
            features.redraw(i)

    @property
    def size_divisibility(self) -> int:
        """Images should be padded to a multiple of this, the stride of the last stage."""
        return self._stride(len(self.stages))

    @property
    def num_layers(self) -> int:
        """Number of blocks, an attention and an MLP each."""
        return sum(stage.depth for stage in self.stages)

    def layer_id(self, name: str) -> int:
        """Return 0 for the first embedding, i + 1 for block i, num_layers + 1 for the classifier.

        The embedding of a later stage belongs to the first block after it.
        """
        parts = name.split(".")
        if not parts[0].startswith("layer"):
            return self.num_layers + 1
        number, part = _number(parts[0]), int(parts[1])
        if (number, part) == (1, 0):
            return 0
        return sum(stage.depth for stage in self.stages[: number - 1]) + max(1, -(-part // 2))

    def train(self, mode: bool = True) -> MsViT:
        """Set training or evaluation mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for number in self.frozen_stages:
            self._layers(number).eval()
        return self

    def _redraw_if_due(self) -> None:
        """Draw the random features of performer stages again, the same ones on every process."""
        performers = [features for features in self._performers() if features.training]
        if not performers or self.redraw_interval is None:
            return
        if int(self.calls_since_last_redraw) < self.redraw_interval:
            self.calls_since_last_redraw += 1
            return
        self.calls_since_last_redraw.zero_()
        self.num_redraws += 1
        for i, features in enumerate(performers):
            features.redraw(_SEED_STEP * int(self.num_redraws) + i)

    def units(self) -> Sequence[nn.Module]:
        """Return embeddings, attention blocks and MLP blocks."""
        stages = range(1, len(self.stages) + 1)
        return [layer for number in stages for layer in self._layers(number)]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map images x (B, 3, h, w) to {"layer1": (B, C, H, W), ...}, H = h // stride.

        "head", if it is an output, is (B, num_classes) logits.
        """
        self._redraw_if_due()
        outputs: dict[str, torch.Tensor] = {}
        block, tokens = 0, x
        for i, stage in enumerate(self.stages):
            embed, *layers = self._layers(i + 1)
            tokens, size = embed(x)
            for halves in zip(layers[::2], layers[1::2], strict=True):
                if block in self.checkpoint_blocks and self.training:
                    tokens = checkpoint(_block, *halves, tokens, size, use_reentrant=False)
                else:
                    tokens = _block(*halves, tokens, size)
                block += 1
            x = tokens[:, stage.num_global_tokens :].mT.unflatten(2, size)  # (B, C, H, W)
            outputs[f"layer{i + 1}"] = x
        if self.norm is not None and self.head is not None:
            tokens = self.norm(tokens)
            average = self.avg_pool or not self.stages[-1].num_global_tokens
            outputs[_HEAD] = self.head(tokens.mean(1) if average else tokens[:, 0])
        return {name: outputs[name] for name in self.out_features}


def _block(attend: nn.Module, mlp: nn.Module, tokens: torch.Tensor, size: Size) -> torch.Tensor:
    return mlp(attend(tokens, size))


def _number(name: str) -> int:
    return int(name.removeprefix("layer"))


def _needed(out_features: Sequence[str], count: int, num_classes: int) -> int:
    """Return how many stages the outputs need."""
    names = [*(f"layer{i + 1}" for i in range(count)), _HEAD]
    if not out_features or not set(out_features) <= set(names):
        raise InputError(
            f"out_features: expected some of {', '.join(names)}, got {list(out_features)}. Name "
            "the maps that the pyramid takes."
        )
    if (_HEAD in out_features) != bool(num_classes):
        raise InputError(
            f"classifier: expected both classes and the output 'head', got num_classes "
            f"{num_classes} and out_features {list(out_features)}. A classifier that is no output "
            "would have weights that get no gradient."
        )
    return count if num_classes else max(_number(name) for name in out_features)
