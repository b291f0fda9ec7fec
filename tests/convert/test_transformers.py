"""Weights as huggingface's libraries save them: read, and a backbone that computes the same."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.convert.manifests import find, needs_manifests
from vitdet import weights
from vitdet.app.follow import net_settings, pixels
from vitdet.backbones.vit import ViT
from vitdet.convert import convert
from vitdet.convert.names import shapes_of
from vitdet.utils.checks import InputError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.logging.disable_progress_bar()
SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"intermediate_size": 64, "image_size": 32, "patch_size": 8},
}
NO_TABLE = {
    **{"use_relative_position_bias": False, "use_absolute_position_embeddings": True},
    "use_mean_pooling": False,
}
CLASSES = {
    # class, its options, what a detector's backbone leaves out and ours is given to compare
    "dinov2": ("Dinov2", {"mlp_ratio": 2}, {}),
    "dinov2 registers": ("Dinov2WithRegisters", {"mlp_ratio": 2}, {"num_register_tokens": 4}),
    "dinov2 swiglu": (
        "Dinov2WithRegisters",
        {"use_swiglu_ffn": True},
        {"num_register_tokens": 4},
    ),
    "dinov3": ("DINOv3ViT", {"num_register_tokens": 4}, {"num_register_tokens": 4}),
    "dinov3 swiglu": (
        "DINOv3ViT",
        {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        {"num_register_tokens": 4},
    ),
    "vit": ("ViT", {}, {}),
    "mae": ("ViTMAE", {"mask_ratio": 0.0}, {}),
    "deit": ("DeiT", {}, {"num_register_tokens": 1}),
    "clip": ("CLIPVision", {}, {"final_norm": False}),
    "siglip": ("SiglipVision", {}, {"use_cls_token": False}),
    "siglip 2": ("Siglip2Vision", {"num_patches": 16}, {"use_cls_token": False}),
    "beit": ("Beit", NO_TABLE, {}),
    # no name of theirs stands in the table
    "i-jepa": ("IJepa", {}, {"use_cls_token": False}),
    "msn": ("ViTMSN", {}, {}),
    "data2vec": ("Data2VecVision", NO_TABLE, {}),
    "dpt": ("DPT", {"is_hybrid": False}, {}),
    "blip": ("BlipVision", {}, {}),
    "internvl": (
        "InternVLVision",
        {"image_size": [32, 32], "patch_size": [8, 8], "attention_bias": True},
        {"final_norm": False},
    ),
    "flava": ("FlavaImage", {}, {}),
    "owl-vit": ("OwlViTVision", {}, {"final_norm": False}),
}


def saved(name, folder):
    """A class at toy size with random numbers, saved; and what ours is given beside its file."""
    kind, options, ours = CLASSES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**SIZES | options)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.eval().save_pretrained(folder)
    return model, {
        "use_cls_token": True,
        "pretrain_use_cls_token": False,
        "final_norm": True,
    } | ours


def map_of(model, name, images):
    """Their last tokens of patches as a map (B, C, 4, 4)."""
    options = {}
    if name == "mae":
        options["noise"] = torch.arange(16.0).expand(len(images), 16)
    if name == "siglip 2":  # patches: row, column, channel
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
        images = patches.reshape(len(images), 16, -1)
        shapes = torch.tensor([[4, 4]]).expand(len(images), 2)
        mask = torch.ones(len(images), 16, dtype=torch.long)
        options |= {"pixel_attention_mask": mask, "spatial_shapes": shapes}
    tokens = model(images, **options).last_hidden_state[:, -16:]
    return tokens.mT.unflatten(2, (4, 4))


@pytest.mark.parametrize("name", CLASSES)
def test_our_backbone_computes_the_same(name, tmp_path):
    """With the settings that follow from the file, on its weights as saved and as in memory."""
    model, given = saved(name, tmp_path)
    found = weights.read(tmp_path)
    settings = net_settings(found.content, found.config, patch_size=8) | given
    net = ViT(img_size=32, patch_size=8, **settings).eval()
    images = torch.randn(2, 3, 32, 32)
    for content in (found.content, model.state_dict()):
        state, report = convert(content, shapes_of(net.state_dict()), settings=settings)
        assert (report.initialised, report.inexact) == ([], {})
        net.load_state_dict(state)
        with torch.no_grad():
            ours, theirs = net(images)["last_feat"], map_of(model, name, images)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_sam_and_a_whole_clip():
    """Of a whole model the image tower is taken; SAM has windows and decomposed positions."""
    parts = {
        "vision_config": {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64},
            **{"image_size": 64, "patch_size": 8, "output_channels": 8, "window_size": 2},
            **{"global_attn_indexes": [1], "num_pos_feats": 8},
        }
    }
    sam = transformers.SamModel(transformers.SamConfig(**parts)).eval()
    with torch.no_grad():
        for parameter in sam.vision_encoder.parameters():
            parameter.normal_(0, 0.3)
    settings = net_settings(sam.state_dict(), sam.config.to_dict(), patch_size=8)
    settings |= {"use_rel_pos": True, "window_size": 2, "global_block_indexes": [1]}
    net = ViT(img_size=64, patch_size=8, **settings).eval()
    state, _ = convert(sam.state_dict(), shapes_of(net.state_dict()), settings=settings)
    net.load_state_dict(state)
    images, seen = torch.randn(2, 3, 64, 64), []
    sam.vision_encoder.neck.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        sam.vision_encoder(images)
        ours = net(images)["last_feat"]
    torch.testing.assert_close(ours, seen[0].permute(0, 3, 1, 2), rtol=0, atol=1e-4)

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(vision_config=SIZES, text_config=text)
    clip = transformers.CLIPModel(config)
    settings = net_settings(clip.state_dict(), config.to_dict(), patch_size=8)
    assert (settings["act_layer"], settings["norm_eps"], settings["pre_norm"]) == (
        *("quick_gelu", 1e-5, True),
    )
    net = ViT(img_size=32, patch_size=8, **settings)
    _, report = convert(clip.state_dict(), shapes_of(net.state_dict()), settings=settings)
    assert (report.source_format, report.initialised) == ("hf_clip", [])


@needs_manifests
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vit_small_patch16_dinov3.lvd1689m", {"num_heads": 6, "rope": "dinov3", "norm_eps": 1e-5}),
        ("openai.ViT-L-14", {"num_heads": 16, "depth": 24, "pre_norm": True, "norm_eps": 1e-5}),
        ("openai.ViT-B-16", {"act_layer": "quick_gelu"}),  # kernels of float16 tell it
        ("open_clip.ViT-B-16", {"act_layer": "gelu"}),
        ("sam_vit_h", {"num_heads": 16, "embed_dim": 1280, "pretrain_img_size": 1024}),
        ("dinov2_vitg14", {"num_heads": 24, "ffn_layer": "swiglu", "layer_scale": True}),
        ("mae_pretrain_vit_huge", {"num_heads": 16, "mlp_ratio": 4.0, "pretrain_img_size": 256}),
        ("timm.eva02_base_patch14_224.mim_in22k", {"rope": "eva02", "ffn_layer": "swiglu_norm"}),
        ("PE-Core-G14-448", {"num_heads": 16, "rope": "pe", "rope_pretrain_grid": 32}),
        ("PE-Spatial-T16-512", {"num_heads": 3, "patch_bias": False, "pretrain_img_size": 512}),
        ("sam3.detector_trunk", {"rope_pretrain_grid": 24, "pre_norm": True, "norm_eps": 1e-5}),
        ("mask_rcnn_vitdet_b.coco", {}),  # a detector has its own recipe
    ],
)
def test_published_files_tell_their_settings(name, told):
    settings = net_settings(find(name).content(), {})
    assert {key: settings[key] for key in told} == told
    assert bool(settings) == bool(told)


@pytest.mark.parametrize("name", ["core_tiny_patch16_384", "spatial_gigantic_patch14_448"])
def test_timm_has_perception_encoder_too(name):
    eva = pytest.importorskip("timm.models.eva")
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 64, "patch_size": 16}
    torch.manual_seed(0)
    model = getattr(eva, f"vit_pe_{name}")(**sizes, ref_feat_shape=(4, 4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    content = model.state_dict()
    settings = net_settings(content, {}) | {"use_cls_token": "cls_token" in content}
    net = ViT(img_size=64, **settings).eval()
    state, report = convert(content, shapes_of(net.state_dict()), settings=settings)
    assert (report.initialised, report.inexact, report.settings) == ([], {}, {})
    net.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs = model.forward_intermediates(images, [1], norm=False, intermediates_only=True)[0]
        torch.testing.assert_close(net(images)["last_feat"], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("test_vit", {"num_heads": 2}),
        ("vit_base_patch16_gap_224", {"num_heads": 16}),  # of 48 channels
        ("vit_base_patch32_siglip_256", {"act_layer": "gelu_tanh"}),
        ("vit_base_patch16_siglip_224", {"act_layer": "gelu"}),  # as timm computes it
        ("vit_base_patch16_clip_quickgelu_224", {"act_layer": "quick_gelu", "norm_eps": 1e-5}),
    ],
)
def test_timm_tells_of_its_models_what_no_shape_tells(name, told):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, depth=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    patch, side = model.patch_embed.patch_size[0], model.patch_embed.img_size[0]
    content = model.state_dict()
    settings = net_settings(content, {"architecture": name}, patch_size=patch)
    assert {key: settings[key] for key in told} == told
    settings |= {"use_cls_token": "cls_token" in content}
    net = ViT(img_size=side, patch_size=patch, **settings).eval()
    net.load_state_dict(convert(content, shapes_of(net.state_dict()), settings=settings)[0])
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        theirs = model.forward_intermediates(images, [0], norm=False, intermediates_only=True)[0]
        torch.testing.assert_close(net(images)["last_feat"], theirs, rtol=0, atol=1e-4)


def test_heads_of_a_changed_timm_model_and_positions_that_are_not_known():
    timm = pytest.importorskip("timm")
    content = timm.create_model("test_vit").state_dict()
    config = {"architecture": "test_vit", "model_args": {"num_heads": 4}}
    assert net_settings(content, config)["num_heads"] == 4
    assert net_settings(content, {"architecture": "resnet18"})["num_heads"] == 1
    content = timm.create_model("vit_small_patch16_rope_224", depth=1).state_dict()
    with pytest.raises(InputError, match=r"source: expected positions, got no pos_embed\. "):
        net_settings(content, {})


@needs_manifests
@pytest.mark.parametrize("name", ["PE-Core-B16-224", "PE-Spatial-S16-512", "sam3.trunk"])
def test_the_settings_take_every_weight(name):
    """At the published sizes, without an override."""
    content = find(name).content()
    settings = net_settings(content, {})
    with torch.device("meta"):
        net = ViT(**settings)
    target = shapes_of(net.state_dict())
    _, report = convert(content, target, settings=settings, resize_patch_embed=True)
    assert (report.initialised, report.inexact, report.settings) == ([], {}, {})


def test_jsons_beside_the_weights(tmp_path):
    model, _ = saved("vit", tmp_path)
    found = weights.read(tmp_path / "model.safetensors")  # config.json beside it counts, too
    assert found.config["model_type"] == "vit"
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(means))
    found = weights.read(tmp_path)
    assert pixels(found.config, found.preprocessor) == {
        "pixel_mean": [127.5, 127.5, 127.5],
        "pixel_std": [63.75, 127.5, 255.0],
    }
    assert pixels({}, {}) == {}
    for values in ("half", [0.5], [0.5, "a", 0.5], [True, 0, 0]):
        with pytest.raises(
            InputError, match=r"image_mean: expected three numbers, got .* Fetch it"
        ):
            pixels({}, {"image_mean": values})
    with pytest.raises(InputError, match=r"image_std: expected three numbers"):
        pixels({}, means | {"image_std": [0, 1, 1]})
    with pytest.raises(InputError, match=r"says hidden_size 48, the weights have 32: they are not"):
        net_settings(found.content, {"hidden_size": 48})
    for key, value in (("num_attention_heads", 0), ("layer_norm_eps", None), ("hidden_act", [])):
        with pytest.raises(InputError, match=rf"json: {key}: expected \w+, got .*\. Fetch it anew"):
            net_settings(found.content, {key: value})
    with pytest.raises(InputError, match=r"hidden_act: expected one of gelu, .*, got relu\. Our"):
        net_settings(found.content, found.config | {"hidden_act": "relu"})

    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="40KB")
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(names) > 1
    assert weights.read(sharded).content.keys() == found.content.keys()
    (sharded / names[0]).unlink()
    with pytest.raises(InputError, match=rf"expected the shard {names[0]} beside it, got none"):
        weights.read(sharded)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("config.json", "{", r"config\.json: it cannot be read \(Expecting property name"),
        ("config.json", "[]", r"config\.json: expected a dict, got a list"),
        ("model.safetensors", "junk", r"model\.safetensors: it cannot be read"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, name, text, error):
    saved("vit", tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=error):
        weights.read(tmp_path)


def test_a_folder_without_weights_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"expected one of model\.safetensors, .* got an empty"):
        weights.read(tmp_path)
    saved("vit", tmp_path / "a")
    shutil.move(tmp_path / "a/model.safetensors", tmp_path / "a/other.safetensors")
    assert len(weights.read(tmp_path / "a").content) > 9  # the only one that there is
    shutil.copy(tmp_path / "a/other.safetensors", tmp_path / "a/another.safetensors")
    with pytest.raises(InputError, match=r"got another\.safetensors, other\.safetensors\. Name"):
        weights.read(tmp_path / "a")
    index = tmp_path / "a/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(InputError, match=r"expected the shard \.\./secret\.safetensors beside it"):
        weights.read(index)
