"""Vision Longformer files: values of splits, copies and stretched tables."""

import pytest
import torch
import torch.nn.functional as F

from vitdet.backbones.msvit import MsViT
from vitdet.convert import convert
from vitdet.convert.names import shapes_of
from vitdet.utils.checks import InputError

from .manifests import random

TOY = {"embed_dim": [8, 8, 16], "depth": [1, 1, 1], "num_heads": [2, 2, 4]}
TOY |= {"patch_size": [4, 2, 2], "num_global_tokens": [1, 1, 0], "attention_size": [3, 2, 2]}
TOY |= {"use_abs_pos": [True, False, False], "img_size": 64, "out_features": ["layer3"]}


def toy(**changes):
    return random(MsViT(**TOY | changes))


def to(state, allow_inexact=False, **changes):
    """Convert a classifier's file for another network."""
    content = {"net": {f"module.{name}": value for name, value in state.items()}}
    with torch.device("meta"):
        target = shapes_of(MsViT(**TOY | changes).state_dict())
    return convert(content, target, allow_inexact=allow_inexact)


def stretched(table, side, to):
    square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, size=(to, to), mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)


def test_fused_weights_are_split_and_copied_for_global_tokens():
    full = toy(attention="full")
    state, report = to(full, share_global_weights=False)
    fused = full["layer1.1.attn.qkv.weight"]
    for suffix in ("", "_global"):
        assert torch.equal(state[f"layer1.1.attn.query{suffix}.weight"], fused[:8])
        assert torch.equal(state[f"layer1.1.attn.kv{suffix}.weight"], fused[8:])
    proj = full["layer1.1.attn.proj.weight"]
    assert torch.equal(state["layer1.1.attn.proj_global.weight"], proj)
    assert report.made["layer1.1.attn.kv_global.bias"] == ["layer1.1.attn.qkv.bias"]
    assert "layer3.1.attn.query_global.weight" not in state  # that stage has no global tokens
    back, _ = to(state, attention="full", allow_inexact=True)
    assert torch.equal(back["layer1.1.attn.qkv.weight"], fused)


def test_copies_for_global_tokens_are_made_and_must_be_equal_to_go():
    state, _ = to(toy(), share_global_weights=False)
    for part in (f"layer{i}.1.attn.{name}" for i in (1, 2) for name in ("query", "kv", "proj")):
        assert torch.equal(state[f"{part}_global.weight"], state[f"{part}.weight"])
    _, report = to(state)
    assert (len(report.dropped), len(report.inexact)) == (12, 0)
    own = toy(share_global_weights=False)
    with pytest.raises(InputError, match=r"share those of the others; these differ \(layer"):
        to(own)
    _, report = to(own, allow_inexact=True)
    assert len(report.inexact) == 12


def test_what_one_global_token_has_is_repeated():
    source = toy()
    state, report = to(source, num_global_tokens=[3, 2, 0])
    # The published converter repeats the token and leaves its positions and biases out.
    for name in ("layer1.0.cls_token", "layer1.0.cls_pos_embed"):
        assert torch.equal(state[name], source[name].expand(1, 3, 8))
    for name in ("g2l_relative_position_bias", "g2g_relative_position_bias"):
        full = state[f"layer2.1.attn.{name}"]
        assert torch.equal(full, source[f"layer2.1.attn.{name}"].expand(full.shape))
    assert report.resized["layer1.0.cls_pos_embed"] == ((1, 1, 8), (1, 3, 8))


def test_positions_and_projections_are_stretched():
    source = toy()
    state, report = to(source, img_size=96, attention_size=[3, 3, 2])
    line = source["layer1.0.x_pos_embed"]
    expected = F.interpolate(line.mT[..., None], size=(24, 1), mode="bilinear")[..., 0].mT
    torch.testing.assert_close(state["layer1.0.x_pos_embed"], expected)
    name = "layer2.1.attn.local_relative_position_bias_table"
    torch.testing.assert_close(state[name], stretched(source[name], 7, 11))
    assert set(report.resized) == {"layer1.0.x_pos_embed", "layer1.0.y_pos_embed", name}
    linformer = {"attention": "linformer", "attention_size": 4}
    source = toy(**linformer)
    state, _ = to(source, **linformer, img_size=96, share_kv=False)
    given = source["layer1.1.attn.proj_k"]
    for name in ("proj_k", "proj_v"):
        made = state[f"layer1.1.attn.{name}"]
        assert torch.equal(made[0], given[0])  # of the global token
        torch.testing.assert_close(made[1:], stretched(given[1:], 16, 24))


TABLE = {"layer2.1.attn.local_relative_position_bias_table": torch.zeros(48, 2)}
WRONG = [
    ("of its weights are not in the file", toy(use_abs_pos=True), {"use_abs_pos": False}),
    (r"a place for global tokens .*cls_token", toy(), {"num_global_tokens": 0}),
    (r"keys have no place .*proj_sr", toy(attention="srformer"), {}),
    (r"not in the file .*projection_matrix", toy(), {"attention": "performer"}),
    (r"shape of .*cls_token", toy(num_global_tokens=[3, 2, 0]), {"num_global_tokens": [2, 2, 0]}),
    ("position table: expected a square, got 48 rows", toy() | TABLE, {}),
]


@pytest.mark.parametrize(("text", "source", "target"), WRONG, ids=[case[0] for case in WRONG])
def test_other_models_are_refused(text, source, target):
    with pytest.raises(InputError, match=text):
        to(source, **target)
