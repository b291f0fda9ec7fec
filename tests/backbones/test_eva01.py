"""What the golden cases do not show of EVA-01: biases, norms, tables, choices."""

from __future__ import annotations

import pytest
import torch

from vitdet.backbones.eva01 import EVA01ViT, Float32LayerNorm
from vitdet.backbones.vit import ViT
from vitdet.convert import convert
from vitdet.utils.checks import InputError

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
SMALL |= {"pretrain_img_size": 64, "window_size": 3, "mlp_ratio": 4.0, "use_rel_pos": True}


def randomised(**changes) -> EVA01ViT:
    torch.manual_seed(0)
    net = EVA01ViT(**{**SMALL, **changes})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


@pytest.mark.parametrize("gamma", [True, False])
def test_is_a_plain_vit_with_no_bias_of_k(gamma):
    """Through conversion: q_bias, zeros, v_bias for the joined bias, gamma_1 for ls1.gamma."""
    net = randomised(gamma=gamma, global_block_indexes=[2], residual_block_indexes=[3])
    plain = ViT(
        **SMALL, layer_scale=gamma, global_block_indexes=[2], residual_block_indexes=[3]
    ).eval()
    weights, report = convert(net.state_dict(), shapes(plain), source_format="eva01")
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
    names = {kind: set(randomised(qkv_bias=kind).state_dict()) for kind in ("qv", "full", "none")}
    parts = {f"blocks.{i}.attn.{x}_bias" for i in range(4) for x in "qv"}
    assert names["qv"] - names["none"] == parts
    assert names["full"] - names["none"] == {f"blocks.{i}.attn.qkv.bias" for i in range(4)}
    assert not names["none"] - names["qv"]


def test_norms_in_float32_do_not_round():
    torch.manual_seed(0)
    norm = Float32LayerNorm(8, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(5, 8) + 100).bfloat16()
    centred = x.double() - x.double().mean(-1, keepdim=True)
    low = norm.bfloat16()
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = expected * low.weight.double() + low.bias.double()
    got = low(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-3)
    net = randomised(norm_float32=True, norm_eps=1e-5)
    assert isinstance(net.blocks[0].norm1, Float32LayerNorm)
    image = torch.randn(1, 3, 64, 64)
    plain = randomised(norm_eps=1e-5)
    torch.testing.assert_close(net(image)["last_feat"], plain(image)["last_feat"])


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


def test_activation_checkpointing_changes_nothing():
    image = torch.randn(2, 3, 64, 64)
    gradients = []
    for blocks in ((), (0, 1, 2, 3), (1, 3)):
        net = randomised(checkpoint_blocks=blocks, drop_path_rate=0.3, gamma=True).train()
        torch.manual_seed(1)
        net(image)["last_feat"].square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for other in gradients[1:]:
        for expected, got in zip(gradients[0], other, strict=True):
            assert torch.equal(expected, got)


def test_layers_of_parameters():
    net = EVA01ViT(**SMALL, residual_block_indexes=[1], gamma=True)
    assert net.num_layers == 4
    assert net.layer_id("pos_embed") == net.layer_id("patch_embed.proj.bias") == 0
    assert net.layer_id("blocks.3.gamma_1") == net.layer_id("blocks.3.attn.v_bias") == 4
    assert net.layer_id("blocks.1.residual.conv1.weight") == 5


def test_initialisation_follows_the_published_rule():
    torch.manual_seed(0)
    net = EVA01ViT(img_size=64, patch_size=8, embed_dim=128, depth=1, num_heads=2, gamma=True)
    block = net.blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.q_bias.count_nonzero() == block.attn.v_bias.count_nonzero() == 0
    assert torch.equal(block.gamma_1, torch.ones(128))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"global_block_indexes": [4]}, r"global_block_indexes: .* from 0 to 3, got \[4\]"),
        ({"residual_block_indexes": [-1]}, r"residual_block_indexes: .* got \[-1\]"),
        ({"checkpoint_blocks": [9]}, r"checkpoint_blocks: .* got \[9\]"),
        ({"num_heads": 3}, "num_heads: expected a divisor of 16, got 3"),
        ({"qkv_bias": True}, "qkv_bias: expected one of qv, full, none, got True"),
        ({"rel_pos_resize": "vitdet"}, "rel_pos_resize: expected one of interpolate, crop, beit"),
        (
            {"attention_backend": "flash"},
            "attention backend: expected one of auto, eager, blocks, sdpa",
        ),
    ],
)
def test_wrong_choices(changes, text):
    with pytest.raises(InputError, match=text):
        EVA01ViT(**{**SMALL, **changes})
