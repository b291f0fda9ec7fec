"""The way out: names, forms, round trips, and what other projects' own classes make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import converter
from vitdet import checkpoint
from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT
from vitdet.convert import TARGETS, UnaccountedError, convert, detect, export
from vitdet.convert.out import nest
from vitdet.pyramid import SimpleFeaturePyramid
from vitdet.utils.checks import InputError

from .manifests import CHECKPOINTS, find, published

Weights = dict[str, torch.Tensor]
needs_manifests = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)
SIZES: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2}
SIZES |= {"pretrain_img_size": 64}
WINDOWS = {"use_rel_pos": True, "window_size": 2, "global_block_indexes": [1]}
PROPAGATION = WINDOWS | {"residual_block_indexes": [0]}
NO_CLASS_ROW = {"pretrain_use_cls_token": False}


def random(model: nn.Module) -> Weights:
    """Return random weights for a model, a buffer's among them."""
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def vit(**changes: Any) -> ViT:
    return ViT(**SIZES | changes)


def eva02(**changes: Any) -> EVA02ViT:
    return EVA02ViT(**SIZES | changes)


def pyramid(net: nn.Module) -> SimpleFeaturePyramid:
    return SimpleFeaturePyramid(net, out_channels=8, scale_factors=(2.0, 1.0))


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


# (target, our model, every name that the target cannot hold)
HELD: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "a plain ViT to detectron2": ("detectron2", lambda: vit(**PROPAGATION)),
    "a pyramid to detectron2": ("detectron2", lambda: pyramid(vit(**PROPAGATION))),
    "EVA-02 to detectron2": ("detectron2", lambda: pyramid(eva02(inner_attn_norm=True))),
    "a plain ViT to transformers": ("hf_vitdet", lambda: vit(**PROPAGATION)),
    "no class row to transformers": ("hf_vitdet", lambda: vit(**WINDOWS, **NO_CLASS_ROW)),
    "no positions to transformers": ("hf_vitdet", lambda: vit(use_abs_pos=False)),
    "SAM": ("sam", lambda: vit(**WINDOWS, **NO_CLASS_ROW)),
    "timm": ("timm", lambda: vit(layer_scale=True, **NO_CLASS_ROW)),
    "EVA-02 to timm": ("timm", lambda: eva02(inner_attn_norm=True, **NO_CLASS_ROW)),
    "EVA-02 to StreamPETR": ("streampetr", lambda: pyramid(eva02())),
    "a bare EVA-02 to StreamPETR": ("streampetr", eva02),
    "a plain ViT to StreamPETR": ("streampetr", lambda: pyramid(vit(**WINDOWS))),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", HELD)
def test_out_and_in_again_is_the_identity(case: str, suffix: str, tmp_path: Path) -> None:
    target, make = HELD[case]
    weights = random(make())
    weights = {name: value.half() if "fc1" in name else value for name, value in weights.items()}
    written, report = export(weights, target)
    assert set(report.used) == set(weights)
    assert sorted(report.used.values()) == sorted(written)
    assert not report.dropped
    assert not report.inexact
    path = tmp_path / f"out{suffix}"
    checkpoint.write(path, nest(written, target, flat=suffix == ".safetensors"))
    content = checkpoint.read(path)
    assert "vitdet" not in content
    back, account = convert(content, shapes(weights))
    assert not account.initialised
    assert not account.unaccounted
    assert not account.inexact
    for name, value in weights.items():
        assert torch.equal(back[name], value), name
        assert back[name].dtype == value.dtype


