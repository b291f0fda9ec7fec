"""The benchmark of activation checkpointing predicts what autograd keeps."""

from __future__ import annotations

import pytest
import torch

from benchmarks.checkpointing import block_sizes, counting, predicted_entries
from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT

SMALL = {"img_size": 128, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 1}
SMALL |= {"window_size": 6, "global_block_indexes": [3], "pretrain_img_size": 128}


@pytest.mark.parametrize("kind", [ViT, EVA02ViT])
@pytest.mark.parametrize("blocks", [(), (1, 3), (0, 1, 2, 3)])
def test_predicted_bytes_are_those_that_autograd_keeps(kind, blocks):
    net = kind(**SMALL, checkpoint_blocks=blocks, attention_backend="sdpa").train()
    images = torch.randn(2, 3, 128, 96)
    with counting(net) as kept:
        out = net(images)["last_feat"].square().mean()
    del out
    predicted, peak = predicted_entries(block_sizes(net, 2, (128, 96)), net.checkpoint_blocks)
    # beside the blocks: the images, the last map, statistics of norms and of softmax
    beside = images.numel() + 2 * 16 * 12 * 64 + 4 * 2 * 18 * 12 * (2 + 2 + 2)
    counted = sum(kept.values()) / 4
    assert predicted < counted < predicted + 1.3 * beside
    assert peak > predicted or blocks == ()


def test_recomputing_every_block_keeps_one_input_a_block():
    net = ViT(**SMALL, checkpoint_blocks=range(4))
    sizes = block_sizes(net, 1, (128, 128))
    kept, peak = predicted_entries(sizes, net.checkpoint_blocks)
    assert kept == 4 * 16 * 16 * 64
    whole, _ = predicted_entries(sizes, frozenset())
    assert peak < whole / 2
    assert [each.attended for each in sizes] == [18 * 18 * 64] * 3 + [16 * 16 * 64]
