"""The Vision Longformer backbone: what was broken in the published one, and its options."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from vitdet.backbones import msvit
from vitdet.backbones.msvit import MsViT
from vitdet.backbones.msvit.approximate import FastAttention
from vitdet.backbones.msvit.arch import ATTENTION_KINDS
from vitdet.backbones.msvit.attention import VilAttention
from vitdet.layers.drop_path import DropPath
from vitdet.optim import parameter_table

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


def toy(seed: int = 0, **changes) -> MsViT:
    torch.manual_seed(seed)
    net = MsViT(**TOY | changes)
    for name, parameter in net.named_parameters():
        if not name.endswith("norm.weight"):
            nn.init.normal_(parameter, std=0.3)
    return net


def image(height: int = 64, width: int = 48, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


def total(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(value.square().mean() for value in outputs.values())


# --- outputs -----------------------------------------------------------------------------------


def test_outputs_and_their_description():
    net = toy(out_features=["layer1", "layer3"])
    outputs = net(image())
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "layer1": (2, 8, 16, 12),
        "layer3": (2, 16, 4, 3),
    }
    shapes = net.output_shape()
    assert {n: (s.channels, s.stride) for n, s in shapes.items()} == {
        "layer1": (8, 4),
        "layer3": (16, 16),
    }
    assert net.size_divisibility == 16


def test_classifier():
    net = toy(num_classes=5, out_features=["head"], avg_pool=True)
    pooled = []
    net.head.register_forward_hook(lambda _, inputs, __: pooled.append(inputs[0]))
    normed = []
    net.norm.register_forward_hook(lambda _, __, output: normed.append(output))
    assert net(image())["head"].shape == (2, 5)
    torch.testing.assert_close(pooled[0], normed[0].mean(1))
    net.avg_pool = False
    net(image())
    assert torch.equal(pooled[1], normed[1][:, 0])  # the first global token


def test_stages_that_no_output_needs_are_not_built():
    names = {name.split(".")[0] for name in toy(out_features=["layer2"]).state_dict()}
    assert names == {"layer1", "layer2"}


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize("use_abs_pos", [True, False])
def test_every_kind_builds_on_meta_and_takes_every_size(kind, use_abs_pos):
    """Full attention with relative positions, and linformer, were made for one size alone."""
    changes = dict(attention=kind, use_abs_pos=use_abs_pos)
    net = toy(**changes).eval()
    for height, width in ((64, 64), (48, 80), (96, 16), (16, 16)):
        outputs = net(image(height, width))
        assert outputs["layer3"].shape == (2, 16, height // 16, width // 16)
        assert all(value.isfinite().all() for value in outputs.values())
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MsViT(**TOY | changes).state_dict().items()}
    assert shapes == {name: value.shape for name, value in net.state_dict().items()}


def test_mixed_kinds():
    net = toy(attention=["vil", "performer", "full"])
    kinds = [type(net.get_submodule(f"layer{i}.1.attn")).__name__ for i in (1, 2, 3)]
    assert kinds == ["VilAttention", "PerformerAttention", "FullAttention"]
    assert net(image())["layer3"].shape == (2, 16, 4, 3)


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


# --- what was broken: landscape of the published repository, faults a to m ----------------------


def test_full_attention_with_relative_positions_in_the_last_stage():
    """Fault a: such a recipe stopped at every size but one."""
    net = toy(attention=["vil", "vil", "full"])
    for size in ((64, 64), (48, 64), (80, 112)):
        total(net(image(*size))).backward()
    assert net.get_parameter("layer3.1.attn.local_relative_position_bias_table").grad.any()


@pytest.mark.parametrize("frozen", [[1], [2], [1, 3]])
def test_freezing_freezes_the_stages_that_are_named(frozen):
    """Fault g: whatever the number, the first stage was frozen, again and again."""
    net = toy(frozen_stages=frozen, drop_path_rate=0.5, attention="performer").train()
    before = {name: value.clone() for name, value in net.named_parameters()}
    draws = {n: m.projection_matrix.clone() for n, m in net.named_modules() if "fast" in n}
    net.redraw_interval = 0
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    total(net(image())).backward()
    optimizer.step()
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name]) == (int(name[5]) in frozen), name
    for name, matrix in draws.items():
        now = net.get_submodule(name).projection_matrix
        assert torch.equal(now, matrix) == (int(name[5]) in frozen), name
    for i in (1, 2, 3):
        assert net.get_submodule(f"layer{i}").training == (i not in frozen)


def test_performer_features_are_drawn_again_in_training():
    """Fault h: the detection code never does it."""
    net = toy(attention="performer", redraw_interval=2).train()
    features = [m for m in net.modules() if isinstance(m, FastAttention)]

    def matrices() -> list[torch.Tensor]:
        return [each.projection_matrix.clone() for each in features]

    kept = [matrices()]
    for _ in range(6):
        net(image())
        kept.append(matrices())
    changed = [not torch.equal(a[0], b[0]) for a, b in pairwise(kept)]
    assert changed == [False, False, True, False, False, True]
    assert int(net.num_redraws) == 2
    assert not torch.equal(kept[3][0][:2, :2], kept[3][1][:2, :2])  # each has its own
    net.eval()
    before = matrices()
    for _ in range(3):
        net(image())
    assert all(map(torch.equal, before, matrices()))

    # Another process, or a resumed run, draws the same.
    net.train()
    resumed = toy(seed=1, attention="performer", redraw_interval=2).train()
    resumed.load_state_dict(net.state_dict())
    for _ in range(3):
        net(image())
        resumed(image())
    assert int(net.num_redraws) == 3
    assert torch.equal(
        features[1].projection_matrix,
        resumed.get_submodule("layer2.1.attn.fast_attention").projection_matrix,
    )
    never = toy(attention="performer", redraw_interval=None).train()
    never(image())
    assert int(never.calls_since_last_redraw) == 0


def test_norms_and_biases_decay_or_not_as_the_recipe_says():
    """Fault k: weight decay reached norms, biases and positions, and nothing could change it."""
    net = toy(use_abs_pos=[True, False, False])
    table = parameter_table(net, weight_decay=0.05, weight_decay_norm=None, no_decay=[])
    assert {setting.weight_decay for setting in table.values()} == {0.05}  # as published
    table = parameter_table(
        net,
        weight_decay=0.05,
        weight_decay_vectors=0.0,
        no_decay=["pos_embed", "cls_token", "relative_position_bias"],
    )
    decays = {name for name, setting in table.items() if setting.weight_decay}
    assert "layer1.1.attn.query.weight" in decays
    for ending in ("norm.weight", "bias", "cls_token", "_pos_embed", "bias_table"):
        assert not [name for name in decays if name.endswith(ending)]


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize("use_abs_pos", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_every_parameter_gets_a_gradient(kind, use_abs_pos, share):
    """Fault l: the unused classifier made DistributedDataParallel search for unused parameters."""
    net = toy(
        attention=kind,
        use_abs_pos=use_abs_pos,
        share_global_weights=share,
        share_kv=share,
        num_global_tokens=[1, 2, 1],
        out_features=["layer2", "layer3"],
    ).train()
    total(net(image())).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert not [name for name, p in net.named_parameters() if not p.numel()]


def test_without_global_tokens_nothing_is_left_over():
    for kind in ("vil", "full", "srformer", "linformer", "performer"):
        net = toy(attention=kind, num_global_tokens=0, use_abs_pos=[True, False, True])
        total(net(image())).backward()
        assert [name for name, p in net.named_parameters() if p.grad is None or not p.numel()] == []
        assert not [name for name in net.state_dict() if "cls" in name or "g2" in name]


# of tensors of one number
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_distributed_training_needs_no_search(tmp_path):
    """DistributedDataParallel stops at the second step if a parameter got no gradient."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(toy(attention=["vil", "srformer", "performer"]))
        for _ in range(3):
            total(net(image())).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_but_torch_is_imported():
    """Fault m: einops, scipy and timm.models.layers."""
    found = set()
    for path in Path(msvit.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    standard = {"__future__", "abc", "collections", "contextlib", "dataclasses", "functools"}
    standard |= {"itertools", "math", "re", "typing"}
    assert found - standard == {"torch", "vitdet"}


# --- options -----------------------------------------------------------------------------------


def test_norm_eps_is_that_of_every_norm():
    """The published code keeps LN_EPS and uses 1e-6."""
    for eps in (1e-6, 1e-2):
        net = toy(norm_eps=eps, num_classes=3, out_features=["layer3", "head"])
        found = {module.eps for module in net.modules() if isinstance(module, nn.LayerNorm)}
        assert found == {eps}
    assert {m.eps for m in toy().modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_stochastic_depth_grows_over_all_blocks():
    net = toy(drop_path_rate=0.3)
    rates = [module.rate for module in net.modules() if isinstance(module, DropPath)]
    expected = [0.0, 0.1, 0.2, 0.3]
    assert rates == pytest.approx([rate for rate in expected for _ in range(2)])  # attention, MLP
    torch.manual_seed(0)
    first, second = (net.train()(image(batch=8))["layer3"] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(net.eval()(image())["layer3"], net(image())["layer3"])


def test_dropout_in_training():
    net = toy(drop_rate=0.5).train()
    assert not torch.equal(net(image())["layer1"], net(image())["layer1"])
    plain = toy()
    assert torch.equal(net.eval()(image())["layer1"], plain(image())["layer1"])


@pytest.mark.parametrize("mode", [0, 1])
def test_recomputed_blocks_give_the_same(mode):
    plain = toy(drop_path_rate=0.3, mode=mode).train()
    saving = toy(drop_path_rate=0.3, mode=mode, checkpoint_blocks=[0, 2, 3]).train()
    for net in (plain, saving):
        torch.manual_seed(3)
        total(net(image())).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_set_mode():
    net = toy(attention=["vil", "full", "vil"])
    before = net(image())["layer3"]
    net.set_mode(-1)
    assert [m.mode for m in net.modules() if isinstance(m, VilAttention)] == [-1, -1]
    assert not torch.equal(net(image())["layer3"], before)
    assert torch.equal(
        toy(attention=["vil", "full", "vil"], mode=-1)(image())["layer3"], net(image())["layer3"]
    )


def test_layers_for_layer_wise_lr_decay():
    net = toy(num_classes=3, out_features=["layer3", "head"], use_abs_pos=True)
    assert net.num_layers == 4
    expected = {
        "layer1.0.proj.weight": 0,
        "layer1.0.cls_token": 0,
        "layer1.1.attn.query.weight": 1,
        "layer1.2.mlp.fc1.weight": 1,
        "layer2.0.proj.weight": 2,
        "layer2.1.norm.bias": 2,
        "layer2.2.norm.bias": 2,
        "layer2.3.norm.bias": 3,
        "layer2.4.mlp.fc2.bias": 3,
        "layer3.0.x_pos_embed": 4,
        "layer3.2.mlp.fc1.bias": 4,
        "norm.weight": 5,
        "head.bias": 5,
    }
    names = dict(net.named_parameters())
    assert {name: net.layer_id(name) for name in expected if name in names} == expected


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_bf16(kind):
    net = toy(attention=kind).eval()
    expected = net(image())["layer3"]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(image())["layer3"]
        outputs.float().square().mean().backward()
    error = (outputs.float() - expected).norm() / expected.norm()
    assert error < (0.1 if kind == "srformer" else 0.03)  # it normalises what a map varies by
    assert all(p.grad.isfinite().all() for p in net.parameters())