NAMES = {
    "hf_vitdet": {
        "net.pos_embed": "embeddings.position_embeddings",
        "net.patch_embed.proj.bias": "embeddings.projection.bias",
        "net.blocks.1.attn.rel_pos_h": "encoder.layer.1.attention.rel_pos_h",
        "net.blocks.0.attn.qkv.weight": "encoder.layer.0.attention.qkv.weight",
        "net.blocks.0.residual.norm3.weight": "encoder.layer.0.residual.norm3.weight",
        "net.blocks.1.mlp.fc2.bias": "encoder.layer.1.mlp.fc2.bias",
    },
    "sam": {
        "net.pos_embed": "pos_embed",
        "net.blocks.1.mlp.fc2.bias": "blocks.1.mlp.lin2.bias",
        "net.blocks.1.attn.rel_pos_w": "blocks.1.attn.rel_pos_w",
    },
    "detectron2": {"net.blocks.1.mlp.fc2.bias": "net.blocks.1.mlp.fc2.bias"},
    "timm": {"net.blocks.1.mlp.fc2.bias": "blocks.1.mlp.fc2.bias", "net.pos_embed": "pos_embed"},
    "streampetr": {
        "net.blocks.1.norm1.bias": "img_backbone.blocks.1.norm1.bias",
        "simfp_3.0.weight": "img_backbone.adapter.simfp_3.0.weight",
    },
}


@pytest.mark.parametrize("target", NAMES)
def test_names(target: str) -> None:
    weights = random(pyramid(vit(**PROPAGATION)))
    _, report = export(weights, target, allow_inexact=True)
    assert {name: report.used[name] for name in NAMES[target]} == NAMES[target]


def test_names_of_eva02_in_timm() -> None:
    _, report = export(random(eva02()), "timm", allow_inexact=True)
    for ours, theirs in {
        "attn.q_bias": "attn.q_proj.bias",
        "attn.v_bias": "attn.v_proj.bias",
        "attn.k_proj.weight": "attn.k_proj.weight",
        "mlp.w1.bias": "mlp.fc1_g.bias",
        "mlp.w2.weight": "mlp.fc1_x.weight",
        "mlp.ffn_ln.weight": "mlp.norm.weight",
        "mlp.w3.weight": "mlp.fc2.weight",
    }.items():
        assert report.used[f"blocks.1.{ours}"] == f"blocks.1.{theirs}"


def test_forms_of_the_positions() -> None:
    weights = random(vit())
    table = weights["pos_embed"]  # (1, 1 + 4 * 4, 16)
    grid, report = export(weights, "sam", allow_inexact=True)
    assert torch.equal(grid["pos_embed"][0, 2, 3], table[0, 1 + 2 * 4 + 3])
    assert report.resized == {"pos_embed": ((1, 17, 16), (1, 4, 4, 16))}
    assert report.inexact == {"pos_embed": "class row, which no ViTDet backbone reads"}
    rows, _ = export(weights, "timm", allow_inexact=True)
    assert torch.equal(rows["pos_embed"], table[:, 1:])
    weights["pos_embed"] = table[:, 1:]
    padded, report = export(weights, "hf_vitdet")
    assert torch.equal(padded["embeddings.position_embeddings"][:, 1:], table[:, 1:])
    assert not padded["embeddings.position_embeddings"][:, 0].any()
    assert report.notes == ["pos_embed: class row filled with zeros, no ViTDet backbone reads it"]


def test_timm_keeps_the_class_row_for_a_class_token() -> None:
    weights = random(vit()) | {"cls_token": torch.ones(1, 1, 16)}
    written, report = export(weights, "timm")
    assert written["pos_embed"].shape == (1, 17, 16)
    assert not report.inexact


# --- what a target cannot hold ------------------------------------------------------------------

