"""What the golden cases do not show of the ViT: choices, errors, positions of rectangles."""

from __future__ import annotations

import pytest
import torch

from vitdet.backbones.vit import ViT
from vitdet.layers.rope import RotaryTables, centred_tables, rotate
from vitdet.utils.checks import InputError

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
SMALL |= {"use_rel_pos": True, "pretrain_img_size": 64, "window_size": 3}


def randomised(**changes) -> ViT:
    torch.manual_seed(0)
    net = ViT(**{**SMALL, **changes})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"global_block_indexes": [4]}, r"global_block_indexes: .* from 0 to 3, got \[4\]"),
        ({"residual_block_indexes": [-1]}, r"residual_block_indexes: .* got \[-1\]"),
        ({"checkpoint_blocks": [9]}, r"checkpoint_blocks: .* got \[9\]"),
        ({"num_heads": 3}, "num_heads: expected a divisor of 16, got 3"),
        ({"ffn_layer": "swigl"}, r"ffn_layer: expected one of mlp, swiglu, .* 'swiglu'\?"),
        ({"act_layer": "relu"}, "act_layer: expected one of gelu, quick_gelu, got 'relu'"),
        ({"rope": "eva"}, r"rope: expected one of none, dinov3, eva02, got 'eva'"),
        ({"rope": "eva02", "embed_dim": 12}, "a head of a multiple of 4 channels, out of 12"),
        ({"use_cls_token": True}, r"use_rel_pos: expected False with class or register tokens"),
        (
            {"use_rel_pos": False, "num_register_tokens": 1, "window_fit": "interpolate"},
            r"window_fit: expected 'pad' with class or register tokens, .* got 'interpolate'",
        ),
        (
            {"use_rel_pos": False, "use_cls_token": True, "shifted_block_indexes": [0]},
            r"shifted_block_indexes: expected \[\] with class or register tokens, .* got \[0\]",
        ),
        (
            {"attention_backend": "flash"},
            "attention backend: expected one of auto, eager, blocks, sdpa",
        ),
    ],
)
def test_wrong_choices(changes, text):
    with pytest.raises(InputError, match=text):
        ViT(**{**SMALL, **changes})


def test_blocks_use_windows_unless_listed():
    net = ViT(**SMALL, global_block_indexes=[1, 3])
    assert [block.window_size for block in net.blocks] == [3, 0, 3, 0]
    rows = [block.attn.rel_pos_h.shape[0] for block in net.blocks]
    assert rows == [5, 15, 5, 15]  # 2 * 3 - 1 and 2 * 8 - 1


def test_information_crosses_windows_only_where_a_block_is_global_or_convolves():
    image = torch.randn(1, 3, 64, 64)
    changed = image.clone()
    changed[..., :8, :8] += 1

    def reach(**changes) -> torch.Tensor:
        net = randomised(**changes)
        difference = (net(image)["last_feat"] - net(changed)["last_feat"]).abs().sum(1)
        return difference[0] > 0

    windows = reach()
    assert windows[:3, :3].all()
    assert windows.sum() == 9  # the window of the changed token and no other
    assert reach(global_block_indexes=[3]).all()
    beyond = reach(residual_block_indexes=[0])
    assert beyond.sum() == 36  # one token further, then the four windows that it touches


def test_activation_checkpointing_changes_nothing():
    image = torch.randn(2, 3, 64, 64)
    gradients = []
    for blocks in ((), (0, 1, 2, 3), (1, 3)):
        net = randomised(checkpoint_blocks=blocks, drop_path_rate=0.3).train()
        torch.manual_seed(1)
        net(image)["last_feat"].square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for other in gradients[1:]:
        for expected, got in zip(gradients[0], other, strict=True):
            assert torch.equal(expected, got)


