"""Simple feature pyramid: every level from the last map of a backbone (ViTDet, Sec. 3, Fig. 2).

Parameter names and numbers as facebookresearch/detectron2, modeling/backbone/vit.py
SimpleFeaturePyramid. Others have the same pyramid with one thing changed: exiawsh/StreamPETR
(models/backbones/eva_vit.py) makes the coarse levels by strided convolutions, alibaba/EasyCV
(detection/necks/sfp.py) normalises by GroupNorm with one group, and its first version keeps all
channels in the deconvolutions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import Backbone
from torch import nn

from vitdet.layers.norms import channel_layer_norm, group_norm
from vitdet.utils.checks import InputError, check_word

_Norm = Callable[[int], nn.Module]


class _Level(NamedTuple):
    name: str
    module: str
    source: str  # the backbone's map


class SimpleFeaturePyramid(Backbone):
    """Levels of several strides from one map, each by its own (de)convolutions.

    Args:
        net: the backbone, a finished part. If it tells the layer of a parameter (`layer_id`,
            `num_layers`), so does the pyramid.
        in_feature: name of the map of `net` to use, or one for each level: maps of several stages
            of the backbone (Fig. 2a, with `top_down`).
        out_channels: channels of every level.
        scale_factors: out of 4, 2, 1, 0.5 and 0.25: a factor f gives a level of stride
            patch_size / f.
        downsample: how the levels of 0.5 and 0.25 are made: "max_pool" (published), or "conv" of
            that kernel and stride (StreamPETR).
        halve_channels: whether every deconvolution halves the channels; else it keeps them.
        top_down: whether to add every level's 1x1 convolution to the next finer one, as a feature
            pyramid network does (Fig. 2b: with one map; Fig. 2a: with four).
        top_block: makes further levels from the last, as detectron2's `LastLevelMaxPool`; it is
            given the level whose name is its `in_feature`.
        norm: "LN" over the channels, "GN1" over a whole map (GroupNorm with one group), or "" for
            none. Their parameters have the same names and shapes and mean something else.
        norm_eps: epsilon of the norms.
        upsample_norm: norm between the two deconvolutions of the level of 4, None for `norm`.
            ViTAE-Transformer/ViTDet and the first version of EasyCV have another one there.
        upsample_norm_eps: its epsilon, None for `norm_eps`.
        square_pad: side in pixels to which images are padded on the right and below, 0 to pad only
            to a multiple of the coarsest stride.
    """

    def __init__(
        self,
        net: Backbone,
        *,
        in_feature: str | Sequence[str] = "last_feat",
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        downsample: str = "max_pool",
        halve_channels: bool = True,
        top_down: bool = False,
        top_block: Any = None,
        norm: str = "LN",
        norm_eps: float = 1e-6,
        upsample_norm: str | None = None,
        upsample_norm_eps: float | None = None,
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        check_word("pyramid downsample", downsample, ("max_pool", "conv"))
        make_norm = make_upsample_norm = _norm_factory(norm, norm_eps)
        if upsample_norm is not None or upsample_norm_eps is not None:
            eps = norm_eps if upsample_norm_eps is None else upsample_norm_eps
            make_upsample_norm = _norm_factory(
                norm if upsample_norm is None else upsample_norm, eps
            )
        sources = in_feature
        if isinstance(in_feature, str):
            sources = [in_feature] * len(scale_factors)
        elif len(in_feature) != len(scale_factors):
            raise InputError(
                f"pyramid in_feature: expected {len(scale_factors)} names, got {len(in_feature)}. "
                "Name one map, or one for each of scale_factors."
            )
        for source in sources:
            check_word("pyramid in_feature", source, net.output_shape())
        shapes = [net.output_shape()[source] for source in sources]
        self.net, self.top_down, self.square_pad = net, top_down, square_pad
        self.top_block = top_block  # a module: its parameters are ours
        self._levels: list[_Level] = []
        self._out_feature_strides: dict[str, int] = {}
        strides = _strides([shape.stride or 0 for shape in shapes], scale_factors)
        for scale, source, shape, stride in zip(
            scale_factors, sources, shapes, strides, strict=True
        ):
            level, channels = stride.bit_length() - 1, shape.channels or 0
            layers, dim = _resample(scale, channels, downsample, halve_channels, make_upsample_norm)
            # `simfp_2` and so on are detectron2's names in the state dict.
            module = nn.Sequential(*layers, *_convolutions(dim, out_channels, make_norm))
            self.add_module(f"simfp_{level}", module)
            self._levels.append(_Level(f"p{level}", f"simfp_{level}", source))
            self._out_feature_strides[f"p{level}"] = stride
        self._size_divisibility = max(strides)
        if top_block is not None:
            # Levels beyond the coarsest are named by their strides, so they must be made from it.
            coarsest, source = self._size_divisibility.bit_length() - 1, top_block.in_feature
            check_word("in_feature of top_block", source, (f"p{coarsest}", *net.output_shape()))
            for i in range(coarsest + 1, coarsest + 1 + top_block.num_levels):
                self._out_feature_strides[f"p{i}"] = 2**i
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this many pixels, so that no level loses a part."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What detectron2's ImageList pads to (structures/image_list.py)."""
        return {"size_divisibility": self.size_divisibility, "square_size": self.square_pad}

    @property
    def num_layers(self) -> int:
        """Number of blocks of the backbone, for layer-wise lr decay."""
        return self.net.num_layers  # pyright: ignore[reportReturnType]

    def layer_id(self, name: str) -> int:
        """Return the backbone's layer of the parameter `name`; the pyramid itself is after it."""
        prefix, _, rest = name.partition(".")
        return self.net.layer_id(rest) if prefix == "net" else self.num_layers + 1  # pyright: ignore

    # detectron2 declares forward() without arguments.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Map images x (B, 3, h, w) to levels {"p2": (B, out_channels, h / 4, w / 4), ...}."""
        features = self.net(x)
        if self.top_down:
            levels = self._sum_downwards(features)
        else:
            levels = {
                name: self.get_submodule(module)(features[source])
                for name, module, source in self._levels
            }
        if self.top_block is not None:
            source = self.top_block.in_feature
            top = features[source] if source in features else levels[source]
            levels.update(zip(self._out_features[len(levels) :], self.top_block(top), strict=True))
        return levels

    def _sum_downwards(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each level with the next coarser one's 1x1 convolution added to its own."""
        levels: dict[str, torch.Tensor] = {}
        coarser: torch.Tensor | None = None
        for name, module, source in sorted(self._levels, key=lambda level: -int(level.name[1:])):
            *before, last = self.get_submodule(module).children()
            x = features[source]
            for layer in before:
                x = layer(x)
            if coarser is not None:
                x = x + F.interpolate(coarser, size=x.shape[-2:], mode="nearest")
            coarser = x
            levels[name] = last(x)
        return {level.name: levels[level.name] for level in self._levels}


def _strides(of_maps: Sequence[int], scale_factors: Sequence[float]) -> list[int]:
    """Return the strides of the levels, in pixels."""
    for scale in scale_factors:
        check_word("scale factor", scale, (4.0, 2.0, 1.0, 0.5, 0.25))
    strides = [stride / scale for stride, scale in zip(of_maps, scale_factors, strict=True)]
    powers = all(stride in (1, 2, 4, 8, 16, 32, 64, 128, 256) for stride in strides)
    if not powers or any(fine * 2 != coarse for fine, coarse in itertools.pairwise(strides)):
        listed = ", ".join(f"{stride:g}" for stride in strides)
        raise InputError(
            f"scale_factors: expected levels whose strides are powers of two, each twice the one "
            f"before, got strides of {listed} pixels. Leave patch_size at 16: the kernel of "
            "weights with other patches is resampled."
        )
    return [int(stride) for stride in strides]


def _norm_factory(norm: str, eps: float) -> _Norm | None:
    """Return the factory of a norm by its number of channels, None for none."""
    check_word("pyramid norm", norm, ("LN", "GN1", ""))
    return {"LN": channel_layer_norm(eps), "GN1": group_norm(1, eps), "": None}[norm]


def _resample(
    scale: float, dim: int, downsample: str, halve: bool, make_norm: _Norm | None
) -> tuple[list[nn.Module], int]:
    """Return the layers that change the stride of a map of `dim` channels, and its channels."""
    if scale == 1.0:
        return [], dim
    if scale < 1.0:
        factor = int(1 / scale)
        pool = downsample == "max_pool"
        return [nn.MaxPool2d(factor) if pool else nn.Conv2d(dim, dim, factor, factor)], dim
    middle = dim // 2 if halve else dim
    layers: list[nn.Module] = [nn.ConvTranspose2d(dim, middle, 2, stride=2)]
    if scale == 2.0:
        return layers, middle
    last = dim // 4 if halve else dim
    layers += [make_norm(middle) if make_norm else nn.Identity(), nn.GELU()]
    return [*layers, nn.ConvTranspose2d(middle, last, 2, stride=2)], last


def _convolutions(dim: int, out_channels: int, make_norm: _Norm | None) -> list[nn.Module]:
    """Return the 1x1 and 3x3 convolutions that every level ends with (Sec. 3)."""
    layers: list[nn.Module] = []
    for kernel, channels in ((1, dim), (3, out_channels)):
        norm = make_norm(out_channels) if make_norm else None
        padding, bias = kernel // 2, norm is None
        layers.append(Conv2d(channels, out_channels, kernel, padding=padding, bias=bias, norm=norm))
    return layers
