"""The way out: names, forms, round trips, and what other projects' own classes make of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.convert import UnaccountedError, convert, export
from vitdet.convert.names import shapes_of
from vitdet.utils.checks import InputError

from .manifests import SIZES, find, needs_manifests, pyramid, random, vit

WINDOWS = {"use_rel_pos": True, "window_size": 2, "global_block_indexes": [1]}
PROPAGATION = WINDOWS | {"residual_block_indexes": [0]}
NO_ROW = {"pretrain_use_cls_token": False}


def eva02(**changes):
    return EVA02ViT(**SIZES | {"pretrain_img_size": 64} | changes)


# (target, our model, every name of which the target can hold)
HELD = [
    ("detectron2", lambda: pyramid(vit(**PROPAGATION), 2)),
    ("detectron2", lambda: pyramid(eva02(inner_attn_norm=True), 2)),
    ("hf_vitdet", lambda: vit(**PROPAGATION)),
    ("hf_vitdet", lambda: vit(**WINDOWS, **NO_ROW)),
    ("hf_vitdet", lambda: vit(use_abs_pos=False)),
    ("sam", lambda: vit(**WINDOWS, **NO_ROW)),
    ("timm", lambda: vit(layer_scale=True, **NO_ROW)),
    ("timm", lambda: eva02(inner_attn_norm=True, **NO_ROW)),
    ("streampetr", lambda: pyramid(eva02(), 4)),
    ("streampetr", lambda: pyramid(eva02(), 5)),
    ("streampetr", eva02),
    ("streampetr", lambda: pyramid(vit(**WINDOWS), 2)),
]


@pytest.mark.parametrize(("target", "make"), HELD)
def test_out_and_in_again_is_the_identity(target, make):
    weights = random(make())
    weights = {name: value.half() if "fc1" in name else value for name, value in weights.items()}
    written, report = export(weights, target)
    assert set(report.used) == set(weights)
    assert sorted(report.used.values()) == sorted(written)
    assert not report.dropped | report.inexact
    back, account = convert(written, shapes_of(weights))
    assert not [*account.initialised, *account.inexact]
    for name, value in weights.items():
        assert torch.equal(back[name], value), name
        assert back[name].dtype == value.dtype


def test_forms_of_the_positions():
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
    padded, report = export(weights | {"pos_embed": table[:, 1:]}, "hf_vitdet")
    assert torch.equal(padded["embeddings.position_embeddings"][:, 1:], table[:, 1:])
    assert not padded["embeddings.position_embeddings"][:, 0].any()
    assert report.notes == ["pos_embed: class row filled with zeros, no ViTDet backbone reads it"]


# --- what a target cannot hold -------------------------------------------------------------------

# target, our model, what the line names, the option that it advises
LOST = {
    "LayerScale": ("detectron2", lambda: vit(layer_scale=True), "ls1.gamma", "--fold-layer-scale"),
    "propagation": ("sam", lambda: vit(**PROPAGATION, **NO_ROW), "blocks.0.residual.conv1", ""),
    "relative positions": ("timm", lambda: vit(**WINDOWS, **NO_ROW), "blocks.0.attn.rel_pos", ""),
    "class row": ("timm", vit, "class row", ""),
    "pyramid": ("hf_vitdet", lambda: pyramid(vit()), "simfp_4.0.weight", "--backbone-only"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_cannot_be_held_is_named_and_needs_the_flag(case):
    target, make, name, option = LOST[case]
    weights = random(make())
    with pytest.raises(UnaccountedError) as error:
        export(weights, target, source="FILE")
    line = str(error.value)
    assert line.startswith(f"FILE as {target}: expected a place for every weight, got none for ")
    assert name in line
    assert option in line
    lost = error.value.report.inexact
    written, report = export(weights, target, allow_inexact=True)
    assert report.inexact == lost
    assert set(report.used) | set(lost) == set(weights)
    assert sorted(report.used.values()) == sorted(written)
    # once in the account, but for a table whose class row is lost
    assert set(report.used) & set(lost) <= {"pos_embed"}


def test_other_backbones_and_formats():
    with pytest.raises(
        InputError, match=r"FILE as sam: backbone: expected .*a plain ViT, got names"
    ):
        export({"backbone.bottom_up.layers.0.weight": torch.ones(2)}, "sam", source="FILE")
    with pytest.raises(InputError, match="expected a plain ViT, got an EVA-02"):
        export(random(eva02()), "hf_vitdet")
    with pytest.raises(InputError, match=r"one of detectron2, .* Did you mean 'hf_vitdet'"):
        export(random(vit()), "hf_vit")


# --- published names -----------------------------------------------------------------------------


@needs_manifests
def test_streampetr_file_is_the_one_its_document_makes():
    detector = find("eva02_L_coco_det_sys_o365")
    document = find("eva02_L_coco_det_sys_o365_remapped")
    weights, first = convert(detector.content(), None)
    with pytest.raises(UnaccountedError, match=r"roi_heads|proposal_generator"):
        export(weights, "streampetr", after=first)
    written, report = export(weights, "streampetr", after=first, allow_inexact=True)
    assert shapes_of(written) == document.shapes()
    assert all(not name.startswith("backbone.") for name in report.inexact)
    # and back, under the names of detectron2; StreamPETR's own heads are dropped by name
    heads = {"pts_bbox_head.x": torch.ones(1), "img_neck.y": torch.ones(1)}
    weights, first = convert({"state_dict": document.tensors | heads}, None)
    assert "StreamPETR's own neck and heads" in first.constants.values()
    back, report = export(weights, "detectron2", after=first)
    theirs = {n: s for n, s in detector.shapes().items() if n.startswith("backbone.")}
    assert theirs.items() <= shapes_of(back).items()


# --- other projects' own classes -----------------------------------------------------------------


def as_map(tokens):
    return tokens.transpose(1, 2).reshape(1, 16, 4, 4)


def theirs(target):
    """Return another project's model, without what stands behind the blocks."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    windows = SIZES | {"norm_layer": norm, "use_rel_pos": True, "window_size": 2}
    if target == "detectron2":
        modeling = pytest.importorskip("detectron2.modeling.backbone.vit")
        sizes = {"pretrain_img_size": 64, "window_block_indexes": [0]}
        return modeling.ViT(**windows, **sizes, residual_block_indexes=[0])
    if target == "sam":
        encoder = pytest.importorskip("segment_anything.modeling.image_encoder")
        model = encoder.ImageEncoderViT(**windows, out_chans=8, global_attn_indexes=(1,))
        model.neck = nn.Identity()
        return model
    if target == "hf_vitdet":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"image_size": 64, "pretrain_image_size": 64, "window_size": 2, "mlp_ratio": 4}
        sizes |= {"window_block_indices": [0], "residual_block_indices": [0]}
        config = transformers.VitDetConfig(**sizes, use_relative_position_embeddings=True)
        return transformers.VitDetModel(config)
    bare = {"class_token": False, "global_pool": "", "num_classes": 0}
    if target == "timm":
        timm = pytest.importorskip("timm.models.vision_transformer")
        return timm.VisionTransformer(**SIZES, **bare, init_values=1.0, final_norm=False)
    bare |= {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True}
    bare |= {"mlp_ratio": 3, "ref_feat_shape": (16, 16), "use_fc_norm": False}
    model = pytest.importorskip("timm.models.eva").Eva(**SIZES, **bare)
    model.norm = nn.Identity()
    return model


