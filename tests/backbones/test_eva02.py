"""What the golden cases do not show of EVA-02: rectangles, windows of global blocks, choices."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.convert import convert
from vitdet.utils.checks import InputError

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
SMALL |= {"pretrain_img_size": 64, "window_size": 4, "rope_pretrain_grid": 4}
CPU = torch.device("cpu")


def randomised(**changes) -> EVA02ViT:
    torch.manual_seed(0)
    net = EVA02ViT(**{**SMALL, **changes})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def attend_by_definition(attn, x: torch.Tensor, step: float) -> torch.Tensor:
    """Attention of one block over a map (H, W, C), by turning complex numbers, in float64.

    Token i of an axis is at i * step, tokens of the pretraining.
    """
    H, W, C = x.shape
    N, D = attn.num_heads, C // attn.num_heads
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    frequency = 10000 ** (-2 * torch.arange(D // 4).double() / (D // 2))
    angles = [place.flatten()[:, None] * step * frequency for place in (row, column)]
    turn = torch.polar(torch.ones(H * W, D // 2).double(), torch.cat(angles, dim=1))
    x = x.reshape(-1, C).double()

    def heads(layer, bias) -> torch.Tensor:
        return F.linear(x, layer.weight.double(), bias).unflatten(-1, (N, D)).transpose(0, 1)

    q = torch.view_as_complex(heads(attn.q_proj, attn.q_bias.double()).unflatten(-1, (-1, 2)))
    k = torch.view_as_complex(heads(attn.k_proj, None).unflatten(-1, (-1, 2)))
    v = heads(attn.v_proj, attn.v_bias.double())
    # the real part of q times the conjugate of k is the product of the vectors
    logits = ((q * turn) @ (k * turn).conj().transpose(-2, -1)).real / D**0.5
    out = (logits.softmax(-1) @ v).transpose(0, 1).reshape(H, W, C)
    return F.linear(out, attn.proj.weight.double(), attn.proj.bias.double())


def windows_by_definition(attn, x: torch.Tensor, side: int, step: float) -> torch.Tensor:
    """The same in windows of `side`, filled up with zeros on the right and below."""
    H, W, _ = x.shape
    out = torch.zeros(x.shape, dtype=torch.float64)
    for top in range(0, H, side):
        for left in range(0, W, side):
            part = x[top : top + side, left : left + side]
            h, w = part.shape[:2]
            padded = F.pad(part, (0, 0, 0, side - w, 0, side - h))
            attended = attend_by_definition(attn, padded, step)
            out[top : top + side, left : left + side] = attended[:h, :w]
    return out


@pytest.mark.parametrize("global_window_size", [20, 0])
def test_rectangle_of_320_by_800_pixels(global_window_size):
    """20 x 50 tokens, windows of 16: StreamPETR's ViT-L, and with truly global attention."""
    torch.manual_seed(0)
    sizes = {"img_size": 320, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    net = EVA02ViT(
        **sizes,
        window_size=16,
        global_window_size=global_window_size,
        global_block_indexes=[1],
        use_abs_pos=False,
    ).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seen = {}
    for i, block in enumerate(net.blocks):
        block.norm1.register_forward_hook(lambda _, __, out, i=i: seen.update({f"in{i}": out}))
        block.drop_path.register_forward_pre_hook(
            lambda _, arguments, i=i: seen.setdefault(f"out{i}", arguments[0])
        )
    out = net(torch.randn(1, 3, 320, 800))["last_feat"]
    assert out.shape == (1, 16, 20, 50)
    local, whole = net.blocks[0].attn, net.blocks[1].attn
    expected = windows_by_definition(local, seen["in0"][0], 16, step=16 / 16)
    torch.testing.assert_close(seen["out0"][0].double(), expected, rtol=0, atol=2e-4)
    if global_window_size:
        expected = windows_by_definition(whole, seen["in1"][0], 20, step=16 / 20)
    else:
        expected = attend_by_definition(whole, seen["in1"][0], step=16 / 20)
    torch.testing.assert_close(seen["out1"][0].double(), expected, rtol=0, atol=2e-4)


def tables_of(net, number, size):
    """The rotary tables of a block on a map of `size`."""
    block = net.blocks[number]
    window = block.window_size
    return block.rope((window, window) if window else size, size, CPU)


@pytest.mark.parametrize(("global_window_size", "size"), [(20, (20, 20)), (0, (20, 50))])
def test_tables_of_320_by_800_pixels_equal_the_formula(global_window_size, size):
    with torch.device("meta"):
        net = EVA02ViT(
            img_size=320,
            depth=2,
            window_size=16,
            global_window_size=global_window_size,
            global_block_indexes=[1],
        )
    frequencies = 10000 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)  # heads of 64
    for tables, (rows, columns), step in (
        (tables_of(net, 1, (20, 50)), size, 16 / 20),
        (tables_of(net, 0, (20, 50)), (16, 16), 1.0),
    ):
        angles = torch.empty(rows, columns, 64, dtype=torch.float64)
        angles[..., 0:32:2] = angles[..., 1:32:2] = (
            step * torch.arange(rows)[:, None, None] * frequencies
        )
        angles[..., 32::2] = angles[..., 33::2] = (
            step * torch.arange(columns)[:, None] * frequencies
        )
        angles = angles.flatten(0, 1)
        torch.testing.assert_close(tables.cos.double(), angles.cos(), rtol=0, atol=5e-6)
        torch.testing.assert_close(tables.sin.double(), angles.sin(), rtol=0, atol=5e-6)


