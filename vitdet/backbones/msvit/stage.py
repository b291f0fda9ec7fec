"""A stage of a multi-scale vision longformer: its numbers, its embedding, the halves of its blocks.

Parameter names of microsoft/VisionLongformerForObjectDetection, msvit/msvit.py. An ARCH string of
that code has a part for each stage, "l1,h3,d96,n1,s1,g1,p4,f7,a0_l2,...": l number of the stage, h
heads, d channels, n blocks, s 1 for the sparse attention that is chosen beside the string and 0 for
full attention, g global tokens, p patch size, f size of the attention, a 1 for absolute and 0 for
relative positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.msvit import sliding_chunk
from vitdet.layers.attention import check_backend
from vitdet.layers.parts import DropPath, Mlp
from vitdet.utils.checks import InputError, check_word

Size = tuple[int, int]

ATTENTION_KINDS = ("vil", "full", "only_global", "srformer", "linformer", "performer")
# The others have no relative positions: none at all where absolute ones are off.
_WITH_REL_POS = ("vil", "full", "only_global")
# letter of an ARCH string: argument of `Stage` and what holds without it
_LETTERS = {
    "d": ("embed_dim", 192),
    "n": ("depth", 1),
    "h": ("num_heads", 3),
    "p": ("patch_size", 2),
    "g": ("num_global_tokens", 1),
    "f": ("attention_size", 7),
    "a": ("use_abs_pos", 1),
}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        embed_dim: channels C of a token.
        depth: blocks, each an attention and an MLP.
        num_heads: heads N of the attention.
        patch_size: side of the squares of the map before that become one token.
        num_global_tokens: learned tokens G that see, and are seen from, everywhere.
        attention: one of ATTENTION_KINDS.
        attention_size: vil: side of a chunk in tokens; srformer: side of the squares of tokens that
            become one key; linformer and performer: number of features; else of no meaning.
        use_abs_pos: absolute positions; without them vil, full and only_global have relative ones.
        mlp_ratio: hidden channels of an MLP over C.
        qkv_bias: whether q, k and v have a bias.
        drop_rate: dropout after positions, attentions and MLP layers.
        norm_eps: epsilon of the LayerNorms. The published code has 1e-6 whatever LN_EPS says.
        norm_embed: whether the tokens are normalised before positions are added.
        share_global_weights: whether global tokens have the weights of the others.
        share_kv: whether linformer has one projection for keys and values.
        exact: 0 chunks, 1 exact window, -1 chunks that wrap around, see `ChunkGrid`.
        mode: vil: 0 all neighbours; -1 own chunk; 1 to 8: in training own chunk and one neighbour
            drawn at random for each call, in evaluation all. Any of the eight numbers means so.
        attention_backend: of attentions without a learned bias, see `vitdet.layers.attention`.
        sliding_chunk_backend: kernel of vil, see `sliding_chunk`.
    """

    embed_dim: int = 192
    depth: int = 1
    num_heads: int = 3
    patch_size: int = 2
    num_global_tokens: int = 1
    attention: str = "vil"
    attention_size: int = 7
    use_abs_pos: bool = True
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    norm_eps: float = 1e-6
    norm_embed: bool = True
    share_global_weights: bool = True
    share_kv: bool = True
    exact: int = 0
    mode: int = 0
    attention_backend: str = "auto"
    sliding_chunk_backend: str = "auto"

    def __post_init__(self) -> None:
        """Check the numbers."""
        least = dict.fromkeys(("embed_dim", "depth", "num_heads", "patch_size"), 1)
        for name, low in {**least, "attention_size": 1, "num_global_tokens": 0}.items():
            if getattr(self, name) < low:
                raise InputError(f"{name}: expected at least {low}, got {getattr(self, name)}.")
        check_word("attention", self.attention, ATTENTION_KINDS)
        sliding_chunk.check_pattern(self.exact, self.mode)
        check_backend(self.attention_backend)
        sliding_chunk.check_backend(self.sliding_chunk_backend)
        alone = self.attention == "only_global" and not self.num_global_tokens
        for wrong, text in (
            (
                self.embed_dim % self.num_heads,
                f"num_heads: expected a divisor of embed_dim {self.embed_dim}, got "
                f"{self.num_heads}. Change one of them.",
            ),
            (
                self.use_abs_pos and self.embed_dim % 2,
                "embed_dim: expected an even number with absolute positions, got "
                f"{self.embed_dim}. Change it, or set use_abs_pos=False.",
            ),
            (alone, "num_global_tokens: expected at least 1 for only_global, got 0. Set it to 1."),
        ):
            if wrong:
                raise InputError(text)

    @property
    def use_rel_pos(self) -> bool:
        """Whether the attention has relative positions."""
        return not self.use_abs_pos and self.attention in _WITH_REL_POS


