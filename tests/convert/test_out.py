"""The way out: names, forms, round trips, and what other projects' own classes make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import converter
from vitdet import checkpoint
from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT
from vitdet.convert import TARGETS, Report, UnaccountedError, convert, detect, export
from vitdet.convert.names import shapes_of
from vitdet.convert.out import nest
from vitdet.pyramid import SimpleFeaturePyramid
from vitdet.utils.checks import InputError

from .manifests import find, needs_manifests

Weights = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2}
WINDOWS = {"use_rel_pos": True, "window_size": 2, "global_block_indexes": [1]}
PROPAGATION = WINDOWS | {"residual_block_indexes": [0]}
NO_ROW = {"pretrain_use_cls_token": False}


def random(model: nn.Module) -> Weights:
    """Return random weights for a model, a buffer's among them."""
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def vit(**changes: Any) -> ViT:
    return ViT(**SIZES | {"pretrain_img_size": 64} | changes)


def eva02(**changes: Any) -> EVA02ViT:
    return EVA02ViT(**SIZES | {"pretrain_img_size": 64} | changes)


def pyramid(net: nn.Module, levels: int = 2) -> SimpleFeaturePyramid:
    scales = [4.0, 2.0, 1.0, 0.5, 0.25][:levels]
    return SimpleFeaturePyramid(
        net, out_channels=8, scale_factors=scales, downsample="conv", square_pad=0
    )


# (target, our model, every name of which the target can hold)
HELD: list[tuple[str, Callable[[], nn.Module]]] = [
    ("detectron2", lambda: vit(**PROPAGATION)),
    ("detectron2", lambda: pyramid(vit(**PROPAGATION))),
    ("detectron2", lambda: pyramid(eva02(inner_attn_norm=True))),
    ("hf_vitdet", lambda: vit(**PROPAGATION)),
    ("hf_vitdet", lambda: vit(**WINDOWS, **NO_ROW)),
    ("hf_vitdet", lambda: vit(use_abs_pos=False)),
    ("sam", lambda: vit(**WINDOWS, **NO_ROW)),
    ("timm", lambda: vit(layer_scale=True, **NO_ROW)),
    ("timm", lambda: eva02(inner_attn_norm=True, **NO_ROW)),
    ("streampetr", lambda: pyramid(eva02(), 4)),
    ("streampetr", lambda: pyramid(eva02(), 5)),
    ("streampetr", eva02),
    ("streampetr", lambda: pyramid(vit(**WINDOWS))),
]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("target", "make"), HELD)
def test_out_and_in_again_is_the_identity(
    target: str, make: Callable[[], nn.Module], suffix: str, tmp_path: Path
) -> None:
    weights = random(make())
    weights = {name: value.half() if "fc1" in name else value for name, value in weights.items()}
    written, report = export(weights, target)
    assert set(report.used) == set(weights)
    assert sorted(report.used.values()) == sorted(written)
    assert not report.dropped | report.inexact
    path = tmp_path / f"out{suffix}"
    checkpoint.write(path, nest(written, target, flat=suffix == ".safetensors"))
    content = checkpoint.read(path)
    assert "vitdet" not in content
    back, account = convert(content, shapes_of(weights))
    assert not [*account.initialised, *account.inexact]
    for name, value in weights.items():
        assert torch.equal(back[name], value), name
        assert back[name].dtype == value.dtype


@pytest.mark.parametrize("target", TARGETS)
def test_backbones_alone(target: str) -> None:
    weights = random(pyramid(vit(**NO_ROW)))
    written, report = export(weights, target, backbone_only=True)
    outside = {name for name in weights if name.startswith("simfp")}
    assert report.dropped == dict.fromkeys(outside, "outside the backbone (--backbone-only)")
    assert len(written) == len(weights) - len(outside)
    assert not any("simfp" in name for name in written)


def test_forms_of_the_positions() -> None:
    weights = random(vit())
    table = weights["pos_embed"]  # (1, 1 + 4 * 4, 16)
    grid, report = export(weights, "sam", allow_inexact=True)
    assert torch.equal(grid["pos_embed"][0, 2, 3], table[0, 1 + 2 * 4 + 3])
    assert report.resized == {"pos_embed": ((1, 17, 16), (1, 4, 4, 16))}
    assert report.inexact == {"pos_embed": "class row, which no ViTDet backbone reads"}
    rows, _ = export(weights, "timm", allow_inexact=True)
    assert torch.equal(rows["pos_embed"], table[:, 1:])
    written, report = export(weights | {"cls_token": torch.ones(1, 1, 16)}, "timm")
    assert torch.equal(written["pos_embed"], table)  # with a token to read the row
    assert not report.inexact
    weights["pos_embed"] = table[:, 1:]
    padded, report = export(weights, "hf_vitdet")
    assert torch.equal(padded["embeddings.position_embeddings"][:, 1:], table[:, 1:])
    assert not padded["embeddings.position_embeddings"][:, 0].any()
    assert report.notes == ["pos_embed: class row filled with zeros, no ViTDet backbone reads it"]