def test_positions_of_a_rectangle_continue_those_of_the_square():
    net = randomised(global_block_indexes=[3])
    square = tables_of(net, 3, (8, 8))  # the training image
    wide = tables_of(net, 3, (6, 12))
    for mine, published in ((wide.cos, square.cos), (wide.sin, square.sin)):
        both = mine.reshape(6, 12, 8)[:, :8], published.reshape(8, 8, 8)[:6]
        assert torch.equal(*both)
    windows = randomised(global_window_size=8, global_block_indexes=[3])
    assert torch.equal(tables_of(windows, 3, (6, 12)).cos, square.cos)
    # a window of the local blocks spans the pretraining's grid, whatever the image
    other = randomised(img_size=32)
    assert torch.equal(tables_of(net, 0, (8, 8)).cos, tables_of(other, 0, (4, 4)).cos)


def test_positions_are_scaled_only_where_asked():
    plain = randomised(rope_interpolate=False, global_block_indexes=[3])
    scaled = randomised(global_block_indexes=[3])
    windows = [tables_of(net, 0, (8, 8)).cos for net in (plain, scaled)]
    assert torch.equal(*windows)  # 4 of 4 tokens
    angle = tables_of(plain, 3, (8, 8)).cos.acos()[8]  # second row
    half = tables_of(scaled, 3, (8, 8)).cos.acos()[8]  # 8 tokens for 4
    torch.testing.assert_close(angle, 2 * half)


@pytest.mark.parametrize(("size", "reference"), [((80, 112), 16), ((96, 96), None)])
def test_stretched_positions_are_those_of_timm(size, reference):
    torch.manual_seed(0)
    shared = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    eva = timm.models.eva.Eva(
        **shared,
        mlp_ratio=4 * 2 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        qkv_fused=False,
        use_rot_pos_emb=True,
        ref_feat_shape=None if reference is None else (reference, reference),
        class_token=False,
        dynamic_img_size=True,
        num_classes=0,
        global_pool="",
    ).eval()
    for parameter in eva.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    net = EVA02ViT(
        **shared,
        pretrain_img_size=64,
        pretrain_use_cls_token=False,
        pos_embed_resize="bicubic_antialias",
        rope_resize="stretch",
        rope_pretrain_grid=reference or 1,
        rope_interpolate=reference is not None,
    ).eval()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    net.load_state_dict(convert(eva.state_dict(), shapes)[0])
    images = torch.randn(2, 3, *size)
    (expected,) = eva.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)
    torch.testing.assert_close(net(images)["last_feat"], expected, rtol=0, atol=2e-5)


def test_state_dict_holds_weights_only():
    net = randomised(global_block_indexes=[3])
    assert not list(net.buffers())
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    assert not any("rope" in name for name in net.state_dict())