THEIRS = {
    "detectron2": (lambda: vit(**PROPAGATION), lambda found: found["last_feat"]),
    "sam": (lambda: vit(**WINDOWS, **NO_ROW), lambda found: found),
    "hf_vitdet": (lambda: vit(**PROPAGATION), lambda found: found.last_hidden_state),
    "timm": (lambda: vit(layer_scale=True, **NO_ROW), as_map),
    "timm Eva": (lambda: eva02(rope_resize="stretch", mlp_ratio=3, **NO_ROW), as_map),
}


@pytest.mark.slow  # their imports
@pytest.mark.parametrize("target", THEIRS)
def test_other_projects_compute_the_same(target):
    """Our weights in their class: it computes what our model does, and they come back."""
    make, read = THEIRS[target]
    ours, model = make(), theirs(target)
    weights = {name: value * 0.2 for name, value in random(ours).items()}
    ours.load_state_dict(weights)
    model.eval().load_state_dict(export(weights, target.split(maxsplit=1)[0])[0])
    torch.manual_seed(1)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours.eval()(image)
        assert torch.allclose(read(model(image)), expected["last_feat"], atol=1e-5)
    fmt = "timm" if target == "timm" else None  # without its last norm
    back, _ = convert(model.state_dict(), shapes_of(weights), source_format=fmt)
    assert all(torch.equal(back[name], value) for name, value in weights.items())