def test_cropped_positions_are_those_of_the_corner_of_the_full_map():
    """A rectangle at the training scale: its tokens see what they saw within the square."""
    crop = {"rel_pos_resize": "crop", "pos_embed_resize": "crop", "window_size": 4}
    net = randomised(**crop)
    image = torch.randn(1, 3, 64, 64)
    whole = net(image)["last_feat"]
    part = net(image[..., :32, :64])["last_feat"]  # whole windows, no global block
    torch.testing.assert_close(part, whole[:, :, :4, :8], rtol=0, atol=1e-5)
    stretched = randomised(window_size=4)(image[..., :32, :64])["last_feat"]
    assert (stretched - whole[:, :, :4, :8]).abs().max() > 1e-2


def test_layer_scale_multiplies_the_branches():
    net = randomised(layer_scale=True)
    plain = randomised()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if ".ls" not in k})
    image = torch.randn(1, 3, 64, 64)
    for block in net.blocks:
        torch.nn.init.ones_(block.ls1.gamma)
        torch.nn.init.ones_(block.ls2.gamma)
    torch.testing.assert_close(net(image)["last_feat"], plain(image)["last_feat"])
    for block in net.blocks:
        torch.nn.init.zeros_(block.ls1.gamma)
        torch.nn.init.zeros_(block.ls2.gamma)
    tokens = net.patch_embed(image) + net.pos_embed[:, 1:].reshape(1, 8, 8, 16)
    assert torch.equal(net(image)["last_feat"], tokens.permute(0, 3, 1, 2))


def test_initialisation_follows_the_published_rule():
    torch.manual_seed(0)
    net = ViT(img_size=64, patch_size=8, embed_dim=128, depth=1, num_heads=2, use_rel_pos=True)
    attn = net.blocks[0].attn
    assert attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert attn.qkv.bias.count_nonzero() == 0
    assert attn.rel_pos_h.count_nonzero() == 0


def test_layers_of_parameters():
    net = ViT(**SMALL, residual_block_indexes=[1])
    assert net.num_layers == 4
    assert net.layer_id("pos_embed") == net.layer_id("patch_embed.proj.weight") == 0
    assert net.layer_id("blocks.3.attn.qkv.weight") == 4
    assert net.layer_id("blocks.1.residual.conv1.weight") == 5


# --- what ViTDet leaves out: class and register tokens, rotary positions, other layers ------------

TOKENS = {"use_rel_pos": False, "use_cls_token": True, "num_register_tokens": 2}


@pytest.mark.parametrize("rope", ["none", "dinov3", "eva02"])
@pytest.mark.parametrize("residual", [(), (1,)])
def test_one_window_over_the_whole_map_is_global_attention(rope, residual):
    options = TOKENS | {"rope": rope, "residual_block_indexes": residual, "window_size": 8}
    windows, whole = randomised(**options), randomised(**options, global_block_indexes=range(4))
    image = torch.randn(2, 3, 64, 64)
    got, size = windows.forward_tokens(image)
    expected, _ = whole.forward_tokens(image)
    assert got.shape == (2, 3 + 64, 16)
    assert size == (8, 8)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        windows(image)["last_feat"].flatten(2).mT, expected[:, 3:], rtol=0, atol=1e-5
    )


def test_prefix_tokens_carry_information_between_windows():
    image = torch.randn(1, 3, 64, 64)
    changed = image.clone()
    changed[..., :8, :8] += 1

    def reach(**changes) -> int:
        net = randomised(**TOKENS | {"window_size": 4} | changes)
        difference = (net(image)["last_feat"] - net(changed)["last_feat"]).abs().sum(1)
        return int((difference > 1e-6).sum())

    assert reach() == 64
    assert reach(use_cls_token=False, num_register_tokens=0) == 16
    assert reach(depth=1) == 16  # the first block changes the prefix tokens, the second hands it on