def stages_of(arch: str | None, arguments: dict[str, Any]) -> tuple[Stage, ...]:
    """Return the stages of an ARCH string, or of lists.

    With an ARCH string each stage has what its own part says. In the published code s0 also makes
    every later stage full, whatever its part says.

    `arguments` are those of `Stage`, each a value or a list of one a stage, None for left out. With
    `arch` none that stands in it, and `attention` is the kind of the stages with s1.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    known = [field.name for field in fields(Stage)]
    for name in given:
        check_word("argument of MsViT", name, known)
    lists = {
        name: list(value)
        for name, value in given.items()
        if isinstance(value, Sequence) and not isinstance(value, str)
    }
    if arch is not None:
        both = sorted(given.keys() & {argument for argument, _ in _LETTERS.values()})
        both += [name for name in lists if name == "attention"]
        if both:
            raise InputError(
                "MsViT: expected arch, or lists of one value a stage, got both "
                f"({', '.join(both)}). Set arch to null, or leave out the others."
            )
        lists |= _read_arch(arch, given.get("attention", "vil"))
    counts = {name: len(value) for name, value in lists.items()}
    if len(set(counts.values())) != 1:
        got = ", ".join(f"{name} {count}" for name, count in counts.items()) or "no list"
        raise InputError(f"stages: expected lists of one length, one value a stage, got {got}.")
    if (count := next(iter(counts.values()))) not in (3, 4):
        raise InputError(f"stages: expected 3 or 4 stages, got {count}. Add or remove some.")
    each = [given | {name: values[i] for name, values in lists.items()} for i in range(count)]
    return tuple(Stage(**values) for values in each)


def _read_arch(arch: str, attention: str) -> dict[str, list[Any]]:
    """Return {argument: one value a stage} of an ARCH string."""
    stages: list[dict[str, Any]] = []
    for i, part in enumerate(arch.split("_")):
        found = re.findall(r"([a-z])(\d+)(?:,|$)", part)
        given = {letter: int(number) for letter, number in found}
        switches = all(given.get(letter, 1) in (0, 1) for letter in "sa")
        whole = ",".join(f"{letter}{number}" for letter, number in found) == part
        known = given.keys() <= {*_LETTERS, "l", "s"} and len(given) == len(found)
        if not (whole and known and switches and given.get("l", 1) == i + 1):
            raise InputError(
                f"ARCH, stage {i + 1}: expected l{i + 1}, each of s, {', '.join(_LETTERS)} at most "
                f"once, with a number (0 or 1 for s and a), got {part!r}. Write it like "
                '"l1,h3,d96,n1,s1,g1,p4,f7,a0_l2,...".'
            )
        numbers = {name: given.get(letter, value) for letter, (name, value) in _LETTERS.items()}
        kind = attention if given.get("s", 1) else "full"
        use_abs_pos = bool(numbers["use_abs_pos"])
        stages.append(numbers | {"use_abs_pos": use_abs_pos, "attention": kind})
    return {name: [stage[name] for stage in stages] for name in stages[0]}


# --- positions ---------------------------------------------------------------------------------
#
# A stage's tables are made for a square of S x S tokens. A smaller map has the part that it needs,
# which is right at the scale of training, and what the published code does with absolute positions.
# For a larger map, which that refuses, tables are stretched.


def fit_axis(table: torch.Tensor, size: int) -> torch.Tensor:
    """Fit positions along one axis, (1, S, C), to `size` places: (1, size, C)."""
    if size <= table.shape[1]:
        return table[:, :size]
    return F.interpolate(table.mT, size=size, mode="linear", align_corners=False).mT


def fit_offsets(table: torch.Tensor, size: Size) -> torch.Tensor:
    """Fit relative positions to a map of H x W tokens: (N, 2 * H - 1, 2 * W - 1).

    `table` is ((2 * S - 1) ** 2, N), row-major, offset query - key + S - 1 on each axis.
    """
    side = round(table.shape[0] ** 0.5)
    rows, columns = 2 * size[0] - 1, 2 * size[1] - 1
    square = table.T.unflatten(1, (side, side))
    # An axis at a time: one may be smaller and the other larger. The offsets in the middle stay.
    top, left = max(side - rows, 0) // 2, max(side - columns, 0) // 2
    return _resized(square[:, top : side - top, left : side - left], (rows, columns))


def fit_grid(table: torch.Tensor, size: Size) -> torch.Tensor:
    """Fit a table of one row a token, (S * S, F), to a map of H x W tokens: (H * W, F)."""
    side = round(table.shape[0] ** 0.5)
    grid = table.T.unflatten(1, (side, side))[:, : size[0], : size[1]]
    return _resized(grid, size).flatten(1).T


def _resized(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Stretch a grid (C, H, W) bilinearly, where it has another size."""
    if grid.shape[1:] == size:
        return grid
    return F.interpolate(grid[None], size=size, mode="bilinear", align_corners=False)[0]


