"""Multi-scale vision longformer: a pyramid of transformer stages with sparse attention.

Zhang et al., "Multi-Scale Vision Longformer: A New Vision Transformer for High-Resolution Image
Encoding". Parameter names of microsoft/VisionLongformerForObjectDetection, msvit/msvit.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import islice

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone
from vitdet.backbones.msvit import sliding_chunk
from vitdet.backbones.msvit.approximate import FastAttention
from vitdet.backbones.msvit.arch import Stage, parse_arch, stages_of
from vitdet.backbones.msvit.attention import VilAttention
from vitdet.backbones.msvit.blocks import Options, Size, build_stage
from vitdet.backbones.msvit.grid import check_pattern
from vitdet.backbones.msvit.positions import PosResize
from vitdet.layers.attention import check_backend
from vitdet.layers.drop_path import drop_path_rates
from vitdet.utils.checks import fail

_HEAD = "head"
_SEED_STEP = 1_000_003  # between the seeds of two draws of random features


class MsViT(LayeredBackbone):
    """Vision longformer with 3 or 4 stages, each with its own attention.

    The stages are given by `arch`, or by the arguments from `embed_dim` to `use_abs_pos`, each a
    list of one value a stage, or one value for all. Their meanings are those of `arch.Stage`.
    Global tokens live in one stage: they are dropped between stages and from the outputs, which
    have no norm.

    Args:
        arch: ARCH string of the published code, see `arch.parse_arch`; None for the lists.
        embed_dim: channels C of a stage.
        depth: blocks of a stage.
        num_heads: heads of a stage.
        patch_size: side of a stage's patches, on the map before it.
        num_global_tokens: global tokens of a stage.
        attention: "vil", "full", "only_global", "srformer", "linformer" or "performer"; with
            `arch` one word, the kind of the stages with s1.
        attention_size: side of a chunk, of a reduced square, or number of features.
        use_abs_pos: absolute positions (True) or relative ones where the kind has them.
        img_size: longest side in pixels that the position tables are made for; rounded up to a
            multiple of the last stage's stride. Other sizes work too, see the two `resize`.
        in_chans: channels of an image.
        mlp_ratio: hidden channels of an MLP over C.
        qkv_bias: whether q, k and v have a bias.
        drop_rate: dropout after positions, attentions and MLP layers.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_eps: epsilon of the LayerNorms. The published code has 1e-6 whatever LN_EPS says.
        norm_embed: whether a stage's tokens are normalised before its positions are added.
        share_global_weights: whether global tokens have the weights of the others.
        share_kv: whether linformer has one projection for keys and values.
        exact: 0 chunks, 1 exact window, -1 chunks that wrap around, see `grid.ChunkGrid`.
        mode: 0 all neighbours, -1 own chunk, 1 to 8 one random neighbour in training.
        redraw_interval: performer: forward passes in training between two draws of the random
            features; None for never, as in the published detection code.
        pos_embed_resize: "crop" (published) or "interpolate", see `positions`.
        rel_pos_resize: the same for relative positions of full attention and for linformer.
        attention_backend: kernel of attentions without a learned bias, see
            `vitdet.layers.attention`.
        sliding_chunk_backend: kernel of vil, see `sliding_chunk`.
        frozen_stages: numbers, from 1, of stages that do not learn and are in evaluation mode.
        checkpoint_blocks: blocks, from 0 through all stages, recomputed in the backward pass.
        num_classes: classes of the classifier, 0 for none; it goes with the output "head".
        avg_pool: whether the classifier averages all tokens, instead of taking the first global.
        out_features: outputs: "layer1", "layer2", ... and "head". Stages after the last one that
            is needed are not built.

    Raises:
        InputError: a wrong ARCH string or list, an unknown kind, output, stage, block or backend.
    """

    def __init__(
        self,
        *,
        arch: str | None = None,
        embed_dim: Sequence[int] | int | None = None,
        depth: Sequence[int] | int | None = None,
        num_heads: Sequence[int] | int | None = None,
        patch_size: Sequence[int] | int | None = None,
        num_global_tokens: Sequence[int] | int | None = None,
        attention: Sequence[str] | str = "vil",
        attention_size: Sequence[int] | int | None = None,
        use_abs_pos: Sequence[bool] | bool | None = None,
        img_size: int = 1344,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        norm_embed: bool = True,
        share_global_weights: bool = True,
        share_kv: bool = True,
        exact: int = 0,
        mode: int = 0,
        redraw_interval: int | None = 1000,
        pos_embed_resize: PosResize = "crop",
        rel_pos_resize: PosResize = "crop",
        attention_backend: str = "auto",
        sliding_chunk_backend: str = "auto",
        frozen_stages: Collection[int] = (),
        checkpoint_blocks: Collection[int] = (),
        num_classes: int = 0,
        avg_pool: bool = False,
        out_features: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
    ) -> None:
        super().__init__()
        lists = {
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "patch_size": patch_size,
            "num_global_tokens": num_global_tokens,
            "attention_size": attention_size,
            "use_abs_pos": use_abs_pos,
        }
        stages = _stages(arch, attention, {k: v for k, v in lists.items() if v is not None})
        check_pattern(exact, mode)
        check_backend(attention_backend)
        sliding_chunk.check_backend(sliding_chunk_backend)
        self.stages = stages[: _needed(out_features, len(stages), num_classes)]
        self.out_features = tuple(out_features)
        self.redraw_interval = redraw_interval
        self.avg_pool = avg_pool
        _check_numbers("frozen_stages", frozen_stages, range(1, len(self.stages) + 1))
        _check_numbers("checkpoint_blocks", checkpoint_blocks, range(self.num_layers))
        self.frozen_stages = frozenset(frozen_stages)
        self.checkpoint_blocks = frozenset(checkpoint_blocks)

        options = Options(
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            norm_eps=norm_eps,
            norm_embed=norm_embed,
            share_global_weights=share_global_weights,
            share_kv=share_kv,
            exact=exact,
            mode=mode,
            pos_embed_resize=pos_embed_resize,
            rel_pos_resize=rel_pos_resize,
            attention_backend=attention_backend,
            sliding_chunk_backend=sliding_chunk_backend,
        )
        stride = math.prod(stage.patch_size for stage in stages)
        side = -(-img_size // stride) * stride
        rates = iter(drop_path_rates(drop_path_rate, sum(stage.depth for stage in stages)))
        for i, stage in enumerate(self.stages):
            side //= stage.patch_size
            layers = build_stage(stage, in_chans, side, islice(rates, stage.depth), options)
            self.add_module(f"layer{i + 1}", layers)
            in_chans = stage.embed_dim
        self.norm = nn.LayerNorm(in_chans, eps=norm_eps) if num_classes else None
        self.head = nn.Linear(in_chans, num_classes) if num_classes else None
        if self._performers():  # how often the features were drawn, and how long ago
            self.register_buffer("calls_since_last_redraw", torch.tensor(0))
            self.register_buffer("num_redraws", torch.tensor(0))
            self.calls_since_last_redraw: torch.Tensor
            self.num_redraws: torch.Tensor

        # detectron2's Backbone.output_shape reads these three.
        names = [name for name in out_features if name != _HEAD]
        self._out_features = names
        self._out_feature_channels = {n: self.stages[_number(n) - 1].embed_dim for n in names}
        self._out_feature_strides = {n: self._stride(_number(n)) for n in names}
        self._init_weights()
        for number in self.frozen_stages:
            self._layers(number).requires_grad_(False)

    def _layers(self, number: int) -> nn.ModuleList:
        layers = self.get_submodule(f"layer{number}")
        assert isinstance(layers, nn.ModuleList)
        return layers

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

    def set_mode(self, mode: int) -> None:
        """Set which neighbours the chunks of all vil stages see, as the argument `mode`."""
        for module in self.modules():
            if isinstance(module, VilAttention):
                check_pattern(module.exact, mode)
                module.mode = mode

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

    # detectron2 declares forward() without arguments.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Map images x (B, 3, h, w) to {"layer1": (B, C, H, W), ...}, H = h // stride.

        "head", if it is an output, is (B, num_classes) logits.
        """
        self._redraw_if_due()
        outputs: dict[str, torch.Tensor] = {}
        block = 0
        tokens = x
        for i, stage in enumerate(self.stages):
            embed, *layers = self._layers(i + 1)
            tokens, size = embed(x)
            for attend, mlp in zip(layers[::2], layers[1::2], strict=True):
                tokens = self._run(block, attend, mlp, tokens, size)
                block += 1
            x = tokens[:, stage.num_global_tokens :].mT.unflatten(2, size)  # (B, C, H, W)
            outputs[f"layer{i + 1}"] = x
        if self.norm is not None and self.head is not None:
            tokens = self.norm(tokens)
            over = self.stages[-1].num_global_tokens
            pooled = tokens.mean(1) if self.avg_pool or not over else tokens[:, 0]
            outputs[_HEAD] = self.head(pooled)
        return {name: outputs[name] for name in self.out_features}

    def _run(
        self, block: int, attend: nn.Module, mlp: nn.Module, tokens: torch.Tensor, size: Size
    ) -> torch.Tensor:
        def both(tokens: torch.Tensor) -> torch.Tensor:
            return mlp(attend(tokens, size))

        if block in self.checkpoint_blocks and self.training:
            return checkpoint(both, tokens, use_reentrant=False)
        return both(tokens)