# --- what a target cannot hold -------------------------------------------------------------------

LOST: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "LayerScale": ("detectron2", lambda: vit(layer_scale=True), "blocks.0.ls1.gamma"),
    "propagation": ("sam", lambda: vit(**PROPAGATION, **NO_ROW), "blocks.0.residual.conv1"),
    "relative positions": ("timm", lambda: vit(**WINDOWS, **NO_ROW), "blocks.0.attn.rel_pos"),
    "class row": ("timm", vit, "class row"),
    "pyramid": ("hf_vitdet", lambda: pyramid(vit()), "simfp_2.0.weight"),
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
    assert ("--fold-layer-scale" in line) == case.startswith("LayerScale")
    assert ("--backbone-only" in line) == (case == "pyramid")
    lost = error.value.report.inexact
    written, report = export(weights, target, allow_inexact=True)
    assert report.inexact == lost
    assert set(report.used) | set(lost) == set(weights)
    assert sorted(report.used.values()) == sorted(written)
    # once in the account, but for a table whose class row is lost
    assert set(report.used) & set(lost) <= {"pos_embed"}


def test_other_backbones_and_wrong_options() -> None:
    names = {"backbone.bottom_up.layers.0.weight": torch.ones(2), "roi_heads.x": torch.ones(1)}
    written, _ = export(names, "detectron2")
    assert written == names
    with pytest.raises(InputError, match=r"FILE as sam: backbone: expected a plain ViT, got names"):
        export(names, "sam", source="FILE")
    with pytest.raises(InputError, match="expected a plain ViT, got an EVA-02"):
        export(random(eva02()), "hf_vitdet")
    with pytest.raises(InputError, match=r"expected one of detectron2, .* Did you mean hf_vitdet"):
        export(random(vit()), "hf_vit")
    with pytest.raises(InputError, match="expected a dot at its end, got image_encoder"):
        export(random(vit()), "sam", prefix="image_encoder")


def test_prefix_goes_before_every_name() -> None:
    weights = random(vit(**NO_ROW))
    written, report = export(weights, "sam", prefix="image_encoder.")
    assert all(name.startswith("image_encoder.") for name in written)
    assert detect(written) == "sam"
    back, _ = convert(written, shapes_of(weights))
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    assert report.used["pos_embed"] == "image_encoder.pos_embed"


def test_rows_left_open_are_noted() -> None:
    open_ = ["roi_heads.box_predictor.cls_score.weight[3,7-9]", "blocks.0.attn.rel_pos_h"]
    weights = random(vit())
    first = Report("mae", initialised=open_, used={name: name for name in weights})
    _, report = export(weights, "detectron2", after=first)
    assert report.initialised == ["blocks.0.attn.rel_pos_h"]
    assert report.notes == [f"rows without weights are written as zeros: {open_[0]}"]


# --- published names -----------------------------------------------------------------------------


@needs_manifests
@pytest.mark.parametrize("name", ["hf_vitdet_base.residual", "hf_vitdet_huge.backbone"])
def test_transformers_names_are_the_published_ones(name: str) -> None:
    item = find(name)
    ours, first = convert(item.content(), None)
    written, _ = export(ours, "hf_vitdet", after=first)
    assert "blocks.0.attn.qkv.weight" in ours
    assert shapes_of(written) == item.shapes()


@needs_manifests
def test_streampetr_file_is_the_one_its_document_makes() -> None:
    detector = find("eva02_L_coco_det_sys_o365")
    document = find("eva02_L_coco_det_sys_o365_remapped")
    weights, first = convert(detector.content(), None)
    with pytest.raises(UnaccountedError, match=r"78 names|roi_heads|proposal_generator"):
        export(weights, "streampetr", after=first)
    written, report = export(weights, "streampetr", after=first, allow_inexact=True)
    assert shapes_of(written) == document.shapes()
    assert all(not name.startswith("backbone.") for name in report.inexact)
    assert report.nested_under == "model"
    # and back, under the names of detectron2
    weights, first = convert(document.content(), None)
    assert first.source_format == "streampetr"
    back, _ = export(weights, "detectron2", after=first)
    theirs = {n: s for n, s in detector.shapes().items() if n.startswith("backbone.")}
    assert shapes_of(back) == theirs


@needs_manifests
def test_streampetrs_heads_are_dropped_by_name() -> None:
    item = find("streampetr_img_backbone_vit_l")
    heads = {"pts_bbox_head.x": torch.ones(1), "img_neck.y": torch.ones(1)}
    _, report = convert({"state_dict": item.tensors | heads}, None)
    found = {report.constants[report.used[name]] for name in heads}
    assert found == {"StreamPETR's own neck and heads"}


# --- other projects' own classes -----------------------------------------------------------------