def dense_bias(table: torch.Tensor) -> torch.Tensor:
    """Lay out relative positions (N, 2 * H - 1, 2 * W - 1) as (N, L, L), L = H * W."""
    height, width = (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
    # As key minus query, the entries of one query are a window that moves with the query.
    windows = table.flip(1, 2).unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)
    return windows.flatten(3, 4).flatten(1, 2)  # (N, H, W, H, W) before


# --- parts -------------------------------------------------------------------------------------


class StageEmbed(nn.Module):
    """Make the tokens of a stage from the map before it.

    `map_size` is the side in tokens of the square map that absolute positions are made for.
    """

    def __init__(self, stage: Stage, in_chans: int, map_size: int) -> None:
        super().__init__()
        dim, side, count = stage.embed_dim, stage.patch_size, stage.num_global_tokens
        self.drop_rate = stage.drop_rate
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=side, stride=side)
        self.norm_embed = nn.LayerNorm(dim, eps=stage.norm_eps) if stage.norm_embed else None
        self.cls_token = nn.Parameter(torch.zeros(1, count, dim)) if count else None
        self.x_pos_embed = self.y_pos_embed = self.cls_pos_embed = None
        if stage.use_abs_pos:
            self.x_pos_embed = nn.Parameter(torch.zeros(1, map_size, dim // 2))
            self.y_pos_embed = nn.Parameter(torch.zeros(1, map_size, dim // 2))
            self.cls_pos_embed = nn.Parameter(torch.zeros(1, count, dim)) if count else None

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, Size]:
        """Map (B, C, h, w) to tokens (B, G + H * W, C), H = h // patch_size, and (H, W)."""
        image = self.proj(image)
        B, _, H, W = image.shape
        x = image.flatten(2).mT
        if self.norm_embed is not None:
            x = self.norm_embed(x)
        if self.x_pos_embed is not None and self.y_pos_embed is not None:
            rows = fit_axis(self.x_pos_embed, H)[:, :, None]
            columns = fit_axis(self.y_pos_embed, W)[:, None]
            rows, columns = rows.expand(-1, -1, W, -1), columns.expand(-1, H, -1, -1)
            x = x + torch.cat([rows, columns], dim=-1).flatten(1, 2)
        if self.cls_token is not None:
            token = self.cls_token
            if self.cls_pos_embed is not None:
                token = token + self.cls_pos_embed
            x = torch.cat([token.expand(B, -1, -1).to(x.dtype), x], dim=1)
        return F.dropout(x, self.drop_rate, self.training), (H, W)


class AttentionBlock(nn.Module):
    """The first half of a block: x + attention of normalised tokens."""

    def __init__(self, stage: Stage, attn: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(stage.embed_dim, eps=stage.norm_eps)
        self.attn, self.drop_rate, self.drop_path = attn, stage.drop_rate, DropPath(drop_path)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens x (B, G + H * W, C) of a map of `size` (H, W) to the same shape."""
        y = self.attn(self.norm(x), size)
        return x + self.drop_path(F.dropout(y, self.drop_rate, self.training))


class MlpBlock(nn.Module):
    """The second half of a block: x + MLP of normalised tokens."""

    def __init__(self, stage: Stage, drop_path: float) -> None:
        super().__init__()
        dim = stage.embed_dim
        self.norm = nn.LayerNorm(dim, eps=stage.norm_eps)
        self.mlp = Mlp(dim, int(dim * stage.mlp_ratio))
        self.drop_rate, self.drop_path = stage.drop_rate, DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens x (B, L, C) to the same shape."""
        y = F.gelu(self.mlp.fc1(self.norm(x)))
        y = self.mlp.fc2(F.dropout(y, self.drop_rate, self.training))
        return x + self.drop_path(F.dropout(y, self.drop_rate, self.training))