def _stages(
    arch: str | None, attention: Sequence[str] | str, lists: Mapping[str, object]
) -> tuple[Stage, ...]:
    if arch is None:
        return stages_of(attention=attention, **lists)
    if lists or not isinstance(attention, str):
        got = ", ".join(lists) or f"attention={list(attention)}"
        remedy = "Set arch to null, or leave out the others."
        fail("MsViT", expected="arch, or lists of one value a stage", got=got, remedy=remedy)
    return parse_arch(arch, attention)


def _number(name: str) -> int:
    return int(name.removeprefix("layer"))


def _needed(out_features: Sequence[str], count: int, num_classes: int) -> int:
    """Return how many stages the outputs need."""
    names = [f"layer{i + 1}" for i in range(count)]
    wrong = [name for name in out_features if name not in (*names, _HEAD)]
    if wrong or not out_features:
        remedy = "Name the maps that the pyramid takes."
        expected = f"some of {', '.join([*names, _HEAD])}"
        fail("out_features", expected=expected, got=str(list(out_features)), remedy=remedy)
    if (_HEAD in out_features) != bool(num_classes):
        got = f"num_classes {num_classes} and out_features {list(out_features)}"
        remedy = "A classifier that is no output would have weights that get no gradient."
        fail("classifier", expected="both classes and the output 'head'", got=got, remedy=remedy)
    return count if num_classes else max(_number(name) for name in out_features)


def _check_numbers(what: str, numbers: Collection[int], allowed: range) -> None:
    wrong = [number for number in numbers if number not in allowed]
    if wrong:
        expected = f"numbers from {allowed.start} to {allowed.stop - 1}"
        fail(what, expected=expected, got=str(wrong), remedy="Correct the list.")