def same(ours: Any, theirs: Any, target: str, read: Callable[[Any], Any]) -> None:
    """Load our weights into their class: it computes what our model does, and they come back."""
    weights = {name: value * 0.2 for name, value in random(ours).items()}
    ours.load_state_dict(weights)
    written, _ = export(weights, target)
    theirs.eval().load_state_dict(written)
    torch.manual_seed(1)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(read(theirs(image)), ours.eval()(image)["last_feat"], atol=1e-5)
    fmt = (
        "timm" if target == "timm" and "blocks.0.attn.qkv.bias" in weights else None
    )  # without its last norm
    back, _ = convert(theirs.state_dict(), shapes_of(weights), source_format=fmt)
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def as_map(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(1, 16, 4, 4)


def test_transformers_computes_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 4}
    sizes |= {"image_size": 64, "pretrain_image_size": 64, "window_size": 2}
    sizes |= {"window_block_indices": [0], "residual_block_indices": [0]}
    config = transformers.VitDetConfig(**sizes, use_relative_position_embeddings=True)
    theirs = transformers.VitDetModel(config)
    same(vit(**PROPAGATION), theirs, "hf_vitdet", lambda found: found.last_hidden_state)


def test_timm_computes_the_same() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    bare = {"class_token": False, "global_pool": "", "num_classes": 0, "final_norm": False}
    theirs = timm.VisionTransformer(**SIZES, init_values=1.0, **bare)
    same(vit(layer_scale=True, **NO_ROW), theirs, "timm", as_map)


def test_timm_eva_computes_the_same() -> None:
    timm = pytest.importorskip("timm.models.eva")
    theirs = timm.Eva(
        **SIZES,
        **{"mlp_ratio": 3, "class_token": False, "global_pool": "", "num_classes": 0},
        **{"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True},
        **{"ref_feat_shape": (16, 16), "use_fc_norm": False},
    )
    theirs.norm = nn.Identity()
    same(eva02(rope_resize="stretch", mlp_ratio=3, **NO_ROW), theirs, "timm", as_map)


def test_detectron2_takes_its_names() -> None:
    modeling = pytest.importorskip("detectron2.modeling.backbone.vit")
    sizes = SIZES | {"pretrain_img_size": 64, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    sizes |= {"use_rel_pos": True, "window_size": 2, "window_block_indexes": [0]}
    theirs = modeling.ViT(**sizes, residual_block_indexes=[0])
    same(vit(**PROPAGATION), theirs, "detectron2", lambda found: found["last_feat"])


def test_segment_anything_computes_the_same() -> None:
    encoder = pytest.importorskip("segment_anything.modeling.image_encoder")
    sizes = SIZES | {"out_chans": 8, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    sizes |= {"use_rel_pos": True, "window_size": 2, "global_attn_indexes": (1,)}
    theirs = encoder.ImageEncoderViT(**sizes)
    theirs.neck = nn.Identity()
    same(vit(**WINDOWS, **NO_ROW), theirs, "sam", lambda found: found)


# --- the command ---------------------------------------------------------------------------------

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
    back, _ = convert(content, shapes_of(weights))
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    record = json.loads(report.read_text())
    assert (record["source_format"], record["target_format"]) == ("vitdet", "hf_vitdet")
    assert record["used"]["pos_embed"] == "embeddings.position_embeddings"
    assert set(record["used"]) == set(weights)
    assert "constants" not in record
    assert "left out beside the weights: optimizer" in record["notes"]
    assert "format       vitdet (under 'model') to hf_vitdet" in capsys.readouterr().out


def test_command_with_a_recipe_accounts_for_both_steps(folder: Path) -> None:
    report = folder / "out" / "report.json"
    words = ["--config-file", str(folder / "recipe.py"), "--target-format", "sam"]
    words += ["--report", str(report), "model.pretrain_img_size=96"]
    assert run(folder, "mae.pth", "out/sam.pth", *words) == 1
    assert [path.name for path in (folder / "out").iterdir()] == ["report.json"]
    lost = {"pos_embed": "class row, which no ViTDet backbone reads"}
    assert json.loads(report.read_text())["inexact"] == lost
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
    dropped = {"cls_token": "class token: a detector's backbone has none"}
    assert json.loads(report.read_text())["dropped"] == dropped
    # timm has a place for it
    assert run(folder, "mae.pth", "out/timm.pth", "--target-format", "timm") == 0
    written = checkpoint.read(folder / "out" / "timm.pth")
    assert torch.equal(written["cls_token"], torch.ones(1, 1, 16))
    assert written["pos_embed"].shape == (1, 17, 16)


WRONG = {
    "expected a recipe, got none": [],
    "--fold-layer-scale: expected --config-file beside it": ["--fold-layer-scale"],
    "--target-prefix: expected --target-format": ["--config-file", "R.py", "--target-prefix", "a."],
    "Did you mean mae?": ["--source-format", "maee"],
    "whose weights have to be fitted to one. Add --config-file": ["--source-format", "timm"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_commands(folder: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = WRONG[message]
    target = ["--target-format", "sam"] if words and "--config-file" not in words else []
    assert run(folder, "ours.pth", "out/x.pth", *words, *target) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list((folder / "out").iterdir()) == []
