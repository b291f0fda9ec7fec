"""Simple feature pyramid: every level from the last map of a backbone (ViTDet, Sec. 3, Fig. 2).

Parameter names and numbers as facebookresearch/detectron2, modeling/backbone/vit.py
SimpleFeaturePyramid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from detectron2.layers import Conv2d
from detectron2.modeling import Backbone
from torch import nn

from vitdet.layers.norms import ChannelLayerNorm
from vitdet.utils.checks import fail

_NORMS: dict[str, Callable[[int], nn.Module] | None] = {"LN": ChannelLayerNorm, "": None}
_SCALES = (4.0, 2.0, 1.0, 0.5)


class TopBlock(Protocol):
    """Makes coarser levels out of one, as detectron2's `LastLevelMaxPool`."""

    num_levels: int
    in_feature: str

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map a level (B, C, H, W) to `num_levels` coarser ones."""
        ...


class SimpleFeaturePyramid(Backbone):
    """Levels of several strides from one map, each by its own (de)convolutions.

    Args:
        net: the backbone, a finished part. If it tells the layer of a parameter (`layer_id`,
            `num_layers`), so does the pyramid.
        in_feature: name of the map of `net` to use.
        out_channels: channels of every level.
        scale_factors: out of 4, 2, 1 and 0.5: a factor f gives a level of stride patch_size / f.
        top_block: makes further levels from the last, as detectron2's `LastLevelMaxPool`; it is
            given the level whose name is its `in_feature`.
        norm: "LN", or "" for none.
        square_pad: side in pixels to which images are padded on the right and below, 0 to pad only
            to a multiple of the coarsest stride.

    Raises:
        InputError: a scale factor or norm that does not exist.
    """

    def __init__(
        self,
        net: Backbone,
        *,
        in_feature: str = "last_feat",
        out_channels: int = 256,
        scale_factors: Sequence[float] = _SCALES,
        top_block: TopBlock | None = None,
        norm: str = "LN",
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            fail(
                "pyramid norm",
                expected=f"one of {list(_NORMS)}",
                got=repr(norm),
                remedy="Take one.",
            )
        shape = net.output_shape()[in_feature]
        if shape.channels is None or shape.stride is None:
            fail(
                f"backbone feature {in_feature!r}",
                expected="known channels and stride",
                got=str(shape),
                remedy="Have the backbone's output_shape() tell them.",
            )
        self.net = net
        self.in_feature = in_feature
        self.square_pad = square_pad
        self.top_block: Any = top_block  # a module: its parameters are ours
        self._levels: list[tuple[str, str]] = []  # (name of the level, name of its module)
        self._out_feature_strides: dict[str, int] = {}
        for scale in scale_factors:
            stride = int(shape.stride / scale)
            level = int(math.log2(stride))
            # `simfp_2` and so on are detectron2's names in the state dict.
            self.add_module(f"simfp_{level}", _level(scale, shape.channels, out_channels, norm))
            self._levels.append((f"p{level}", f"simfp_{level}"))
            self._out_feature_strides[f"p{level}"] = stride
        self._size_divisibility = max(self._out_feature_strides.values())
        if top_block is not None:
            coarsest = max(int(name[1:]) for name, _ in self._levels)
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
        last = features[self.in_feature]
        levels = {name: self.get_submodule(module)(last) for name, module in self._levels}
        if self.top_block is not None:
            source = self.top_block.in_feature
            top = features[source] if source in features else levels[source]
            levels.update(zip(self._out_features[len(levels) :], self.top_block(top), strict=True))
        return levels


def _level(scale: float, dim: int, out_channels: int, norm: str) -> nn.Sequential:
    """Return the layers of one level: resampling, then 1x1 and 3x3 convolutions (Sec. 3)."""
    make_norm = _NORMS[norm]
    layers: list[nn.Module] = []
    if scale == 4.0:
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
        layers += [make_norm(dim // 2) if make_norm else nn.Identity(), nn.GELU()]
        layers += [nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)]
        dim //= 4
    elif scale == 2.0:
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
        dim //= 2
    elif scale == 0.5:
        layers += [nn.MaxPool2d(2, stride=2)]
    elif scale != 1.0:
        fail("scale factor", expected=f"one of {_SCALES}", got=scale, remedy="Take one of these.")
    for kernel, channels in ((1, dim), (3, out_channels)):
        conv_norm = make_norm(out_channels) if make_norm else None
        layers.append(
            Conv2d(
                channels,
                out_channels,
                kernel,
                padding=kernel // 2,
                bias=conv_norm is None,
                norm=conv_norm,
            )
        )
    return nn.Sequential(*layers)