def test_activation_checkpointing_changes_nothing_but_what_is_computed_twice():
    image = torch.randn(2, 3, 64, 96)
    gradients, calls = [], []
    for blocks in ((), (0, 1, 2, 3), (1, 3)):
        net = randomised(checkpoint_blocks=blocks, drop_path_rate=0.3, global_block_indexes=[1])
        net.train()
        count = [0] * 4
        for i, block in enumerate(net.blocks):
            block.norm1.register_forward_hook(
                lambda *_, i=i, count=count: count.__setitem__(i, count[i] + 1)
            )
        torch.manual_seed(1)
        net(image)["last_feat"].square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
        calls.append(count)
    assert calls == [[1, 1, 1, 1], [2, 2, 2, 2], [1, 2, 1, 2]]
    for other in gradients[1:]:
        for expected, got in zip(gradients[0], other, strict=True):
            assert torch.equal(expected, got)


def test_bfloat16_has_exact_positions():
    net = randomised(global_block_indexes=[1])
    image = torch.randn(1, 3, 64, 96)
    exact = net(image)["last_feat"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(image)["last_feat"]
    torch.testing.assert_close(mixed.float(), exact, rtol=0, atol=0.15)
    low = net.bfloat16()(image.bfloat16())["last_feat"]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0, atol=0.15)
    assert tables_of(net, 1, (8, 8)).cos.dtype == torch.float32


def test_compiles_as_one_graph():
    net = randomised(global_block_indexes=[1], depth=2)
    image = torch.randn(1, 3, 64, 96)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image)["last_feat"], net(image)["last_feat"])


def test_knows_shapes_without_numbers():
    with torch.device("meta"):
        net = EVA02ViT(**SMALL)
    assert net(torch.zeros(1, 3, 48, 80, device="meta"))["last_feat"].shape == (1, 16, 6, 10)


def test_inner_norm_stands_before_the_output_projection():
    net = randomised(inner_attn_norm=True, depth=1)
    assert net.blocks[0].attn.inner_attn_ln.eps == 1e-5
    torch.nn.init.zeros_(net.blocks[0].attn.inner_attn_ln.weight)
    torch.nn.init.ones_(net.blocks[0].attn.inner_attn_ln.bias)
    seen = []
    net.blocks[0].attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(torch.randn(1, 3, 64, 64))
    assert torch.equal(seen[0], torch.ones_like(seen[0]))
    assert "blocks.0.attn.inner_attn_ln.weight" not in randomised(depth=1).state_dict()


def test_frozen_backbone_passes_gradients_on_and_learns_nothing():
    net = randomised(frozen=True)
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    net(image)["last_feat"].sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_biases_of_q_and_v_are_optional():
    names = set(randomised(qkv_bias=False).state_dict())
    missing = set(randomised().state_dict()) - names
    assert missing == {f"blocks.{i}.attn.{x}_bias" for i in range(4) for x in "qv"}


def test_layers_of_parameters():
    net = EVA02ViT(**SMALL, residual_block_indexes=[1])
    assert net.num_layers == 4
    assert net.layer_id("pos_embed") == net.layer_id("patch_embed.proj.weight") == 0
    assert net.layer_id("blocks.3.attn.q_bias") == 4
    assert net.layer_id("blocks.1.residual.conv1.weight") == 5


def test_initialisation_follows_the_published_rule():
    torch.manual_seed(0)
    net = EVA02ViT(img_size=64, patch_size=8, embed_dim=128, depth=1, num_heads=2)
    attn, mlp = net.blocks[0].attn, net.blocks[0].mlp
    for weight in (attn.q_proj.weight, attn.proj.weight, mlp.w1.weight, mlp.w3.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    for bias in (attn.q_bias, attn.v_bias, mlp.w1.bias, mlp.w3.bias):
        assert bias.count_nonzero() == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"global_block_indexes": [4]}, r"global_block_indexes: .* from 0 to 3, got \[4\]"),
        ({"residual_block_indexes": [-1]}, r"residual_block_indexes: .* got \[-1\]"),
        ({"checkpoint_blocks": [9]}, r"checkpoint_blocks: .* got \[9\]"),
        ({"num_heads": 3}, "num_heads with rotary positions: .* out of 16, got 3 heads"),
        ({"num_heads": 8}, "a head of a multiple of 4 channels, out of 16, got 8 heads"),
        ({"rope_resize": "crop"}, "rope_resize: expected one of extend, stretch, got 'crop'"),
        (
            {"attention_backend": "flash"},
            "attention backend: expected one of auto, eager, blocks, sdpa",
        ),
    ],
)
def test_wrong_choices(changes, text):
    with pytest.raises(InputError, match=text):
        EVA02ViT(**{**SMALL, **changes})
