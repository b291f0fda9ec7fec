"""The network of a plain vision transformer: patches, finished blocks, a map.

Parameter names as facebookresearch/detectron2, backbone/vit.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone, check_indexes, init_linear
from vitdet.backbones.block import Block, split_prefix
from vitdet.layers.parts import PatchEmbed
from vitdet.layers.positions import PosEmbedResize, resize_pos_embed
from vitdet.layers.rope import RotaryTables, Size


class PlainViT(LayeredBackbone):
    """Images to tokens, blocks, tokens to a map; class and register tokens where there are any.

    Args:
        patch_embed: images to tokens (B, H, W, C).
        blocks: finished.
        pos_grid: (H, W) in tokens of the grid of `pos_embed`, None for no absolute positions.
        class_row: whether it has a first row for a class token.
        pos_embed_resize: see `vitdet.backbones.vit.ViT`.
        use_cls_token: whether a class token takes part in the blocks.
        num_register_tokens: how many register tokens do (Darcet et al., Sec. 2.2).
        norm_pre: a norm before the first block, as in CLIP, or None.
        norm: a norm after the last block, or None.
        checkpoint_blocks: see `vitdet.backbones.vit.ViT`.
        out_feature: see `vitdet.backbones.vit.ViT`.
        out_block_indexes: blocks whose maps are outputs too, called "block0" and so on.

    Raises:
        InputError: a block number that does not exist.
    """

    def __init__(
        self,
        patch_embed: PatchEmbed,
        blocks: Sequence[Block],
        *,
        pos_grid: Size | None,
        class_row: bool = False,
        pos_embed_resize: PosEmbedResize = "bicubic",
        use_cls_token: bool = False,
        num_register_tokens: int = 0,
        norm_pre: nn.Module | None = None,
        norm: nn.Module | None = None,
        checkpoint_blocks: Collection[int] = (),
        out_feature: str = "last_feat",
        out_block_indexes: Collection[int] = (),
    ) -> None:
        super().__init__()
        check_indexes("checkpoint_blocks", checkpoint_blocks, range(len(blocks)))
        check_indexes("out_block_indexes", out_block_indexes, range(len(blocks)))
        dim = patch_embed.proj.out_channels

        def embedding(rows: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, rows, dim)) if rows else None

        self.patch_size, self.out_feature = patch_embed.patch_size, out_feature
        self.class_row, self.pos_grid = class_row, pos_grid
        self.pos_embed_resize: PosEmbedResize = pos_embed_resize
        self.num_prefix_tokens = use_cls_token + num_register_tokens
        self.checkpoint_blocks = frozenset(checkpoint_blocks)
        self.out_blocks = frozenset(out_block_indexes)
        self.patch_embed = patch_embed
        self.pos_embed = embedding(pos_grid[0] * pos_grid[1] + class_row) if pos_grid else None
        self.cls_token = embedding(int(use_cls_token))
        self.reg_token = embedding(num_register_tokens)
        self.norm_pre = norm_pre or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()
        names = [out_feature, *(f"block{i}" for i in sorted(out_block_indexes))]
        self.set_outputs(dict.fromkeys(names, (dim, self.patch_size)))
        for each in (self.pos_embed, self.cls_token, self.reg_token):
            if each is not None:
                nn.init.trunc_normal_(each, std=0.02)
        init_linear(self)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def layer_id(self, name: str) -> int:
        """Return 0 for the embeddings, i + 1 for block i, num_layers + 1 for propagation blocks."""
        if name.startswith(("pos_embed", "patch_embed", "cls_token", "reg_token", "norm_pre")):
            return 0
        parts = name.split(".")
        inside = parts[0] == "blocks" and "residual" not in parts
        return int(parts[1]) + 1 if inside else self.num_layers + 1

    def units(self) -> list[Any]:
        """Return the blocks."""
        return list(self.blocks)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map images x (B, 3, h, w) to {out_feature: (B, C, H, W)}, H = ceil(h / patch_size)."""
        blocks: dict[int, torch.Tensor] = {}
        x, size = self.forward_tokens(x, blocks)
        maps = {self.out_feature: x, **{f"block{i}": tokens for i, tokens in blocks.items()}}
        if self.num_prefix_tokens:
            maps = {name: split_prefix(tokens, size)[1] for name, tokens in maps.items()}
        return {name: tokens.permute(0, 3, 1, 2) for name, tokens in maps.items()}

    def forward_tokens(
        self, images: torch.Tensor, blocks: dict[int, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, Size]:
        """Return the tokens after the last block (and norm) and the size (H, W) of their map.

        Args:
            images: (B, 3, h, w).
            blocks: is given the tokens after each of `out_block_indexes`.

        Returns:
            Tokens (B, H, W, C); with prefix tokens (B, P + H * W, C), the class token first, then
            the register tokens.
        """
        x = self.patch_embed(images)  # (B, H, W, C)
        places = (x.shape[1], x.shape[2])
        if self.pos_embed is not None:
            grid = self.pos_embed[:, 1:] if self.class_row else self.pos_embed
            x = x + resize_pos_embed(grid, places, self.pos_embed_resize, self.pos_grid)
        if self.num_prefix_tokens:
            prefix = self._prefix().expand(x.shape[0], -1, -1)
            x = torch.cat((prefix, x.flatten(1, 2)), dim=1)
        x = self.norm_pre(x)
        size = places if self.num_prefix_tokens else None
        tables: dict[tuple[object, int], RotaryTables] = {}  # cost less than one block's norm
        for i, block in enumerate(self.units()):
            rope, window = block.rope, block.window_size
            if rope is not None and (rope, window) not in tables:
                attends = (window, window) if window else places
                tables[rope, window] = rope(attends, places, x.device)
            turn = tables.get((rope, window))
            if i in self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, size, turn, use_reentrant=False)
            else:
                x = block(x, size, turn)
            if blocks is not None and i in self.out_blocks:
                blocks[i] = x
        return self.norm(x), places

    def _prefix(self) -> torch.Tensor:
        """Return class and register tokens (1, P, C)."""
        tokens = []
        if self.cls_token is not None:
            row = self.pos_embed[:, :1] if self.pos_embed is not None and self.class_row else 0.0
            tokens.append(self.cls_token + row)
        if self.reg_token is not None:
            tokens.append(self.reg_token)
        return torch.cat(tokens, dim=1)