LOST: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "LayerScale": ("detectron2", lambda: vit(layer_scale=True), "blocks.0.ls1.gamma"),
    "LayerScale of HF": ("hf_vitdet", lambda: vit(layer_scale=True), "blocks.0.ls1.gamma"),
    "propagation": ("sam", lambda: vit(**PROPAGATION, **NO_CLASS_ROW), "blocks.0.residual.conv1"),
    "relative positions": ("timm", lambda: vit(**WINDOWS, **NO_CLASS_ROW), "blocks.0.attn.rel_pos"),
    "class row": ("timm", vit, "class row"),
    "pyramid": ("hf_vitdet", lambda: pyramid(vit()), "simfp_3.0.weight"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_cannot_be_held_is_named_and_needs_the_flag(case: str) -> None:
    target, make, name = LOST[case]
    weights = random(make())
    with pytest.raises(UnaccountedError, match=name.replace(".", r"\.")) as error:
        export(weights, target, source="FILE")
    line = str(error.value)
    assert line.startswith(f"FILE as {target}: expected a place for every weight, got none for ")
    assert line.endswith("--allow-inexact leaves them out.")
    assert "\n" not in line
    assert ("--fold-layer-scale" in line) == case.startswith("LayerScale")
    assert ("--backbone-only" in line) == (case == "pyramid")
    lost = error.value.report.inexact
    written, report = export(weights, target, allow_inexact=True)
    assert report.inexact == lost
    assert set(report.used) | set(lost) == set(weights)
    assert sorted(report.used.values()) == sorted(written)


@pytest.mark.parametrize("target", TARGETS)
def test_backbone_only(target: str) -> None:
    weights = random(pyramid(vit(**NO_CLASS_ROW)))
    written, report = export(weights, target, backbone_only=True)
    outside = {name for name in weights if name.startswith("simfp")}
    assert report.dropped == dict.fromkeys(outside, "outside the backbone (--backbone-only)")
    assert len(written) == len(weights) - len(outside)
    assert not any("simfp" in name for name in written)


def test_every_name_is_in_the_account_once() -> None:
    weights = random(pyramid(vit(layer_scale=True, **PROPAGATION)))
    for target in TARGETS:
        for backbone_only in (False, True):
            _, report = export(weights, target, backbone_only=backbone_only, allow_inexact=True)
            parts = [report.used, report.dropped, report.inexact]
            assert set().union(*parts) == set(weights)
            # the class row is lost and the rest of its table used
            twice = set(report.used) & set(report.inexact)
            assert twice <= {"net.pos_embed"}
            assert sum(map(len, parts)) == len(weights) + len(twice)


def test_other_backbones() -> None:
    names = {"backbone.bottom_up.layers.0.weight": torch.ones(2), "roi_heads.x": torch.ones(1)}
    written, _ = export(names, "detectron2")
    assert written == names
    with pytest.raises(InputError, match=r"FILE as sam: backbone: expected a plain ViT, got names"):
        export(names, "sam", source="FILE")
    with pytest.raises(InputError, match="expected a plain ViT, got an EVA-02"):
        export(random(eva02()), "hf_vitdet")


def test_wrong_target_and_prefix() -> None:
    with pytest.raises(InputError, match=r"expected one of detectron2, .* Did you mean hf_vitdet"):
        export(random(vit()), "hf_vit")
    with pytest.raises(InputError, match="expected a dot at its end, got image_encoder"):
        export(random(vit()), "sam", prefix="image_encoder")


def test_prefix_goes_before_every_name() -> None:
    weights = random(vit(**NO_CLASS_ROW))
    written, report = export(weights, "sam", prefix="image_encoder.")
    assert all(name.startswith("image_encoder.") for name in written)
    assert detect(written) == "sam"
    back, _ = convert(written, shapes(weights))
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    assert report.used["norm" if "norm" in weights else "pos_embed"] == "image_encoder.pos_embed"


def test_rows_left_open_are_noted() -> None:
    open_ = ["roi_heads.box_predictor.cls_score.weight[3,7-9]", "blocks.0.attn.rel_pos_h"]
    _, report = export(random(vit()), "detectron2", initialised=open_)
    assert report.initialised == ["blocks.0.attn.rel_pos_h"]
    assert report.notes == [f"rows without weights are written as zeros: {open_[0]}"]


# --- published names ------------------------------------------------------------------------------

HF = list(published("hf_vitdet")) if CHECKPOINTS.is_dir() else []


@needs_manifests
@pytest.mark.parametrize("item", HF, ids=lambda item: item.name)
def test_transformers_names_are_the_published_ones(item: Any) -> None:
    ours = {
        name.replace("embeddings.position_embeddings", "pos_embed")
        .replace("embeddings.projection", "patch_embed.proj")
        .replace("encoder.layer", "blocks")
        .replace("attention", "attn"): value
        for name, value in item.tensors.items()
    }
    written, _ = export(ours, "hf_vitdet")
    assert shapes(written) == item.shapes()


@needs_manifests
def test_streampetr_file_is_the_one_its_document_makes() -> None:
    from vitdet.convert.direct import rename

    detector = find("eva02_L_coco_det_sys_o365")
    document = find("eva02_L_coco_det_sys_o365_remapped")
    weights, constants, first = rename(detector.content())
    with pytest.raises(UnaccountedError, match=r"78 names|roi_heads|proposal_generator"):
        export(weights, "streampetr", constants=constants)
    written, report = export(weights, "streampetr", constants=constants, allow_inexact=True)
    assert shapes(written) == document.shapes()
    assert all(not name.startswith("backbone.") for name in report.inexact)
    assert first.nested_under == "model"
    # and back, under the names of detectron2
    weights, constants, first = rename(document.content())
    assert first.source_format == "streampetr"
    back, _ = export(weights, "detectron2", constants=constants)
    theirs = {n: s for n, s in detector.shapes().items() if n.startswith("backbone.")}
    assert shapes(back) == theirs


@needs_manifests
def test_streampetr_model_goes_into_its_recipe_backbone() -> None:
    item = find("streampetr_img_backbone_vit_l")
    with torch.device("meta"):
        net = EVA02ViT(embed_dim=1024, depth=24, num_heads=16, img_size=320)
    target = {f"net.{name}": tuple(value.shape) for name, value in net.state_dict().items()}
    adapter = [name for name in item.tensors if ".adapter." in name]
    levels = {name.removeprefix("img_backbone.adapter."): item.shapes()[name] for name in adapter}
    output, report = convert(item.content(), target | levels)
    assert {name: tuple(value.shape) for name, value in output.items()} == target | levels
    assert not report.initialised
    assert {why for why in report.dropped.values()} == {
        "rotary table, computed from the recipe's sizes"
    }
    heads = {"pts_bbox_head.x": torch.ones(1), "img_neck.y": torch.ones(1)}
    _, report = convert({"state_dict": item.tensors | heads}, target | levels)
    assert {report.dropped[name] for name in heads} == {"StreamPETR's own neck and heads"}


# --- other projects' own classes ------------------------------------------------------------------


def image() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 3, 64, 64)


