"""Vision Longformer files: values of splits, copies and stretched tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitdet.backbones.msvit import MsViT
from vitdet.convert import convert, detect
from vitdet.convert.names import shapes_of
from vitdet.convert.report import Report
from vitdet.utils.checks import InputError

TOY: dict[str, Any] = {"embed_dim": [8, 8, 16], "depth": [1, 1, 1], "num_heads": [2, 2, 4]}
TOY |= {"patch_size": [4, 2, 2], "num_global_tokens": [1, 1, 0], "attention_size": [3, 2, 2]}
TOY |= {"use_abs_pos": [True, False, False], "img_size": 64, "out_features": ["layer3"]}
State = dict[str, torch.Tensor]


def toy(**changes: Any) -> MsViT:
    torch.manual_seed(0)
    net = MsViT(**TOY | changes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    return net


def from_to(source: MsViT | State, target: MsViT, **options: Any) -> tuple[State, Report]:
    """Convert, as a classifier's file."""
    state = source.state_dict() if isinstance(source, MsViT) else source
    content = {"net": {f"module.{name}": value for name, value in state.items()}}
    return convert(content, shapes_of(target.state_dict()), **options)


def test_fused_weights_are_split_and_copied_for_global_tokens() -> None:
    full, sparse = toy(attention="full"), toy(share_global_weights=False)
    fused = full.get_submodule("layer1.1.attn.qkv")
    state, report = from_to(full, sparse)
    for ending, parameter in fused.named_parameters():
        for suffix in ("", "_global"):
            query = state[f"layer1.1.attn.query{suffix}.{ending}"]
            assert torch.equal(query, parameter[:8])
            assert torch.equal(state[f"layer1.1.attn.kv{suffix}.{ending}"], parameter[8:])
    proj = full.get_submodule("layer1.1.attn.proj").weight
    assert torch.equal(state["layer1.1.attn.proj_global.weight"], proj)
    assert report.made["layer1.1.attn.kv_global.bias"] == ["layer1.1.attn.qkv.bias"]
    assert "layer3.1.attn.query_global.weight" not in state  # that stage has no global tokens
    back, _ = from_to(state, toy(attention="full"), allow_inexact=True)
    assert torch.equal(back["layer1.1.attn.qkv.weight"], fused.weight)


def test_copies_for_global_tokens_are_made_and_must_be_equal_to_go() -> None:
    own = toy(share_global_weights=False)
    state, _ = from_to(toy(), own)
    parts = [f"layer{i}.1.attn.{name}" for i in (1, 2) for name in ("query", "kv", "proj")]
    for part in parts:
        assert torch.equal(state[f"{part}_global.weight"], state[f"{part}.weight"])
    _, report = from_to(state, toy())
    assert len(report.dropped) == 12
    assert not report.inexact
    with pytest.raises(InputError, match=r"share those of the others; these differ \(layer"):
        from_to(own, toy())
    _, report = from_to(own, toy(), allow_inexact=True)
    assert len(report.inexact) == 12


def test_what_one_global_token_has_is_repeated() -> None:
    one, three = toy(), toy(num_global_tokens=[3, 2, 0])
    state, report = from_to(one, three)
    source = one.state_dict()
    # The published converter repeats the token and leaves its positions and biases out.
    for name in ("layer1.0.cls_token", "layer1.0.cls_pos_embed"):
        assert torch.equal(state[name], source[name].expand(1, 3, 8))
    for name in ("g2l_relative_position_bias", "g2g_relative_position_bias"):
        full = state[f"layer2.1.attn.{name}"]
        assert torch.equal(full, source[f"layer2.1.attn.{name}"].expand(full.shape))
    assert report.resized["layer1.0.cls_pos_embed"] == ((1, 1, 8), (1, 3, 8))
    with pytest.raises(InputError, match=r"shape of .*cls_token"):
        from_to(three, toy(num_global_tokens=[2, 2, 0]))


def test_positions_are_stretched() -> None:
    small, large = toy(), toy(img_size=96, attention_size=[3, 3, 2])
    state, report = from_to(small, large)
    source = small.state_dict()
    line = source["layer1.0.x_pos_embed"]
    expected = F.interpolate(line.mT[..., None], size=(24, 1), mode="bilinear")[..., 0].mT
    torch.testing.assert_close(state["layer1.0.x_pos_embed"], expected)
    name = "layer2.1.attn.local_relative_position_bias_table"
    square = source[name].view(1, 7, 7, 2).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(11, 11), mode="bilinear")
    torch.testing.assert_close(state[name], expected.permute(0, 2, 3, 1).reshape(121, 2))
    assert set(report.resized) == {"layer1.0.x_pos_embed", "layer1.0.y_pos_embed", name}
    odd = source | {name: torch.zeros(48, 2)}
    with pytest.raises(InputError, match="position table: expected a square, got 48 rows"):
        from_to(odd, toy())


def test_linformer_projections_are_stretched_over_the_map() -> None:
    changes: dict[str, Any] = {"attention": "linformer", "attention_size": 4}
    state, _ = from_to(toy(**changes), toy(**changes, img_size=96, share_kv=False))
    source = toy(**changes).state_dict()["layer1.1.attn.proj_k"]
    square = source[1:].view(1, 16, 16, 4).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(24, 24), mode="bilinear").permute(0, 2, 3, 1)
    for name in ("proj_k", "proj_v"):
        made = state[f"layer1.1.attn.{name}"]
        assert torch.equal(made[0], source[0])  # of the global token
        torch.testing.assert_close(made[1:], expected.reshape(576, 4))


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ({"use_abs_pos": True}, {"use_abs_pos": False}, r"2 of its weights|its weights are not"),
        ({}, {"num_global_tokens": 0}, r"a place for global tokens .*cls_token"),
        ({"attention": "srformer"}, {"attention": "vil"}, r"keys have no place .*proj_sr"),
        ({}, {"attention": "performer"}, r"its weights are not in the file .*projection_matrix"),
    ],
)
def test_other_models_are_refused(
    source: dict[str, Any], target: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        from_to(toy(**source), toy(**target))


def test_the_output_of_the_published_converter_is_recognised() -> None:
    state = {f"backbone.bottom_up.{name}": value for name, value in toy().state_dict().items()}
    assert detect({"model": state}) == "vil_det"
    assert detect(dict(toy().state_dict())) == "vil"
