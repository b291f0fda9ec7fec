"""The Vision Longformer: what was broken in the published one, its stages and attention kinds."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.msvit import MsViT
from vitdet.backbones.msvit import attention as kinds
from vitdet.backbones.msvit.attention import (
    FastAttention,
    FullAttention,
    InstanceNorm,
    VilAttention,
)
from vitdet.backbones.msvit.stage import (
    ATTENTION_KINDS,
    Stage,
    dense_bias,
    fit_axis,
    fit_grid,
    fit_offsets,
    stages_of,
)
from vitdet.utils.checks import InputError

TOY = dict(
    embed_dim=[8, 16, 16],
    depth=[1, 2, 1],
    num_heads=[1, 2, 2],
    patch_size=[4, 2, 2],
    num_global_tokens=[1, 2, 1],
    attention_size=[3, 2, 2],
    use_abs_pos=False,
    img_size=64,
    out_features=["layer1", "layer2", "layer3"],
)
ARCH = "l1,h1,d8,n1,s1,g1,p4,f3_l2,h2,d16,n2,s1,g1,p2,f2_l3,h2,d16,n1,s1,g0,p2,f2"


def filled(module):
    for name, parameter in module.named_parameters():
        if not name.endswith("norm.weight"):
            nn.init.normal_(parameter, std=0.3)
    return module


def toy(seed=0, **changes):
    torch.manual_seed(seed)
    return filled(MsViT(**TOY | changes))


def image(height=64, width=48):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))


def total(outputs):
    return sum(value.square().mean() for value in outputs.values())


# --- outputs and stages ------------------------------------------------------------------------


def test_outputs_and_their_description():
    net = toy(out_features=["layer1", "layer3"])
    shapes = {name: tuple(value.shape) for name, value in net(image()).items()}
    assert shapes == {"layer1": (2, 8, 16, 12), "layer3": (2, 16, 4, 3)}
    told = {name: (s.channels, s.stride) for name, s in net.output_shape().items()}
    assert told == {"layer1": (8, 4), "layer3": (16, 16)}
    assert net.size_divisibility == 16
    needed = toy(out_features=["layer2"]).state_dict()
    assert {name.split(".")[0] for name in needed} == {"layer1", "layer2"}


def test_arch_strings_are_the_same_as_lists():
    first, second, third = stages_of("l1_l2,d96_l3,a0", {"attention": "srformer"})
    assert first == Stage(192, 1, 3, 2, 1, "srformer", 7, True)
    assert second.embed_dim == 96
    assert not third.use_abs_pos
    assert not third.use_rel_pos  # srformer has none
    lists = {key: TOY[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
    lists |= {"attention_size": [3, 2, 2], "num_global_tokens": [1, 1, 0], "norm_eps": 1e-3}
    assert stages_of(ARCH, {"norm_eps": 1e-3, "embed_dim": None}) == stages_of(None, lists)
    # In the published code s0 makes every later stage full too.
    stages = stages_of(ARCH.replace("n2,s1", "n2,s0"), {"attention": "performer"})
    assert [stage.attention for stage in stages] == ["performer", "full", "performer"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"arch": "l1,h3_l2,x3_l3"}, r"ARCH, stage 2: expected l2, .*, got 'l2,x3'. Write it"),
        ({"arch": "l1_l2,s2_l3"}, r"ARCH, stage 2: .*0 or 1 for s and a.*, got 'l2,s2'"),
        ({"arch": "l1_l2"}, r"stages: expected 3 or 4 stages, got 2"),
        ({"arch": "l1_l2,h5_l3"}, r"num_heads: expected a divisor of embed_dim 192, got 5"),
        ({"arch": "l1_l2,d9,h3_l3"}, r"embed_dim: expected an even number with absolute .*got 9"),
        ({"arch": ARCH, "depth": [1, 1]}, r"MsViT: expected arch, or lists .*, got both \(depth"),
        ({"depth": [1, 2]}, r"stages: expected lists of one length, .*got embed_dim 3, depth 2"),
        ({"embed_dims": [8, 8, 8]}, r"argument of MsViT: .*'embed_dims'. Did you mean 'embed_dim'"),
        ({"attention": "vill"}, r"attention: expected one of vil, full, .* Did you mean 'vil'\?"),
        (
            {"attention": "only_global", "num_global_tokens": [1, 1, 0]},
            r"num_global_tokens: expected at least 1 for only_global, got 0",
        ),
        ({"out_features": ["layer4"]}, r"out_features: expected some of layer1, layer2, layer3"),
        ({"num_classes": 5}, r"classifier: expected both classes and the output 'head'"),
        ({"frozen_stages": [0]}, r"frozen_stages: expected numbers from 1 to 3, got \[0\]"),
        ({"exact": 2}, r"exact and mode: .*got exact 2, mode 0"),
        ({"sliding_chunk_backend": "cuda"}, r"sliding-chunk backend: expected one of auto, "),
    ],
)
def test_wrong_arguments(changes, text):
    arguments = dict(embed_dim=[8, 8, 8], depth=[1, 1, 1], num_heads=[2, 2, 2])
    arguments = {} if "arch" in changes else arguments
    with pytest.raises(InputError, match=text):
        MsViT(**{"out_features": ["layer3"], **arguments, **changes})


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize("use_abs_pos", [True, False])
def test_every_kind_takes_every_size_and_learns_everything(kind, use_abs_pos):
    """Faults a, i of docs/recipes.md: full attention and linformer were made for one size alone."""
    changes = dict(attention=kind, use_abs_pos=use_abs_pos, share_global_weights=use_abs_pos)
    net = toy(share_kv=use_abs_pos, **changes).eval()
    for height, width in ((96, 16), (16, 16)):
        outputs = net(image(height, width))
        assert outputs["layer3"].shape == (2, 16, height // 16, width // 16)
        assert all(value.isfinite().all() for value in outputs.values())
    expected = net(image())["layer3"]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(image())["layer3"]
        total({"x": outputs.float()}).backward()
    error = (outputs.float() - expected).norm() / expected.norm()
    assert error < (0.15 if kind == "srformer" else 0.04)  # it normalises what a map varies by
    assert all(p.grad.isfinite().all() and p.numel() for p in net.parameters())


def test_without_global_tokens_nothing_is_left_over():
    for kind in ("vil", "full", "srformer", "linformer", "performer"):
        net = toy(attention=kind, num_global_tokens=0, use_abs_pos=[True, False, True])
        total(net(image())).backward()
        assert [name for name, p in net.named_parameters() if p.grad is None or not p.numel()] == []
        assert not [name for name in net.state_dict() if "cls" in name or "g2" in name]


def test_absolute_positions_of_smaller_and_larger_maps():
    net = toy(use_abs_pos=True, norm_embed=False)
    embed = net.get_submodule("layer1.0")
    for parameter in embed.proj.parameters():
        nn.init.zeros_(parameter)
    rows, columns = embed.x_pos_embed[0], embed.y_pos_embed[0]
    tokens, size = embed(image(40, 64))
    assert size == (10, 16)
    grid = tokens[:, 1:].unflatten(1, size)
    torch.testing.assert_close(grid[0, :, 3, :4], rows[:10])  # first half of the channels: rows
    torch.testing.assert_close(grid[1, 7, :, 4:], columns)
    torch.testing.assert_close(tokens[0, 0], embed.cls_token[0, 0] + embed.cls_pos_embed[0, 0])
    tokens, size = embed(image(128, 64))  # the published one refuses this
    grid = tokens[:, 1:].unflatten(1, size)
    torch.testing.assert_close(grid[0, 1:31:2, 0, :4], 0.75 * rows[:-1] + 0.25 * rows[1:])


# --- what was broken: faults of the published repository in docs/recipes.md ----------------------


@pytest.mark.parametrize("frozen", [[2], [1, 3]])
def test_freezing_freezes_the_stages_that_are_named(frozen):
    """Fault g: whatever the number, the first stage was frozen, again and again."""
    net = toy(frozen_stages=frozen, drop_path_rate=0.5, attention="performer").train()
    draws = {n: m.projection_matrix.clone() for n, m in net.named_modules() if "fast" in n}
    net.redraw_interval = 0
    total(net(image())).backward()
    for name, value in net.named_parameters():
        assert (value.grad is None) == (int(name[5]) in frozen), name
    for name, matrix in draws.items():
        now = net.get_submodule(name).projection_matrix
        assert torch.equal(now, matrix) == (int(name[5]) in frozen), name


def test_performer_features_are_drawn_again_in_training():
    """Fault h: the detection code never does it."""
    net = toy(attention="performer", redraw_interval=2).train()
    features = [m for m in net.modules() if isinstance(m, FastAttention)]
    kept = [[each.projection_matrix.clone() for each in features]]
    for _ in range(6):
        net(image())
        kept.append([each.projection_matrix.clone() for each in features])
    changed = [not torch.equal(a[0], b[0]) for a, b in pairwise(kept)]
    assert changed == [False, False, True, False, False, True]
    assert not torch.equal(kept[3][0][:2, :2], kept[3][1][:2, :2])  # each has its own
    net.eval()(image())
    assert torch.equal(features[0].projection_matrix, kept[-1][0])
    # Another process, or a resumed run, draws the same.
    resumed = toy(seed=1, attention="performer", redraw_interval=2)
    resumed.load_state_dict(net.state_dict())
    for each in (net, resumed):
        for _ in range(3):
            each.train()(image())
    same = resumed.get_submodule("layer2.1.attn.fast_attention").projection_matrix
    assert int(net.num_redraws) == 3
    assert torch.equal(features[1].projection_matrix, same)


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0, 1])
def test_recomputed_blocks_give_the_same(mode):
    plain = toy(drop_path_rate=0.3, drop_rate=0.1, mode=mode).train()
    saving = toy(drop_path_rate=0.3, drop_rate=0.1, mode=mode, checkpoint_blocks=[0, 2, 3]).train()
    for net in (plain, saving):
        torch.manual_seed(3)
        total(net(image())).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_layers_for_layer_wise_lr_decay():
    net = toy(num_classes=3, out_features=["layer3", "head"], use_abs_pos=True)
    expected = {
        "layer1.0.proj.weight": 0,
        "layer1.1.attn.query.weight": 1,
        "layer1.2.mlp.fc1.weight": 1,
        "layer2.0.proj.weight": 2,
        "layer2.2.norm.bias": 2,
        "layer2.3.norm.bias": 3,
        "layer3.0.x_pos_embed": 4,
        "layer3.2.mlp.fc1.bias": 4,
        "norm.weight": 5,
        "head.bias": 5,
    }
    assert net.num_layers == 4
    assert {name: net.layer_id(name) for name in expected} == expected


# --- attention kinds ---------------------------------------------------------------------------


def attn_of(kind, **changes):
    """An attention of 8 channels and two heads with random weights, in float64."""
    torch.manual_seed(0)
    stage = Stage(**{"embed_dim": 8, "num_heads": 2, "use_abs_pos": False, **changes})
    return filled(kind(stage, 6)).double()


def tokens_of(count, size):
    torch.manual_seed(1)
    return torch.randn(2, count + size[0] * size[1], 8, dtype=torch.float64)


def heads(x, parts=1):
    return x.view(2, -1, parts, 2, 4).permute(2, 0, 3, 1, 4)


def attend(attn, q, k, v, bias=0.0):
    weights = (q @ k.mT * 4**-0.5 + bias).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("size", [(4, 5), (1, 1)])
@pytest.mark.parametrize("count", [0, 2])
def test_full_attention_has_relative_positions_at_every_size(size, count):
    """The published one refuses every size but its own."""
    attn, x = attn_of(FullAttention, num_global_tokens=count), tokens_of(count, size)
    places = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1]))
    offsets = places[:, None] - places[None] + 5
    table = attn.local_relative_position_bias_table.view(11, 11, 2)
    bias = torch.zeros(2, x.shape[1], x.shape[1], dtype=torch.float64)
    bias[:, count:, count:] = table[offsets[..., 0], offsets[..., 1]].permute(2, 0, 1)
    if count:
        bias[:, :count, :count] = attn.g2g_relative_position_bias
        bias[:, :count, count:] = attn.g2l_relative_position_bias[0][:, :, None]
        bias[:, count:, :count] = attn.g2l_relative_position_bias[1][:, None]
    torch.testing.assert_close(attn(x, size), attend(attn, *heads(attn.qkv(x), 3), bias))


def test_tables_are_cropped_or_stretched():
    table = torch.arange(25.0).view(25, 1)  # S = 3
    square = table.view(1, 5, 5)
    assert torch.equal(fit_offsets(table, (2, 3)), square[:, 1:4])
    stretched = fit_offsets(table, (4, 3))  # rows are too few, columns fit
    assert stretched.shape == (1, 7, 5)
    torch.testing.assert_close(stretched[0, 3], square[0, 2])  # offset 0 stays in the middle
    torch.testing.assert_close(stretched[0, :, 2].diff()[1:-1], torch.full((4,), 5.0) * 5 / 7)
    line = torch.arange(4.0).view(1, 4, 1)
    assert fit_axis(line, 2).flatten().tolist() == [0, 1]
    assert fit_axis(line, 8)[0, :3, 0].tolist() == [0, 0.25, 0.75]
    grid = torch.arange(9.0).view(9, 1)
    assert fit_grid(grid, (2, 3)).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert fit_grid(grid, (2, 6)).shape == (12, 1)
    bias = dense_bias(torch.arange(15.0).view(1, 3, 5))  # 2 x 3 places: query minus key
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    offsets = places[:, None] - places[None] + torch.tensor([1, 2])
    assert torch.equal(bias[0], (offsets[..., 0] * 5 + offsets[..., 1]).float())


def test_random_neighbours_in_training_alone():
    attn, size = attn_of(VilAttention, attention_size=3, mode=1), (7, 7)
    every, x = attn_of(VilAttention, attention_size=3), tokens_of(1, size)
    assert torch.equal(attn.eval()(x, size), every(x, size))
    torch.manual_seed(0)
    drawn = [attn.train().draw_mode() for _ in range(400)]
    assert min(drawn.count(k) for k in range(1, 9)) > 25
    torch.manual_seed(0)
    first = attn(x, size)
    every.draw_mode = lambda: drawn[0]
    assert torch.equal(first, every(x, size))


def test_instance_norm_has_the_right_gradient():
    """torch's own has not, for one image and a gradient that is not contiguous (torch 2.15)."""
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(InstanceNorm()(x), F.instance_norm(x, eps=1e-5))
    assert torch.autograd.gradcheck(lambda x: InstanceNorm()(x).flatten(2).mT, (x,))


def test_performer_approaches_softmax_attention_with_features_of_the_seed(monkeypatch):
    monkeypatch.setattr(kinds, "_KERNEL_EPS", 0.0)  # keeps features from zero: a bias
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 10, 4).double() * 0.7
    exact, errors = F.scaled_dot_product_attention(q, k, v), []
    for number in (8, 64, 4096):
        fast = FastAttention(4, number)
        fast.redraw(0)
        errors.append(float((fast.double()(q, k, v) - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1  # 0.25 if the first direction of each block lay in one half
    fast, same = FastAttention(8, 20), FastAttention(8, 20)
    state = torch.get_rng_state()
    fast.redraw(3)
    same.redraw(3)
    assert torch.equal(torch.get_rng_state(), state)  # nothing else is drawn differently
    assert torch.equal(fast.projection_matrix, same.projection_matrix)
    same.redraw(4)
    assert not torch.equal(fast.projection_matrix, same.projection_matrix)
    directions = F.normalize(fast.projection_matrix[:8], dim=1)
    torch.testing.assert_close(directions @ directions.T, torch.eye(8), rtol=0, atol=1e-5)
    assert len(set(fast.projection_matrix.norm(dim=1).tolist())) == 20  # not one length
