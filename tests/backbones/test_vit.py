"""What the golden cases do not show of the ViT: choices, errors, positions of rectangles."""

from __future__ import annotations

import pytest
import torch

from vitdet.backbones.vit import ViT
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
        ({"attention_backend": "flash"}, "attention backend: expected one of auto, eager, sdpa"),
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
