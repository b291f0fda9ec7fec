"""What the golden cases do not show of ViT, EVA-01, EVA-02, ViTAE-B and ViTAE-S."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.msvit import MsViT
from vitdet.backbones.vit import ViT
from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import PyramidReduction, ViTAES
from vitdet.engine import parallel
from vitdet.layers.rope import Dinov3Rope, RotaryTables, rotate
from vitdet.utils.checks import InputError

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 4}
SMALL |= {"num_heads": 2, "pretrain_img_size": 64, "window_size": 4}
REL = {**SMALL, "use_rel_pos": True}
TOKENS = {**SMALL, "use_cls_token": True, "num_register_tokens": 2}
STAGES = {"img_size": 64, "embed_dims": [4, 4, 8], "token_dims": [8, 8, 16]}
STAGES |= {"depths": [0, 1, 3], "num_heads": [1, 1, 2], "groups": [1, 2, 4], "window_size": 3}
STAGES |= {"global_block_indexes": [3]}
NETS = {
    "vit": partial(ViT, **REL, global_block_indexes=[1]),
    "eva01": partial(ViT, **REL, qkv_bias="qv", layer_scale=True, global_block_indexes=[1]),
    "dinov3": partial(ViT, **TOKENS, rope="dinov3", final_norm=True),
    "eva02": partial(EVA02ViT, **SMALL, global_block_indexes=[1], rope_pretrain_grid=4),
    "vitae": partial(ViTAE, **SMALL, global_block_indexes=[3]),
    "vitae_s": partial(ViTAES, **STAGES),
    "vil": partial(MsViT, arch="l1,h1,d8,p4,f2_l2,h2,d16_l3,h2,d16,n2", out_features=["layer3"]),
}


def filled(net):
    torch.manual_seed(0)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return net.eval()


def made(name, **changes):
    torch.manual_seed(0)  # ViTAE-S draws features that do not learn
    return filled(NETS[name](**changes))


def image_of(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("build", "changes", "text"),
    [
        (ViT, {"global_block_indexes": [4]}, r"global_block_indexes: .* from 0 to 3, got \[4\]"),
        (ViT, {"checkpoint_blocks": [9]}, r"checkpoint_blocks: .* got \[9\]"),
        (
            ViT,
            {"shifted_block_indexes": [1, 2], "global_block_indexes": [2]},
            r"shifted_block_indexes: expected window blocks, got \[2\]. A block that sees",
        ),
        (ViT, {"num_heads": 3}, "num_heads: expected a divisor of 16, got 3"),
        (ViT, {"ffn_layer": "swigl"}, r"ffn_layer: expected one of mlp, swiglu, .* 'swiglu'\?"),
        (ViT, {"qkv_bias": "full"}, "qkv_bias: expected one of True, False, qv, got 'full'"),
        (ViT, {"propagation": "convs"}, "propagation: expected one of naive, basic, bottleneck"),
        (ViT, {"attention_backend": "flash"}, "attention backend: expected one of auto, eager"),
        (
            ViT,
            {"use_rel_pos": True, "use_cls_token": True},
            "use_rel_pos: expected none with class or register tokens, .* got True",
        ),
        (EVA02ViT, {"num_heads": 8}, "a head of a multiple of 4 channels, got 2"),
        (EVA02ViT, {"use_rel_pos": True}, "use_rel_pos: expected none with split_qkv, got True"),
        (ViTAE, {"embed_dim": 18}, "embed_dim: expected a multiple of 4, .* got 18"),
        (ViTAES, {"num_heads": [1, 2]}, "ViTAES: expected lists of one length"),
        (ViTAES, {"global_block_indexes": [4]}, r"global_block_indexes: .* from 0 to 3, got"),
        (ViTAES, {"kernel_sizes": [2, 3, 3]}, "kernel_sizes: expected 3 or more, got 2"),
        (ViTAES, {"downsample_ratios": [4, 3, 2]}, "downsample_ratios: expected one of 2, 4, 8"),
        (ViTAES, {"token_dims": [8, 8, 24]}, "token_dims: expected 16, got 24. The dilated"),
        (ViTAES, {"reduction_kinds": ["x"] * 3}, "reduction_kinds: expected one of performer, "),
    ],
)
def test_wrong_choices(build, changes, text):
    with pytest.raises(InputError, match=text):
        build(**{**(STAGES if build is ViTAES else SMALL), **changes})


# --- what every backbone offers ----------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_linear_layers_are_called_and_units_run_in_order(name, monkeypatch):
    """Hooks and adapters count; FSDP2 shards every unit, which hold all but the embeddings."""
    net = made(name)
    linear = {key for key, each in net.named_modules() if isinstance(each, nn.Linear)}
    called, units = set(), []
    for key in linear:
        net.get_submodule(key).register_forward_hook(lambda *_, key=key: called.add(key))
    for unit in net.units():
        unit.register_forward_hook(lambda unit, *_: units.append(unit))
    net(image_of(64, 64))
    assert called == linear
    assert units == list(net.units())
    inside = {id(p) for unit in units for p in unit.parameters()}
    outside = [key for key, p in net.named_parameters() if id(p) not in inside]
    embeddings = ("patch_embed.", "pos_embed", "cls_token", "reg_token", "norm.")
    assert all(key.startswith(embeddings) for key in outside)
    sharded = []
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(parallel, "fully_shard", lambda each, **_: sharded.append(each))
    detector = nn.ModuleDict({"backbone": net})
    parallel.shard(detector)
    assert sharded == [*net.units(), detector]


@pytest.mark.parametrize("name", [name for name in NETS if name != "vil"])
def test_activation_checkpointing_changes_no_gradient(name):
    gradients = []
    for blocks in ((), (0, 1, 2)):
        net = made(name, checkpoint_blocks=blocks, drop_path_rate=0.3).train()
        torch.manual_seed(1)
        net(image_of(64, 48))["last_feat"].square().sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["vit", "eva02", "vitae", "vitae_s"])
@pytest.mark.parametrize("size", [(96, 48), (67, 50), (32, 32)], ids=str)
def test_images_of_any_shape(name, size):
    """The published code stops at anything but its square, or loses pixels."""
    net = made(name)
    image = image_of(*size).requires_grad_()
    stride = net.output_shape()["last_feat"].stride
    out = net(image)["last_feat"]
    assert out.shape == (2, 16, -(-size[0] // stride), -(-size[1] // stride))
    out.square().sum().backward()
    assert (image.grad.abs().sum((0, 1)) > 0).all()  # every pixel counts
    torch.testing.assert_close(net(image[:1])["last_feat"], out[:1], rtol=0, atol=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(image)["last_feat"].float()
    assert (mixed - out).norm() / out.norm() < 0.05


def test_layers_of_parameters():
    ids = {
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "cls_token": 0,
        "reg_token": 0,
        "norm_pre.weight": 0,
        "blocks.3.attn.qkv.weight": 4,
        "blocks.1.residual.conv1.weight": 5,
        "norm.weight": 5,
    }
    net = ViT(**TOKENS, residual_block_indexes=[1], pre_norm=True, final_norm=True)
    assert {name: net.layer_id(name) for name in ids} == ids
    assert ids.keys() <= dict(net.named_parameters()).keys()
    # three reduction cells and 0 + 1 + 3 normal ones, counted through
    net, stages = ViTAES(**STAGES), {"layers.0.RC.attn.w": 0, "layers.1.RC.PCM.0.bias": 1}
    stages |= {"layers.1.NC.0.norm1.bias": 2, "layers.2.RC.PRM.convs.0.0.bias": 3}
    stages |= {"layers.2.NC.0.mlp.fc1.bias": 4, "layers.2.NC.2.PCM.6.bias": 6, "norm.weight": 8}
    assert {name: net.layer_id(name) for name in stages} == stages


def test_initial_weights_and_published_counts():
    torch.manual_seed(0)
    net = ViT(img_size=64, patch_size=8, embed_dim=128, depth=1, num_heads=2, use_rel_pos=True)
    attn = net.units()[0].attn
    for drawn in (attn.qkv.weight, attn.proj.weight, net.pos_embed):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
    assert not attn.qkv.bias.any()
    assert not attn.rel_pos_h.any()
    with torch.device("meta"):
        b = ViTAE(global_block_indexes=[2, 5, 8, 11])
        s = ViTAES(global_block_indexes=[2, 5, 8, 13])
    # with the pyramid's deconvolutions, which are not here, the counts of the published backbones
    assert sum(p.numel() for p in b.parameters()) == 91_655_936
    assert sum(p.numel() for p in s.parameters()) == 23_747_488
    frozen = [name for name, p in s.named_parameters() if not p.requires_grad]
    assert frozen == ["layers.0.RC.attn.w", "layers.1.RC.attn.w"]


# --- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({}, 16),
        ({"global_block_indexes": [1]}, 64),
        # A shifted window has its first 2 x 2 tokens within the first window of the others.
        ({"shifted_block_indexes": [0]}, 16),
        ({"shifted_block_indexes": [1]}, 64),
        ({"depth": 2, "shifted_block_indexes": [1]}, 36),
        # One token further, then the four windows that this touches.
        ({"residual_block_indexes": [0], "propagation": "naive"}, 64),
        ({"residual_block_indexes": [3], "propagation": "naive"}, 25),
        ({"residual_block_indexes": [3], "propagation": "basic"}, 36),
        ({"residual_block_indexes": [3], "propagation": "bottleneck"}, 25),
        # The first block changes the prefix tokens, the second hands it on.
        ({"use_rel_pos": False, "use_cls_token": True}, 64),
        ({"use_rel_pos": False, "use_cls_token": True, "depth": 1}, 16),
        # Two 3x3 convolutions beside the attention of the window.
        ({"depth": 1, "parallel_branch": True, "window_size": 1}, 9),
    ],
)
def test_how_far_information_reaches(changes, seen):
    net, image = filled(ViT(**{**REL, **changes})), image_of(64, 64)
    changed = image.clone()
    changed[..., :8, :8] += 1
    difference = (net(image)["last_feat"] - net(changed)["last_feat"]).abs().sum((0, 1))
    assert (difference > 1e-5).sum() == seen


@pytest.mark.parametrize("rope", ["none", "dinov3", "eva02"])
def test_one_window_over_the_whole_map_is_global_attention(rope):
    options = {**TOKENS, "window_size": 8, "rope": rope, "residual_block_indexes": [1]}
    windows, whole = filled(ViT(**options)), filled(ViT(**options, global_block_indexes=range(4)))
    got, size = windows.forward_tokens(image_of(64, 64))
    expected, _ = whole.forward_tokens(image_of(64, 64))
    assert (got.shape, size) == ((2, 3 + 64, 16), (8, 8))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_maps_of_blocks_are_outputs_too():
    net = filled(ViT(**REL, out_block_indexes=[3, 0], final_norm=True))
    outputs = net(image_of(64, 64))
    assert list(net.output_shape()) == list(outputs) == ["last_feat", "block0", "block3"]
    last_map = outputs["block3"].permute(0, 2, 3, 1)
    assert torch.equal(net.norm(last_map).permute(0, 3, 1, 2), outputs["last_feat"])
    with_class = filled(ViT(**TOKENS, out_block_indexes=[1]))
    assert with_class(image_of(64, 64))["block1"].shape == (2, 16, 8, 8)


# --- positions ---------------------------------------------------------------------------------


def test_tables_of_a_rectangle_are_those_of_the_square_it_is_cut_from():
    """Positions and offsets of 8 x 5 places, once alone and once as a part of 8 x 8."""
    both = {**REL, "pretrain_use_cls_token": False, "global_block_indexes": [1], "depth": 2}
    sides = {"img_size": (64, 40), "pretrain_img_size": (64, 40)}
    net = filled(ViT(**{**both, **sides}))
    whole = ViT(**both, rel_pos_resize="crop", pos_embed_resize="crop").eval()
    weights = net.state_dict()
    places = weights["pos_embed"].view(1, 8, 5, 16)
    weights["pos_embed"] = F.pad(places, (0, 0, 0, 3)).flatten(1, 2)
    table = weights["blocks.1.attn.rel_pos_w"]
    weights["blocks.1.attn.rel_pos_w"] = F.pad(table, (0, 0, 3, 3))
    whole.load_state_dict(weights)
    image = image_of(64, 40)
    torch.testing.assert_close(net(image)["last_feat"], whole(image)["last_feat"])


def test_resized_beit_tables_do_not_learn():
    net = filled(ViT(**REL, rel_pos_resize="beit", global_block_indexes=[3]))
    net(image_of(64, 80))["last_feat"].square().sum().backward()
    assert net.get_parameter("blocks.3.attn.rel_pos_w").grad is None  # 10 columns, table of 8
    for name in ("blocks.3.attn.rel_pos_h", "blocks.0.attn.rel_pos_w"):
        assert net.get_parameter(name).grad.any()


def test_dinov3_windows_keep_the_offsets_of_the_map():
    """Attention in a window is attention of the map to those places: rope knows offsets alone."""
    net = filled(ViT(**{**SMALL, "rope": "dinov3", "depth": 1, "use_abs_pos": False}))
    block, x = net.units()[0], net.patch_embed(image_of(64, 64))
    qkv = block.attn.qkv(block.norm1(x)).view(2, 8, 8, 3, 2, 8)[:, :4, 4:].reshape(2, 16, 3, 2, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    tables = Dinov3Rope(8)((8, 8), (8, 8), x.device)
    corner = torch.arange(64).view(8, 8)[:4, 4:].flatten()
    part = RotaryTables(tables.cos[corner], tables.sin[corner], halves=True)
    y = (rotate(q, part) @ rotate(k, part).mT * 8**-0.5).softmax(-1) @ v
    expected = block.attn.proj(y.transpose(1, 2).reshape(2, 4, 4, 16))
    rope = block.rope((4, 4), (8, 8), x.device)
    got = block.attn(block.norm1(x)[:, :4, 4:], None, rope)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def cosines(net, number, size):
    """The rotary cosines of a block on a map of `size`."""
    block = net.units()[number]
    attends = (block.window_size,) * 2 if block.window_size else size
    return block.rope(attends, size, torch.device("cpu")).cos


def test_eva02_positions_of_a_rectangle_continue_those_of_the_square():
    build = partial(EVA02ViT, **SMALL, rope_pretrain_grid=4, global_block_indexes=[3])
    net, plain = build(), build(rope_interpolate=False)
    square, wide = cosines(net, 3, (8, 8)), cosines(net, 3, (6, 12))  # the training image is 8 x 8
    assert torch.equal(wide.view(6, 12, 8)[:, :8], square.view(8, 8, 8)[:6])
    assert torch.equal(cosines(build(global_window_size=8), 3, (6, 12)), square)
    # a window of the local blocks spans the pretraining's grid, whatever the image
    assert torch.equal(cosines(net, 0, (8, 8)), cosines(plain, 0, (4, 4)))
    angle, half = (cosines(each, 3, (8, 8)).acos()[8] for each in (plain, net))  # second row
    torch.testing.assert_close(angle, 2 * half)  # 8 tokens for 4
    assert not list(net.buffers())


# --- further choices ---------------------------------------------------------------------------


def test_what_is_frozen():
    net = ViT(**SMALL, freeze_patch_embed=True)
    frozen = [name for name, value in net.named_parameters() if not value.requires_grad]
    assert frozen == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert not any(p.requires_grad for p in EVA02ViT(**SMALL, frozen=True).parameters())


@pytest.mark.slow
def test_compiles_as_one_graph():
    net = filled(EVA02ViT(**SMALL | {"depth": 2}, global_block_indexes=[1]))
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    image = image_of(64, 96)
    torch.testing.assert_close(compiled(image)["last_feat"], net(image)["last_feat"])


def test_reduction_cells_round_sizes_up():
    prm = PyramidReduction(3, 2, kernel_size=7, stride=4, dilations=(1, 2, 3, 4))
    for height in range(32, 41):
        assert prm(torch.zeros(1, 3, height, 64)).shape == (1, -(-height // 4), 16, 8)
    # A side that the stride does not divide has one more zero on both ends, as published.
    image, conv = torch.randn(1, 3, 33, 64), prm.convs[1][0]
    shifted = F.conv2d(image, conv.weight, conv.bias, 4, (6, 5), 2)
    assert torch.equal(prm(image)[..., 2:4], F.gelu(shifted).permute(0, 2, 3, 1))
