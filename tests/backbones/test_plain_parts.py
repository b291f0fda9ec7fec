"""What all backbones share: linear layers that are called, units in order, rectangles, one rope."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.base import LayeredBackbone
from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.msvit import MsViT
from vitdet.backbones.vit import ViT
from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import ViTAES
from vitdet.engine import parallel

SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 2}
SMALL |= {"num_heads": 2, "window_size": 3, "global_block_indexes": [1]}


def nets() -> dict[str, LayeredBackbone]:
    torch.manual_seed(0)
    tokens = {"embed_dims": (4, 4), "token_dims": (8, 8), "downsample_ratios": (4, 2)}
    lists = {"kernel_sizes": (7, 3), "dilations": ((1, 2), (1, 2)), "depths": (0, 2)}
    kinds = {"reduction_kinds": ("performer", "performer_less"), "reduction_groups": (1, 1)}
    found: dict[str, LayeredBackbone] = {
        "vit": ViT(**SMALL, use_rel_pos=True),
        "eva01": ViT(**SMALL, use_rel_pos=True, qkv_bias="qv"),
        "eva02": EVA02ViT(**SMALL),
        "vitae": ViTAE(**SMALL),
        "vitae_s": ViTAES(
            **tokens, **lists, **kinds, img_size=64, num_heads=(1, 2), groups=(1, 2), window_size=3
        ),
        "vil": MsViT(arch="l1,h1,d8,n1,p4,f2_l2,h2,d16,n1_l3,h2,d16,n2", out_features=["layer3"]),
    }
    for net in found.values():
        for parameter in net.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
    return found


NETS = ("vit", "eva01", "eva02", "vitae", "vitae_s", "vil")


@pytest.mark.parametrize("name", NETS)
def test_what_is_hooked_to_a_linear_layer_is_called(name: str) -> None:
    net = nets()[name].eval()
    linear = {key for key, each in net.named_modules() if isinstance(each, nn.Linear)}
    called = set()
    for key in linear:
        net.get_submodule(key).register_forward_hook(lambda *_, key=key: called.add(key))
    net(torch.randn(1, 3, 64, 64))
    assert called == linear


class Adapter(nn.Module):
    """Low-rank change of a linear layer, called in its place."""

    def __init__(self, layer: nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.down @ self.up


@pytest.mark.parametrize(
    ("name", "layer"), [("eva02", "q_proj"), ("eva02", "v_proj"), ("eva01", "qkv")]
)
def test_an_adapter_in_place_of_a_layer_counts(name: str, layer: str) -> None:
    net, merged = nets()[name].eval(), nets()[name].eval()
    image = torch.randn(1, 3, 64, 40)
    before = net(image)["last_feat"]
    attn = net.get_submodule("blocks.1.attn")
    plain = attn.get_submodule(layer)
    assert isinstance(plain, nn.Linear)
    down, up = torch.randn(16, 2), torch.randn(2, plain.out_features)
    setattr(attn, layer, Adapter(plain, down, up))
    with torch.no_grad():
        merged.get_parameter(f"blocks.1.attn.{layer}.weight").add_((down @ up).T)
    changed = net(image)["last_feat"]
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(changed, merged(image)["last_feat"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_units_are_what_runs_in_order_and_fsdp_wraps_each(name: str, monkeypatch: Any) -> None:
    net = nets()[name].eval()
    called: list[nn.Module] = []
    for unit in net.units():
        unit.register_forward_hook(lambda unit, *_: called.append(unit))
    net(torch.randn(1, 3, 64, 64))
    assert called == list(net.units())
    inside = sum(p.numel() for unit in net.units() for p in unit.parameters())
    whole = sum(p.numel() for p in net.parameters())
    embeddings = [getattr(net, each, None) for each in ("patch_embed", "pos_embed", "norm")]
    sizes = [p.numel() for e in embeddings if isinstance(e, nn.Module) for p in e.parameters()]
    sizes += [e.numel() for e in embeddings if isinstance(e, nn.Parameter)]
    assert inside + sum(sizes) == whole
    sharded: list[nn.Module] = []
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(parallel, "fully_shard", lambda each, **_: sharded.append(each))
    detector = nn.ModuleDict({"backbone": net})
    parallel.shard(detector)
    assert sharded == [*net.units(), detector]


# --- rectangles --------------------------------------------------------------------------------


def test_tables_of_a_rectangle_are_those_of_the_square_it_is_cut_from() -> None:
    """Positions and offsets of 8 x 5 places, once alone and once as a part of 8 x 8."""
    torch.manual_seed(0)
    both = {**SMALL, "use_rel_pos": True, "pretrain_use_cls_token": False}
    both |= {"img_size": (64, 40), "pretrain_img_size": (64, 40)}
    net = ViT(**both).eval()
    assert net.get_parameter("blocks.1.attn.rel_pos_h").shape == (15, 8)
    assert net.get_parameter("blocks.1.attn.rel_pos_w").shape == (9, 8)
    assert net.get_parameter("blocks.0.attn.rel_pos_w").shape == (5, 8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    square = {"img_size": 64, "pretrain_img_size": 64}
    crop = {"rel_pos_resize": "crop", "pos_embed_resize": "crop"}
    whole = ViT(**(both | square | crop)).eval()
    weights = net.state_dict()
    places = weights["pos_embed"].view(1, 8, 5, 16)
    weights["pos_embed"] = F.pad(places, (0, 0, 0, 3)).flatten(1, 2)
    table = weights["blocks.1.attn.rel_pos_w"]
    weights["blocks.1.attn.rel_pos_w"] = F.pad(table, (0, 0, 3, 3))
    whole.load_state_dict(weights)
    image = torch.randn(2, 3, 64, 40)
    torch.testing.assert_close(net(image)["last_feat"], whole(image)["last_feat"])
    # and on another size the grid of 8 x 5 is stretched
    x = net.patch_embed(image[..., :48, :32])
    stretched = F.interpolate(places.permute(0, 3, 1, 2), size=(6, 4), mode="bicubic")
    seen: list[torch.Tensor] = []
    net.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(image[..., :48, :32])
    torch.testing.assert_close(seen[0], x + stretched.permute(0, 2, 3, 1))


# --- rotary positions --------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["extend", "stretch"])
@pytest.mark.parametrize("grid", [4, 16, None])
def test_eva02_is_one_network_in_either_class(resize: Any, grid: int | None) -> None:
    """On the training square, a rectangle and a smaller square."""
    torch.manual_seed(0)
    shared = SMALL | {"window_size": 4, "rope_resize": resize, "pretrain_img_size": 64}
    split = EVA02ViT(**shared, rope_pretrain_grid=grid or 1, rope_interpolate=grid is not None)
    for parameter in split.parameters():
        nn.init.normal_(parameter, std=0.2)
    joint = ViT(
        **shared,
        rope="eva02",
        rope_pretrain_grid=grid,
        ffn_layer="swiglu_norm",
        mlp_ratio=4 * 2 / 3,
        qkv_bias="qv",
    )
    weights = split.state_dict()
    for i in range(2):
        parts = [weights.pop(f"blocks.{i}.attn.{each}_proj.weight") for each in "qkv"]
        weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
    joint.load_state_dict(weights)
    for size in ((64, 64), (64, 96), (32, 40)):
        image = torch.randn(1, 3, *size)
        found = (net.eval()(image)["last_feat"] for net in (split, joint))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
