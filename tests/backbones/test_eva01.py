"""What the golden cases do not show of EVA-01: a ViT with its biases, scales and tables."""

from __future__ import annotations

import re

import pytest
import torch

from vitdet.backbones.vit import PlainViT, ViT
from vitdet.convert import convert
from vitdet.utils.checks import InputError

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
SMALL |= {"pretrain_img_size": 64, "window_size": 3, "mlp_ratio": 4.0, "use_rel_pos": True}


def randomised(**changes) -> PlainViT:
    torch.manual_seed(0)
    net = ViT(**{**SMALL, "qkv_bias": "qv", **changes})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


@pytest.mark.parametrize("gamma", [True, False])
def test_is_a_plain_vit_with_no_bias_of_k(gamma):
    """Through conversion: q_bias, zeros, v_bias for the joined bias, gamma_1 for ls1.gamma."""
    net = randomised(layer_scale=gamma, global_block_indexes=[2], residual_block_indexes=[3])
    plain = ViT(
        **SMALL, layer_scale=gamma, global_block_indexes=[2], residual_block_indexes=[3]
    ).eval()
    published = {
        re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): value
        for name, value in net.state_dict().items()
    }
    weights, report = convert(published, shapes(plain), source_format="eva01")
    assert not report.initialised
    assert not report.dropped
    joined = weights["blocks.1.attn.qkv.bias"]
    assert torch.equal(joined[:16], net.blocks[1].attn.q_bias)
    assert joined[16:32].count_nonzero() == 0
    assert torch.equal(joined[32:], net.blocks[1].attn.v_bias)
    plain.load_state_dict(weights)
    image = torch.randn(1, 3, 64, 80)
    torch.testing.assert_close(net(image)["last_feat"], plain(image)["last_feat"])


def test_forms_of_the_bias():
    names = {kind: set(randomised(qkv_bias=kind).state_dict()) for kind in ("qv", True, False)}
    parts = {f"blocks.{i}.attn.{x}_bias" for i in range(4) for x in "qv"}
    assert names["qv"] - names[False] == parts
    assert names[True] - names[False] == {f"blocks.{i}.attn.qkv.bias" for i in range(4)}
    assert not names[False] - names["qv"]


def test_choice_of_resize_matters_for_other_sizes_only():
    image = torch.randn(1, 3, 64, 64)
    results = {
        kind: randomised(rel_pos_resize=kind, global_block_indexes=[1, 3])
        for kind in ("interpolate", "beit", "crop")
    }
    same = [net(image)["last_feat"] for net in results.values()]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    with pytest.raises(InputError, match="expected at most 8 tokens along an axis, got 10"):
        results["crop"](torch.randn(1, 3, 64, 80))
    small = image[..., :48, :40]
    other = [net(small)["last_feat"] for net in results.values()]
    assert (other[0] - other[1]).abs().max() > 1e-2
    assert (other[0] - other[2]).abs().max() > 1e-2


def test_resized_beit_tables_do_not_learn():
    net = randomised(rel_pos_resize="beit", global_block_indexes=[3])
    net(torch.randn(1, 3, 64, 80))["last_feat"].square().sum().backward()
    attn = net.blocks[3].attn
    assert attn.rel_pos_w.grad is None  # 10 columns for a table of 8
    assert attn.rel_pos_h.grad.abs().sum() > 0
    assert net.blocks[0].attn.rel_pos_w.grad.abs().sum() > 0


def test_patch_embedding_can_be_frozen():
    net = randomised(freeze_patch_embed=True)
    frozen = {name for name, value in net.named_parameters() if not value.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"global_block_indexes": [4]}, r"global_block_indexes: .* from 0 to 3, got \[4\]"),
        ({"residual_block_indexes": [-1]}, r"residual_block_indexes: .* got \[-1\]"),
        ({"checkpoint_blocks": [9]}, r"checkpoint_blocks: .* got \[9\]"),
        ({"num_heads": 3}, "num_heads: expected a divisor of 16, got 3"),
        ({"qkv_bias": "full"}, "qkv_bias: expected one of True, False, qv, got 'full'"),
        ({"rel_pos_resize": "vitdet"}, "rel_pos_resize: expected one of interpolate, crop, beit"),
        (
            {"attention_backend": "flash"},
            "attention backend: expected one of auto, eager, blocks, sdpa",
        ),
    ],
)
def test_wrong_choices(changes, text):
    with pytest.raises(InputError, match=text):
        ViT(**{**SMALL, **changes})
