"""What the golden cases do not show of ViTAE-B and ViTAE-S."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import PyramidReduction, ReductionCell, TokenPerformer, ViTAES
from vitdet.utils.checks import InputError

B: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
B |= {"window_size": 3, "global_block_indexes": [2]}
S: dict[str, Any] = {"img_size": 64, "embed_dims": [4, 4, 8], "token_dims": [8, 8, 16]}
S |= {"depths": [0, 1, 3], "num_heads": [1, 1, 2], "groups": [1, 2, 4], "window_size": 3}
S |= {"global_block_indexes": [3]}


def randomised(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return net.eval()


def vitae(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomised(ViTAE(**B | changes))


def vitae_s(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomised(ViTAES(**S | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"global_block_indexes": [3]}, r"global_block_indexes: .* from 0 to 2, got \[3\]"),
        ({"checkpoint_blocks": [-1]}, r"checkpoint_blocks: .* got \[-1\]"),
        ({"num_heads": 3}, "num_heads: expected a divisor of 16, got 3"),
        ({"embed_dim": 18}, "embed_dim: expected a multiple of 4, got 18"),
        (
            {"attention_backend": "flash"},
            "attention backend: expected one of auto, eager, blocks, sdpa",
        ),
    ],
)
def test_wrong_choices_of_vitae_b(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        ViTAE(**B | changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_heads": [1, 2]}, "num_heads: expected 3 entries, got 2"),
        ({"global_block_indexes": [4]}, r"global_block_indexes: .* from 0 to 3, got \[4\]"),
        ({"kernel_sizes": [2, 3, 3]}, "kernel_sizes: expected 3 or more, got 2"),
        ({"downsample_ratios": [4, 3, 2]}, "downsample_ratios: expected 2, 4 or 8, got 3"),
        ({"token_dims": [8, 8, 24]}, "token_dims: expected 16, got 24. The dilated convolutions"),
        (
            {"reduction_kinds": ["performer", "transformer", "performer_less"]},
            "reduction_kinds: expected one of performer, performer_less, got 'transformer'",
        ),
    ],
)
def test_wrong_choices_of_vitae_s(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        ViTAES(**S | changes)


@pytest.mark.parametrize("make", [vitae, vitae_s], ids=["b", "s"])
@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 88), (67, 50), (32, 32)], ids=str)
def test_images_of_any_shape(make: Any, size: tuple[int, int]) -> None:
    """The published code stops at anything but its square (or, ViT-S, at a global cell)."""
    net = make()
    image = torch.randn(2, 3, *size, requires_grad=True)
    stride = 8 if make is vitae else 16
    out = net(image)["last_feat"]
    assert out.shape == (2, 16, -(-size[0] // stride), -(-size[1] // stride))
    out.square().sum().backward()
    assert image.grad is not None
    assert (image.grad.abs().sum((0, 1)) > 0).all()  # every pixel counts
    # The second image does not reach the first.
    alone = net(image[:1])["last_feat"]
    torch.testing.assert_close(alone, out[:1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("make", [vitae, vitae_s], ids=["b", "s"])
def test_wide_and_tall_images_are_treated_alike(make: Any) -> None:
    """Turned images with turned weights give turned maps."""
    net, turned = make(), make()
    with torch.no_grad():
        for name, value in turned.named_parameters():
            if name.endswith(".rel_pos_h"):
                other = turned.get_parameter(name[:-1] + "w")
                swapped = other.clone()
                other.copy_(value)
                value.copy_(swapped)
            elif value.ndim == 4:
                value.copy_(value.transpose(2, 3).clone())
            elif name == "pos_embed":
                grid = value.unflatten(1, (8, 8)).transpose(1, 2)
                value.copy_(grid.flatten(1, 2).clone())
    image = torch.randn(1, 3, 48, 80)
    out = net(image)["last_feat"]
    torch.testing.assert_close(
        turned(image.transpose(2, 3))["last_feat"], out.transpose(2, 3), rtol=0, atol=3e-5
    )


def test_convolutions_carry_information_across_windows() -> None:
    image = torch.randn(1, 3, 64, 64)
    changed = image.clone()
    changed[..., :8, :8] += 1

    def reach(net: nn.Module) -> torch.Tensor:
        difference = (net(image)["last_feat"] - net(changed)["last_feat"]).abs().sum(1)
        return difference[0] > 0

    net = vitae(depth=1, global_block_indexes=[])
    seen = reach(net)
    assert seen[:3, :3].all()
    assert seen.sum() == 9  # two 3x3 convolutions reach as far as the window does
    with torch.no_grad():
        net.blocks[0].attn.proj.weight.zero_()
        image[..., :8, :8], changed = image[..., :8, :8], image.clone()
    changed[..., :8, 16:24] += 1  # the last token of the window
    assert reach(net)[0, 3:5].all()
    assert reach(vitae()).all()  # the last cell is global


def test_batch_norm_uses_the_batch_in_training_and_its_memory_in_evaluation() -> None:
    net = vitae()
    norm = net.blocks[0].PCM[1]
    image = torch.randn(2, 3, 64, 64)
    before = net(image)["last_feat"]
    assert torch.equal(net(image)["last_feat"], before)
    assert norm.num_batches_tracked == 0
    net.train()
    training = net(image)["last_feat"]
    assert not torch.allclose(training, before, atol=1e-3)
    assert norm.num_batches_tracked == 1
    assert not torch.allclose(net.eval()(image)["last_feat"], before, atol=1e-4)


@pytest.mark.parametrize("make", [vitae, vitae_s], ids=["b", "s"])
def test_activation_checkpointing_changes_no_gradient(make: Any) -> None:
    image = torch.randn(2, 3, 64, 64)
    gradients = []
    for blocks in ((), (0, 1, 2), (1,)):
        net = make(checkpoint_blocks=blocks, drop_path_rate=0.3).train()
        torch.manual_seed(1)
        net(image)["last_feat"].square().sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.requires_grad])
    for other in gradients[1:]:
        for expected, got in zip(gradients[0], other, strict=True):
            assert torch.equal(expected, got)


def test_branches_are_left_out_apart() -> None:
    cell = vitae(drop_path_rate=0.9).blocks[2].train()  # rate 0.9
    cell.PCM.eval()
    x = torch.randn(64, 4, 4, 16)
    torch.manual_seed(0)
    with torch.no_grad():
        cell.mlp.fc2.weight.zero_()
        cell.mlp.fc2.bias.zero_()
        attended = cell.attn(cell.norm1(x))
        convolved = cell.PCM(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        left = (cell(x) - x).div_(10)  # what stays is divided by 1 - 0.9
    for one, other in ((attended, convolved), (convolved, attended)):
        alone = [torch.allclose(each, got, atol=1e-4) for each, got in zip(one, left, strict=True)]
        both = one + other
        together = [torch.allclose(a, b, atol=1e-4) for a, b in zip(both, left, strict=True)]
        assert 0 < sum(alone) < 20
        assert sum(together) < 8


def test_layers_of_parameters() -> None:
    b, s = ViTAE(**B), ViTAES(**S)
    names = ("pos_embed", "patch_embed.proj.bias", "blocks.2.PCM.0.weight", "norm.bias")
    assert [b.layer_id(name) for name in names] == [0, 0, 3, 4]
    assert b.num_layers == 3
    # three reduction cells and 0 + 1 + 3 normal ones, counted through
    names = ("layers.0.RC.attn.w", "layers.1.RC.PCM.0.bias", "layers.1.NC.0.norm1.bias")
    assert [s.layer_id(name) for name in names] == [0, 1, 2]
    names = ("layers.2.RC.PRM.convs.0.0.bias", "layers.2.NC.0.mlp.fc1.bias")
    assert [s.layer_id(name) for name in names] == [3, 4]
    assert [s.layer_id(name) for name in ("layers.2.NC.2.PCM.6.bias", "norm.weight")] == [6, 8]
    assert s.num_layers == 7
    assert (s.output_shape()["last_feat"].stride, s.output_shape()["last_feat"].channels) == (
        16,
        16,
    )


def test_both_build_without_memory() -> None:
    with torch.device("meta"):
        b = ViTAE(global_block_indexes=[2, 5, 8, 11])
        s = ViTAES(global_block_indexes=[2, 5, 8, 13])
    # with the pyramid's deconvolutions, which are not here, the counts of the published backbones
    assert sum(p.numel() for p in b.parameters()) == 91_655_936
    assert sum(p.numel() for p in s.parameters()) == 23_747_488
    assert {p.device.type for p in (*b.parameters(), *s.buffers())} == {"meta"}
    frozen = [name for name, p in s.named_parameters() if not p.requires_grad]
    assert frozen == ["layers.0.RC.attn.w", "layers.1.RC.attn.w"]


# --- reduction cells -----------------------------------------------------------------------------


def test_performer_is_attention_with_a_positive_kernel() -> None:
    """Against the definition with the whole matrix: phi(q) phi(k)^T over its row sums."""
    torch.manual_seed(0)
    performer = TokenPerformer(12, 8).eval()
    x, shortcut = torch.randn(2, 3, 5, 12), torch.randn(2, 3, 5, 8)
    k, q, v = performer.kqv(performer.norm1(x)).flatten(1, 2).chunk(3, dim=-1)
    w = performer.w

    def phi(y: torch.Tensor) -> torch.Tensor:
        return (y @ w.T - y.square().sum(-1, keepdim=True) / 2).exp() / 4**0.5

    kernel = phi(q) @ phi(k).transpose(1, 2)  # (B, L, L)
    attended = kernel / kernel.sum(-1, keepdim=True) @ v
    y = (v + performer.proj(attended)).view(2, 3, 5, 8) + shortcut
    expected = y + performer.mlp(performer.norm2(y))
    torch.testing.assert_close(performer(x, shortcut), expected, rtol=0, atol=1e-5)
    assert (w @ w.T).div(4).allclose(torch.eye(4), atol=1e-5)  # orthogonal features


def test_performer_drops_out_in_training_only() -> None:
    torch.manual_seed(0)
    performer = TokenPerformer(12, 8)
    x, shortcut = torch.randn(1, 3, 5, 12), torch.zeros(1, 3, 5, 8)
    assert not torch.equal(performer(x, shortcut), performer(x, shortcut))
    performer.eval()
    assert torch.equal(performer(x, shortcut), performer(x, shortcut))


def test_performer_computes_its_features_in_float32() -> None:
    torch.manual_seed(0)
    performer = TokenPerformer(12, 8).eval()
    x, shortcut = 3 * torch.randn(1, 4, 4, 12), torch.randn(1, 4, 4, 8)
    expected = performer(x, shortcut)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = performer(x, shortcut)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.1)


def test_dilated_convolutions_round_sizes_up() -> None:
    prm = PyramidReduction(3, 2, kernel_size=7, stride=4, dilations=(1, 2, 3, 4))
    for height in range(32, 41):
        assert prm(torch.zeros(1, 3, height, 64)).shape == (1, -(-height // 4), 16, 8)
    # A side that the stride does not divide has one more zero on both ends, as published.
    image = torch.randn(1, 3, 33, 64)
    conv = prm.convs[1][0]
    shifted = F.conv2d(image, conv.weight, conv.bias, 4, (6, 5), 2)
    assert torch.equal(prm(image)[..., 2:4], F.gelu(shifted).permute(0, 2, 3, 1))


@pytest.mark.parametrize(("ratio", "strides"), [(2, [2, 1, 1]), (4, [2, 2, 1]), (8, [2, 2, 2])])
def test_the_branch_beside_has_the_stride_of_the_cell(ratio: int, strides: list[int]) -> None:
    cell = ReductionCell(3, 4, 8, ratio, 7, (1, 2)).eval()
    assert [layer.stride[0] for layer in cell.PCM if isinstance(layer, nn.Conv2d)] == strides
    assert cell(torch.zeros(1, 3, 32, 64)).shape == (1, 32 // ratio, 64 // ratio, 8)