def scaled_down(model: nn.Module) -> Weights:
    """Return random weights small enough for a forward pass to stay near one."""
    return {name: value * 0.2 for name, value in random(model).items()}


def test_transformers_computes_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    ours = vit(**PROPAGATION)
    weights = scaled_down(ours)
    ours.load_state_dict(weights)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 4}
    config = transformers.VitDetConfig(
        **sizes,
        image_size=64,
        pretrain_image_size=64,
        use_relative_position_embeddings=True,
        window_size=2,
        window_block_indices=[0],
        residual_block_indices=[0],
    )
    written, _ = export(weights, "hf_vitdet")
    theirs = transformers.VitDetModel(config).eval()
    theirs.load_state_dict(written)
    with torch.no_grad():
        found = theirs(image()).last_hidden_state
        wanted = ours.eval()(image())["last_feat"]
    assert torch.allclose(found, wanted, atol=1e-5)
    # and what that class saves comes back
    back, _ = convert(theirs.state_dict(), shapes(weights))
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_timm_computes_the_same() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours = vit(layer_scale=True, **NO_CLASS_ROW)
    weights = scaled_down(ours)
    ours.load_state_dict(weights)
    sizes = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 1.0}
    bare = {"class_token": False, "global_pool": "", "num_classes": 0, "final_norm": False}
    theirs = timm.VisionTransformer(**sizes, **bare).eval()
    written, _ = export(weights, "timm")
    theirs.load_state_dict(written)
    with torch.no_grad():
        found = theirs(image()).transpose(1, 2).reshape(1, 16, 4, 4)
        wanted = ours.eval()(image())["last_feat"]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_timm_eva_computes_the_same() -> None:
    timm = pytest.importorskip("timm.models.eva")
    ours = eva02(rope_resize="stretch", mlp_ratio=3, **NO_CLASS_ROW)
    weights = scaled_down(ours)
    ours.load_state_dict(weights)
    theirs = timm.Eva(
        **{"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 3},
        **{"class_token": False, "global_pool": "", "num_classes": 0, "qkv_fused": False},
        **{"swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True},
        **{"ref_feat_shape": (16, 16), "use_fc_norm": False},
    ).eval()
    written, _ = export(weights, "timm")
    kept = {name: value for name, value in theirs.state_dict().items() if name not in written}
    assert set(kept) <= {"norm.weight", "norm.bias"}
    theirs.load_state_dict(written | kept)
    theirs.norm = nn.Identity()
    with torch.no_grad():
        found = theirs(image()).transpose(1, 2).reshape(1, 16, 4, 4)
        wanted = ours.eval()(image())["last_feat"]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_detectron2_takes_its_names() -> None:
    modeling = pytest.importorskip("detectron2.modeling.backbone.vit")
    ours = vit(**PROPAGATION)
    sizes = SIZES | {"norm_layer": lambda c: nn.LayerNorm(c, eps=1e-6)}
    theirs = modeling.ViT(
        **sizes,
        use_rel_pos=True,
        window_size=2,
        window_block_indexes=[0],
        residual_block_indexes=[0],
    ).eval()
    weights = scaled_down(ours)
    ours.load_state_dict(weights)
    written, _ = export(weights, "detectron2")
    theirs.load_state_dict(written)
    with torch.no_grad():
        found = theirs(image())["last_feat"]
        wanted = ours.eval()(image())["last_feat"]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_segment_anything_computes_the_same() -> None:
    encoder = pytest.importorskip("segment_anything.modeling.image_encoder")
    ours = vit(**WINDOWS, **NO_CLASS_ROW)
    weights = scaled_down(ours)
    ours.load_state_dict(weights)
    sizes = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "out_chans": 8}
    theirs = encoder.ImageEncoderViT(
        **sizes,
        norm_layer=lambda c: nn.LayerNorm(c, eps=1e-6),
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    ).eval()
    written, _ = export(weights, "sam")
    neck = {name: value for name, value in theirs.state_dict().items() if name.startswith("neck.")}
    theirs.load_state_dict(written | neck)
    theirs.neck = nn.Identity()
    with torch.no_grad():
        found = theirs(image())
        wanted = ours.eval()(image())["last_feat"]
    assert torch.allclose(found, wanted, atol=1e-5)


# --- the command ----------------------------------------------------------------------------------

RECIPE = """
from detectron2.config import LazyCall as L
from vitdet.backbones.vit import ViT

model = L(ViT)(img_size=64, embed_dim=16, depth=2, num_heads=2, pretrain_img_size=64)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a recipe, a file of ours, one of MAE, and an empty folder for outputs."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    weights = random(vit())
    about = {"format": 1, "source_format": "mae", "initialised": []}
    torch.save({"model": weights, "vitdet": about, "optimizer": {}}, tmp_path / "ours.pth")
    torch.save({"model": weights | {"cls_token": torch.ones(1, 1, 16)}}, tmp_path / "mae.pth")
    (tmp_path / "out").mkdir()
    return tmp_path


def run(folder: Path, source: str, output: str, *words: str) -> int:
    options = ["--source-model", str(folder / source), "--output-model", str(folder / output)]
    return converter.main([*options, *words])


def test_command_without_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = folder / "out" / "report.json"
    words = ["--target-format", "hf_vitdet", "--report", str(report)]
    assert run(folder, "ours.pth", "out/hf.safetensors", *words) == 0
    content = checkpoint.read(folder / "out" / "hf.safetensors")
    weights = random(vit())
    assert detect(content) == "hf_vitdet"
    back, _ = convert(content, shapes(weights))
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    record = json.loads(report.read_text())
    assert record["target_format"] == "hf_vitdet"
    assert record["source_format"] == "vitdet"
    assert record["used"]["pos_embed"] == "embeddings.position_embeddings"
    assert set(record["used"]) == set(weights)
    assert "left out beside the weights: optimizer" in record["notes"]
    assert "format       vitdet (under 'model') to hf_vitdet" in capsys.readouterr().out


def test_command_with_a_recipe_accounts_for_both_steps(folder: Path) -> None:
    report = folder / "out" / "report.json"
    words = ["--config-file", str(folder / "recipe.py"), "--target-format", "sam"]
    words += ["--report", str(report), "model.pretrain_img_size=96"]
    assert run(folder, "mae.pth", "out/sam.pth", *words) == 1
    assert [path.name for path in (folder / "out").iterdir()] == ["report.json"]
    assert json.loads(report.read_text())["inexact"] == {
        "pos_embed": "class row, which no ViTDet backbone reads"
    }
    assert run(folder, "mae.pth", "out/sam.pth", *words, "--allow-inexact") == 0
    record = json.loads(report.read_text())
    assert record["resized"] == {"pos_embed": [[1, 17, 16], [1, 6, 6, 16]]}
    assert record["dropped"] == {"cls_token": "class token: a detector's backbone has none"}
    assert record["used"]["blocks.1.mlp.fc1.bias"] == "blocks.1.mlp.lin1.bias"
    content = checkpoint.read(folder / "out" / "sam.pth")
    assert detect(content) == "sam"
    assert content["pos_embed"].shape == (1, 6, 6, 16)


def test_command_drops_by_the_rules_of_the_source(folder: Path) -> None:
    report = folder / "out" / "report.json"
    words = ["--target-format", "hf_vitdet", "--report", str(report)]
    assert run(folder, "mae.pth", "out/hf.pth", *words) == 0
    assert json.loads(report.read_text())["dropped"] == {
        "cls_token": "class token: a detector's backbone has none"
    }
    # timm has a place for it
    assert run(folder, "mae.pth", "out/timm.pth", "--target-format", "timm") == 0
    written = checkpoint.read(folder / "out" / "timm.pth")
    assert torch.equal(written["cls_token"], torch.ones(1, 1, 16))
    assert written["pos_embed"].shape == (1, 17, 16)


WRONG = {
    "expected a recipe, got none": [],
    "--fold-layer-scale: expected --config-file beside it": [
        *("--target-format", "sam", "--fold-layer-scale")
    ],
    "--target-prefix: expected --target-format beside it": [
        *("--config-file", "{folder}/recipe.py", "--target-prefix", "a.")
    ],
    "Did you mean sam?": ["--target-format", "samm"],
    "Did you mean mae?": ["--target-format", "sam", "--source-format", "maee"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_commands(folder: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.format(folder=folder) for word in WRONG[message]]
    assert run(folder, "ours.pth", "out/x.pth", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list((folder / "out").iterdir()) == []


def test_formats_that_need_a_recipe_say_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, _ = export(random(vit(**NO_CLASS_ROW)), "sam")
    torch.save(written, folder / "sam.pth")
    assert run(folder, "sam.pth", "out/x.pth", "--target-format", "timm") == 2
    assert "whose weights have to be fitted to one. Add --config-file" in capsys.readouterr().err
