"""The published classes themselves, tiny and with random weights: ours give the same numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import timm.layers
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import nn

from vitdet.backbones.vit import ViT
from vitdet.convert import Report, convert, detect

Weights = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3}
SMALL |= {"num_heads": 2}
TOLERANCE = 1e-4


def randomised(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Give every weight of a model a value that matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            centre = 1.0 if re.search(r"norm\d?\w*\.weight$|ln_\w+\.weight$", name) else 0.0
            value.normal_(mean=centre, std=std)
    return model.eval()


def image(height: int = 64, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=generator)


def ours(content: Mapping[str, Any], expected: str, **options: Any) -> tuple[ViT, Report]:
    """Convert for our ViT with these options and load; the format is recognised."""
    allow = options.pop("allow_inexact", False)
    vit = ViT(**SMALL | {"pretrain_img_size": 64, "final_norm": True} | options).eval()
    target = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    assert detect(content) == expected
    state, report = convert(content, target, allow_inexact=allow, settings=options)
    assert not report.initialised
    vit.load_state_dict(state)
    return vit, report


def same(vit: ViT, theirs: torch.Tensor, picture: torch.Tensor) -> None:
    with torch.no_grad():
        tokens, _ = vit.forward_tokens(picture)
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
    assert tokens.shape == theirs.shape
    assert (tokens - theirs).abs().max() < TOLERANCE
    assert theirs.abs().max() > 0.1


def tokens_of(model: Any, picture: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_features(picture)


CLASS = {"use_cls_token": True}
NO_ROW = CLASS | {"pretrain_use_cls_token": False}
REGISTERS = NO_ROW | {"num_register_tokens": 4}
SWIGLU = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4.0}
# name: (options of timm's class, options of ours)
TIMM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "augreg": ({"num_classes": 5}, CLASS),
    "deit3": ({"no_embed_class": True, "init_values": 1.0}, NO_ROW | {"layer_scale": True}),
    "dinov2": ({"init_values": 1.0, "num_classes": 0}, CLASS | {"layer_scale": True}),
    "dinov2_reg": (
        {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True},
        REGISTERS | {"layer_scale": True},
    ),
    "dinov2_giant": (SWIGLU, CLASS | {"ffn_layer": "swiglu", "mlp_ratio": 2.0}),
    "clip": (
        {
            "pre_norm": True,
            "act_layer": "quick_gelu",
            "norm_layer": partial(nn.LayerNorm, eps=1e-5),
        },
        CLASS | {"pre_norm": True, "act_layer": "quick_gelu", "norm_eps": 1e-5},
    ),
    "no_bias": ({"qkv_bias": False}, CLASS | {"qkv_bias": False}),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    theirs, options = TIMM[name]
    model: Any = randomised(VisionTransformer(**SMALL | theirs))
    vit, report = ours(model.state_dict(), "timm", **options)
    same(vit, tokens_of(model, image()), image())
    assert set(report.dropped.values()) <= {"classifier"}


def test_deit3_of_its_own_repository() -> None:
    theirs, options = TIMM["deit3"]
    model: Any = randomised(VisionTransformer(**SMALL | theirs))
    state = {re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", n): v for n, v in model.state_dict().items()}
    vit, _ = ours({"model": state}, "timm", **options)
    same(vit, tokens_of(model, image()), image())


def test_mae_with_its_decoder() -> None:
    model: Any = randomised(VisionTransformer(**SMALL, num_classes=0))
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 32)}
    vit, report = ours({"model": model.state_dict() | decoder}, "mae", **CLASS)
    same(vit, tokens_of(model, image()), image())
    assert set(report.dropped) == set(decoder)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_of_its_own_repository(registers: int, gated: bool) -> None:
    # timm's own converter reads the original names: it is the witness
    theirs = {"init_values": 1.0, "num_classes": 0} | (SWIGLU if gated else {})
    theirs |= {"reg_tokens": registers, "no_embed_class": registers > 0}
    witness: Any = VisionTransformer(**SMALL | theirs)
    torch.manual_seed(0)
    names = {"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32), "mask_token": (1, 32)}
    if registers:
        names["register_tokens"] = (1, registers, 32)
    for name, value in witness.state_dict().items():
        if name not in ("cls_token", "pos_embed", "reg_token"):
            original = name.replace("fc1", "w12").replace("fc2", "w3") if gated else name
            names[original] = tuple(value.shape)
    state = {name: torch.randn(shape) * 0.3 for name, shape in names.items()}
    witness.load_state_dict(vit_filter(dict(state), witness))

    options = CLASS | {"layer_scale": True, "num_register_tokens": registers}
    options |= {"ffn_layer": "swiglu", "mlp_ratio": 2.0} if gated else {}
    vit, report = ours(state, "dinov2", **options)
    assert list(report.dropped) == ["mask_token"]
    same(vit, tokens_of(witness.eval(), image()), image())
    # without a row for the class token in our pos_embed, it goes into the token
    vit, report = ours(state, "dinov2", **options | {"pretrain_use_cls_token": False})
    assert "pos_embed: class row added to cls_token, the model has none" in report.notes
    same(vit, tokens_of(witness, image()), image())


DINOV3 = {"qkv_fused": True, "use_rot_pos_emb": True, "class_token": True, "init_values": 1.0}
DINOV3 |= {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True}
DINOV3 |= {"use_abs_pos_emb": False, "num_reg_tokens": 4, "use_fc_norm": False}
DINOV3 |= {"global_pool": "", "num_classes": 0, "dynamic_img_size": True}
DINOV3 |= {"norm_layer": partial(nn.LayerNorm, eps=1e-5)}
OUR_DINOV3 = REGISTERS | {"rope": "dinov3", "use_abs_pos": False, "norm_eps": 1e-5}
OUR_DINOV3 |= {"layer_scale": True}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_timm(bias: bool, gated: bool) -> None:
    theirs = DINOV3 | {"qkv_bias": bias, "swiglu_mlp": gated, "swiglu_align_to": 8 * gated}
    model: Any = randomised(Eva(**SMALL | theirs))
    options = OUR_DINOV3 | {"ffn_layer": "swiglu" if gated else "mlp"}
    vit, _ = ours(model.state_dict(), "dinov3", **options)  # no bias there is zeros here
    same(vit, tokens_of(model, image(48, 80)), image(48, 80))


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_its_own_repository(gated: bool) -> None:
    witness: Any = Eva(
        **SMALL | DINOV3 | {"qkv_bias": True, "swiglu_mlp": gated, "swiglu_align_to": 8 * gated}
    )
    torch.manual_seed(0)
    state: Weights = {"storage_tokens": torch.randn(1, 4, 32), "mask_token": torch.zeros(1, 32)}
    state["rope_embed.periods"] = torch.ones(4)
    names = {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"} if gated else {}
    for name, value in witness.state_dict().items():
        original = re.sub(r"gamma_(\d)", r"ls\1.gamma", name)
        for theirs, its in names.items():
            original = original.replace(f"mlp.{theirs}", f"mlp.{its}")
        if not re.search(r"reg_token|[qkv]_bias", name):
            state[original] = torch.randn(value.shape) * 0.3
    for i in range(3):
        mask = torch.ones(96)
        mask[32:64] = 0  # k has no bias, whatever stands there
        state[f"blocks.{i}.attn.qkv.bias"] = torch.randn(96)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    witness.load_state_dict(eva_filter(dict(state), witness), strict=False)

    vit, report = ours(state, "dinov3", **OUR_DINOV3 | {"ffn_layer": "swiglu" if gated else "mlp"})
    assert sorted(report.dropped) == ["mask_token", "rope_embed.periods"]
    same(vit, tokens_of(witness.eval(), image(48, 80)), image(48, 80))


BEIT = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 1.0, "global_pool": ""}


def test_beit_but_for_its_bias_table() -> None:
    model: Any = randomised(Beit(**SMALL, **BEIT))
    options = NO_ROW | {"use_abs_pos": False, "layer_scale": True, "allow_inexact": True}
    vit, report = ours(model.state_dict(), "beit", **options)
    assert len(report.inexact) == 3
    for name, value in model.named_parameters():
        if "bias_table" in name:
            value.data.zero_()  # what is left when the table goes
    same(vit, tokens_of(model, image()), image())


def test_eva01() -> None:
    model: Any = randomised(Eva(**SMALL, global_pool="", num_classes=5))
    vit, report = ours(model.state_dict(), "eva01_pretrain", **CLASS)
    same(vit, tokens_of(model, image()), image())
    assert set(report.dropped) == {"head.weight", "head.bias"}


def test_eva02_of_timm() -> None:
    theirs = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "global_pool": ""}
    theirs |= {"use_rot_pos_emb": True, "ref_feat_shape": (16, 16), "num_classes": 0}
    model: Any = randomised(Eva(**SMALL | theirs))
    options = CLASS | {"rope": "eva02", "ffn_layer": "swiglu_norm"}
    vit, _ = ours(model.state_dict(), "timm_eva", **options)
    same(vit, tokens_of(model, image()), image())


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip(quick: bool) -> None:
    module = pytest.importorskip("open_clip.transformer", reason="open_clip_torch is not installed")
    layers = {"act_layer": module.QuickGELU} if quick else {}
    sizes = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 3, "heads": 2}
    model: Any = randomised(
        module.VisionTransformer(**sizes, mlp_ratio=4.0, output_dim=8, output_tokens=True, **layers)
    )
    state = {f"visual.{name}": value for name, value in model.state_dict().items()}
    state |= {"logit_scale": torch.ones(()), "ln_final.weight": torch.ones(4)}
    state |= {"transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    options = CLASS | {"pre_norm": True, "norm_eps": 1e-5}
    options |= {"act_layer": "quick_gelu" if quick else "gelu"}
    vit, report = ours(state, "clip", **options)
    assert set(report.dropped.values()) == {
        "text tower",
        "projection to the space shared with texts",
    }
    with torch.no_grad():
        theirs = model(image())[1]  # the tokens of the places, after the norm
    tokens, _ = vit.forward_tokens(image())
    assert (tokens[:, 1:] - theirs).abs().max() < TOLERANCE


def test_transformers_vitdet() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.VitDetConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=64,
        window_size=3,
        window_block_indices=[0, 2],
        residual_block_indices=[1],
        use_relative_position_embeddings=True,
        out_features=["stage3"],
    )
    model: Any = randomised(transformers.VitDetBackbone(config))
    options = {"use_rel_pos": True, "window_size": 3, "global_block_indexes": [1]}
    options |= {"residual_block_indexes": [1], "final_norm": False}
    vit, report = ours(model.state_dict(), "hf_vitdet", **options)
    assert not report.dropped
    with torch.no_grad():
        theirs = model(image(48, 80)).feature_maps[0]
        mine = vit(image(48, 80))["last_feat"]
    assert (mine - theirs).abs().max() < TOLERANCE
    assert theirs.abs().max() > 0.1


def test_segment_anything() -> None:
    sam = pytest.importorskip("segment_anything.modeling", reason="segment-anything is missing")
    encoder: Any = randomised(
        sam.ImageEncoderViT(
            **SMALL,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
            out_chans=8,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    )
    state = {f"image_encoder.{name}": value for name, value in encoder.state_dict().items()}
    options = {"use_rel_pos": True, "window_size": 3, "global_block_indexes": [1]}
    options |= {"pretrain_use_cls_token": False, "final_norm": False}
    vit, report = ours(state, "sam", **options)
    assert set(report.dropped.values()) == {"SAM's neck: the pyramid takes its place"}
    maps: list[torch.Tensor] = []
    encoder.blocks[-1].register_forward_hook(lambda *given: maps.append(given[2]))
    with torch.no_grad():
        encoder(image())
        mine = vit(image())["last_feat"]
    assert (mine - maps[0].permute(0, 3, 1, 2)).abs().max() < TOLERANCE