def test_dinov3_windows_keep_the_offsets_of_the_map():
    """Attention in a window is attention of the map to those places: rope knows offsets alone."""
    plain = {"use_rel_pos": False, "rope": "dinov3", "depth": 1, "use_abs_pos": False}
    net = randomised(**plain, window_size=4)
    whole = randomised(**plain, window_size=0)
    image = torch.randn(1, 3, 64, 64)
    x = net.patch_embed(image)
    block, attn = net.blocks[0], whole.blocks[0].attn
    qkv = attn.qkv(block.norm1(x)).view(1, 8, 8, 3, 2, 8)[:, :4, 4:].reshape(1, 16, 3, 2, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    tables = centred_tables((8, 8), 8, (8, 8))
    corner = torch.arange(64).view(8, 8)[:4, 4:].flatten()
    part = RotaryTables(tables.cos[corner], tables.sin[corner], halves=True)
    y = (rotate(q, part) @ rotate(k, part).mT * 8**-0.5).softmax(-1) @ v
    expected = attn.proj(y.transpose(1, 2).reshape(1, 4, 4, 16))
    rope = block.rope((4, 4), (8, 8), image.device)
    got = block.attn(block.norm1(x)[:, :4, 4:], None, rope)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_class_token_gets_its_row_of_the_positions():
    net = randomised(**TOKENS, depth=0)
    tokens, _ = net.forward_tokens(torch.randn(1, 3, 64, 64))
    assert torch.equal(tokens[:, :1], net.cls_token + net.pos_embed[:, :1])
    assert torch.equal(tokens[:, 1:3], net.reg_token)
    net = randomised(**TOKENS, depth=0, pretrain_use_cls_token=False)
    tokens, _ = net.forward_tokens(torch.randn(1, 3, 64, 64))
    assert torch.equal(tokens[:, :1], net.cls_token)


def test_norms_before_and_after_the_blocks():
    net = randomised(use_rel_pos=False, pre_norm=True, final_norm=True, depth=0, norm_eps=1e-3)
    image = torch.randn(1, 3, 64, 64)
    x = net.patch_embed(image) + net.pos_embed[:, 1:].reshape(1, 8, 8, 16)
    for norm in (net.norm_pre, net.norm):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        x = x * norm.weight + norm.bias
    torch.testing.assert_close(net(image)["last_feat"], x.permute(0, 3, 1, 2))


def test_quick_gelu():
    mlp = randomised(act_layer="quick_gelu").blocks[0].mlp
    x = torch.randn(5, 16)
    hidden = mlp.fc1(x)
    expected = mlp.fc2(hidden / (1 + (-1.702 * hidden).exp()))
    torch.testing.assert_close(mlp(x), expected)


def test_swiglu_with_and_without_its_norm():
    x = torch.randn(5, 16)
    for kind in ("swiglu", "swiglu_norm"):
        mlp = randomised(ffn_layer=kind, mlp_ratio=2.0).blocks[0].mlp
        hidden = torch.sigmoid(mlp.w1(x)) * mlp.w1(x) * mlp.w2(x)
        hidden = mlp.ffn_ln(hidden) if kind == "swiglu_norm" else hidden
        torch.testing.assert_close(mlp(x), mlp.w3(hidden))
        assert mlp.w1.weight.shape == (32, 16)


def test_checkpointing_with_tokens_and_rope_changes_nothing():
    image = torch.randn(2, 3, 64, 64)
    gradients = []
    for blocks in ((), (0, 1, 2, 3)):
        net = randomised(**TOKENS, rope="dinov3", checkpoint_blocks=blocks).train()
        net(image)["last_feat"].square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.equal(expected, gradients[1][name]), name
    assert gradients[0]["cls_token"].abs().sum() > 0


def test_layers_of_the_further_parameters():
    net = ViT(**SMALL | TOKENS, pre_norm=True, final_norm=True)
    for name in ("cls_token", "reg_token", "norm_pre.weight"):
        assert net.layer_id(name) == 0
    assert net.layer_id("norm.weight") == 5
