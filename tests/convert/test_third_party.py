"""The published classes themselves, tiny and with random weights: ours give the same numbers.

For formats that no golden case (tests/golden) has: SwiGLU, files of the projects' own repositories.
"""

import re
from functools import partial

import pytest
import torch
from torch import nn

from vitdet.backbones.vit import ViT
from vitdet.convert import convert, detect
from vitdet.convert.names import shapes_of

pytestmark = pytest.mark.slow  # their imports
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3}
SMALL |= {"num_heads": 2}
CLASS = {"use_cls_token": True}
NO_ROW = CLASS | {"pretrain_use_cls_token": False}
SWIGLU = {"ffn_layer": "swiglu", "mlp_ratio": 2.0}


def timm(module, name):
    return getattr(pytest.importorskip(f"timm.{module}"), name)


def timm_vit(*, gated=False, **options):
    if gated:
        packed = timm("layers", "SwiGLUPacked")
        options |= {"mlp_layer": packed, "act_layer": nn.SiLU, "mlp_ratio": 4.0}
    return timm("models.vision_transformer", "VisionTransformer")(**SMALL | options)


def randomised(model):
    """Give every weight of a model a value that matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            centre = 1.0 if re.search(r"norm\d?\w*\.weight$|ln_\w+\.weight$", name) else 0.0
            value.normal_(mean=centre, std=0.3)
    return model.eval()


def image(height=64, width=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=generator)


def tokens_of(model, picture=None):
    with torch.no_grad():
        return model.eval().forward_features(image() if picture is None else picture)


def same(content, expected, theirs, picture=None, **options):
    """Convert for our ViT with these options: its tokens are theirs, its format is recognised."""
    allow = options.pop("allow_inexact", False)
    vit = ViT(**SMALL | {"pretrain_img_size": 64, "final_norm": True} | options).eval()
    assert detect(content) == expected
    target = shapes_of(vit.state_dict())
    state, report = convert(content, target, allow_inexact=allow, settings=options)
    assert not report.initialised
    vit.load_state_dict(state)
    with torch.no_grad():
        tokens, _ = vit.forward_tokens(image() if picture is None else picture)
    tokens = (tokens.flatten(1, 2) if tokens.ndim == 4 else tokens)[:, -theirs.shape[1] :]
    assert tokens.shape == theirs.shape
    assert (tokens - theirs).abs().max() < 1e-4
    assert theirs.abs().max() > 0.1
    return report


@pytest.mark.parametrize(
    ("options", "ours"),
    [({"gated": True}, CLASS | SWIGLU), ({"qkv_bias": False}, CLASS | {"qkv_bias": False})],
)
def test_timm(options, ours):
    model = randomised(timm_vit(**options))
    report = same(model.state_dict(), "timm", tokens_of(model), **ours)
    assert set(report.dropped.values()) <= {"classifier"}


EVA = {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True}
EVA |= {"use_rot_pos_emb": True, "use_fc_norm": False}
EVA_OURS = {"ffn_layer": "swiglu_norm", "mlp_ratio": 8 / 3, "rope": "eva02"}


@pytest.mark.parametrize(
    ("grid", "model_size", "size"),
    [
        *(([12, 12], 64, (96, 160)), (None, 64, (64, 64)), ([7, 11], (64, 96), (64, 96))),
        *(("vit", (64, 96), (64, 96)), ("vit", (64, 96), (80, 112))),
    ],
)
def test_timm_on_rectangles(grid, model_size, size):
    """Rotary positions of an EVA-02 and tables of a ViT are stretched, as timm does."""
    options = {"img_size": model_size, "num_classes": 0, "global_pool": ""}
    options |= {"dynamic_img_size": True}
    ours = CLASS | {"pretrain_img_size": model_size, "img_size": model_size}
    ours |= {"pos_embed_resize": "bicubic_antialias", "patch_size": 16}
    if grid == "vit":
        model = randomised(timm_vit(**options))
    else:
        ours |= EVA_OURS | {"rope_pretrain_grid": grid, "rope_resize": "stretch"}
        options |= EVA | {"ref_feat_shape": grid}
        model = randomised(timm("models.eva", "Eva")(**SMALL | options))
    picture, fmt = image(*size), "timm" if grid == "vit" else "timm_eva"
    assert not same(model.state_dict(), fmt, tokens_of(model, picture), picture, **ours).dropped


def test_deit3_of_its_own_repository_and_mae_with_its_decoder():
    model = randomised(timm_vit(no_embed_class=True, init_values=1.0))
    state = {re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", n): v for n, v in model.state_dict().items()}
    same({"model": state}, "timm", tokens_of(model), **NO_ROW, layer_scale=True)
    model = randomised(timm_vit(num_classes=0))
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 32)}
    report = same({"model": model.state_dict() | decoder}, "mae", tokens_of(model), **CLASS)
    assert set(report.dropped) == set(decoder)


@pytest.mark.parametrize(("registers", "gated"), [(0, True), (4, False)])
def test_dinov2_of_its_own_repository(registers, gated):
    # timm's own converter reads the original names: it is the witness
    theirs = {"init_values": 1.0, "num_classes": 0, "reg_tokens": registers, "gated": gated}
    witness = timm_vit(**theirs, no_embed_class=registers > 0)
    torch.manual_seed(0)
    names = {"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32), "mask_token": (1, 32)}
    names |= {"register_tokens": (1, registers, 32)} if registers else {}
    for name, shape in shapes_of(witness.state_dict()).items():
        if name not in ("cls_token", "pos_embed", "reg_token"):
            names[name.replace("fc1", "w12").replace("fc2", "w3") if gated else name] = shape
    state = {name: torch.randn(shape) * 0.3 for name, shape in names.items()}
    read = timm("models.vision_transformer", "checkpoint_filter_fn")
    witness.load_state_dict(read(dict(state), witness))
    expected = tokens_of(witness)
    options = CLASS | {"layer_scale": True, "num_register_tokens": registers}
    options |= SWIGLU if gated else {}
    report = same(state, "dinov2", expected, **options)
    assert list(report.dropped) == ["mask_token"]
    # without a row for the class token in our pos_embed, it goes into the token
    report = same(state, "dinov2", expected, **options | NO_ROW)
    assert "pos_embed: class row added to cls_token, the model has none" in report.notes


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_its_own_repository(gated):
    theirs = {"qkv_fused": True, "use_rot_pos_emb": True, "class_token": True, "init_values": 1.0}
    theirs |= {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True}
    theirs |= {"use_abs_pos_emb": False, "num_reg_tokens": 4, "use_fc_norm": False}
    theirs |= {"global_pool": "", "num_classes": 0, "dynamic_img_size": True, "qkv_bias": True}
    theirs |= {"swiglu_mlp": gated, "swiglu_align_to": 8 * gated}
    norm = partial(nn.LayerNorm, eps=1e-5)
    witness = timm("models.eva", "Eva")(**SMALL | theirs, norm_layer=norm)
    torch.manual_seed(0)
    state = {"storage_tokens": torch.randn(1, 4, 32), "mask_token": torch.zeros(1, 32)}
    state["rope_embed.periods"] = torch.ones(4)
    names = {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"} if gated else {}
    for name, value in witness.state_dict().items():
        original = re.sub(r"gamma_(\d)", r"ls\1.gamma", name)
        for word, its in names.items():
            original = original.replace(f"mlp.{word}", f"mlp.{its}")
        if not re.search(r"reg_token|[qkv]_bias", name):
            state[original] = torch.randn(value.shape) * 0.3
    for i in range(3):
        mask = torch.ones(96)
        mask[32:64] = 0  # k has no bias, whatever stands there
        state[f"blocks.{i}.attn.qkv.bias"] = torch.randn(96)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    read = timm("models.eva", "checkpoint_filter_fn")
    witness.load_state_dict(read(dict(state), witness), strict=False)
    options = NO_ROW | {"num_register_tokens": 4, "rope": "dinov3", "use_abs_pos": False}
    options |= {"norm_eps": 1e-5, "layer_scale": True, "ffn_layer": "swiglu" if gated else "mlp"}
    picture = image(48, 80)
    report = same(state, "dinov3", tokens_of(witness, picture), picture, **options)
    assert sorted(report.dropped) == ["mask_token", "rope_embed.periods"]


def test_beit_but_for_its_bias_table():
    theirs = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 1.0}
    model = randomised(timm("models.beit", "Beit")(**SMALL, **theirs, global_pool=""))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in model.named_parameters():
        if "bias_table" in name:
            value.data.zero_()  # what is left when the table goes
    options = NO_ROW | {"use_abs_pos": False, "layer_scale": True, "allow_inexact": True}
    report = same(state, "beit", tokens_of(model), **options)
    assert len(report.inexact) == 3


def test_eva01():
    model = randomised(timm("models.eva", "Eva")(**SMALL, global_pool="", num_classes=5))
    report = same(model.state_dict(), "eva01_pretrain", tokens_of(model), **CLASS)
    assert set(report.dropped) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip(quick):
    module = pytest.importorskip("open_clip.transformer", reason="open_clip_torch is not installed")
    layers = {"act_layer": module.QuickGELU} if quick else {}
    sizes = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 3, "heads": 2}
    sizes |= {"mlp_ratio": 4.0, "output_dim": 8, "output_tokens": True}
    model = randomised(module.VisionTransformer(**sizes, **layers))
    state = {f"visual.{name}": value for name, value in model.state_dict().items()}
    state |= {"logit_scale": torch.ones(()), "ln_final.weight": torch.ones(4)}
    state |= {"transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    options = CLASS | {"pre_norm": True, "norm_eps": 1e-5}
    options |= {"act_layer": "quick_gelu" if quick else "gelu"}
    with torch.no_grad():
        theirs = model(image())[1]  # the tokens of the places, after the norm
    report = same(state, "clip", theirs, **options)
    texts = {"text tower", "projection to the space shared with texts"}
    assert set(report.dropped.values()) == texts
