"""Stages of the Vision Longformer: the ARCH string, the same as lists, errors."""

from __future__ import annotations

import pytest

from vitdet.backbones.msvit import MsViT
from vitdet.backbones.msvit.arch import Stage, parse_arch, stages_of
from vitdet.utils.checks import InputError

SMALL = (
    "l1,h3,d96,n1,s1,g1,p4,f7,a0_l2,h3,d192,n2,s1,g1,p2,f7,a0_"
    "l3,h6,d384,n8,s1,g1,p2,f7,a0_l4,h12,d768,n1,s1,g0,p2,f7,a0"
)
TOY = "l1,h1,d8,n1,s1,g1,p4,f3_l2,h2,d16,n2,s1,g1,p2,f2_l3,h2,d16,n1,s1,g0,p2,f2"


def test_arch_string_of_the_small_size():
    lists = stages_of(
        embed_dim=[96, 192, 384, 768],
        depth=[1, 2, 8, 1],
        num_heads=[3, 3, 6, 12],
        patch_size=[4, 2, 2, 2],
        num_global_tokens=[1, 1, 1, 0],
        attention="vil",
        attention_size=7,
        use_abs_pos=False,
    )
    assert parse_arch(SMALL) == lists
    assert lists[2] == Stage(384, 8, 6, 2, 1, "vil", 7, False)
    assert all(stage.use_rel_pos for stage in lists)


def test_defaults_of_an_arch_string():
    first, second, third = parse_arch("l1_l2,d96_l3,a0", "srformer")
    assert first == Stage(192, 1, 3, 2, 1, "srformer", 7, True)
    assert second.embed_dim == 96
    assert not third.use_abs_pos
    assert not third.use_rel_pos  # srformer has none


def test_full_attention_is_a_matter_of_one_stage():
    """In the published code s0 makes every later stage full too."""
    stages = parse_arch(TOY.replace("n2,s1", "n2,s0"), "performer")
    assert [stage.attention for stage in stages] == ["performer", "full", "performer"]


def test_string_and_lists_give_one_model():
    a = MsViT(arch=TOY, img_size=64, out_features=["layer3"])
    b = MsViT(
        embed_dim=[8, 16, 16],
        depth=[1, 2, 1],
        num_heads=[1, 2, 2],
        patch_size=[4, 2, 2],
        num_global_tokens=[1, 1, 0],
        attention_size=[3, 2, 2],
        img_size=64,
        out_features=["layer3"],
    )
    assert a.stages == b.stages
    shapes = [{n: v.shape for n, v in model.state_dict().items()} for model in (a, b)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("arch", "text"),
    [
        ("l1,h3_l2,x3_l3", r"ARCH, stage 2: expected a letter of l, h, .*, got 'x3'. Write it"),
        ("l1,h_l2_l3", r"ARCH, stage 1: .* and a number, got 'h'"),
        ("l1,,h3_l2_l3", r"ARCH, stage 1: .*, got ''"),
        ("l1,h3,h4_l2_l3", r"ARCH, stage 1: expected each letter once, got 'l1,h3,h4'"),
        ("l1_l3_l2", r"ARCH, stage 2: expected l2, got l3"),
        ("l1_l2", r"ARCH: expected 3 or 4 stages, got 2"),
        ("l1_l2,s2_l3", r"ARCH, stage 2: expected s0 or s1, got s2"),
        ("l1_l2,a7_l3", r"ARCH, stage 2: expected a0 or a1, got a7"),
        ("l1_l2,h5_l3", r"num_heads: expected a divisor of embed_dim 192, got 5"),
        ("l1_l2,n0_l3", r"depth: expected at least 1, got 0"),
        ("l1_l2,d9,h3_l3", r"embed_dim: expected an even number with absolute .*, got 9"),
    ],
)
def test_wrong_arch_strings(arch, text):
    with pytest.raises(InputError, match=text) as error:
        parse_arch(arch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"depth": [1, 2]}, r"stages: expected lists of one length, got embed_dim 3, .*depth 2"),
        ({"embed_dim": 8, "num_heads": 2, "depth": 1}, r"stages: .*, got no list"),
        ({"attention": "vill"}, r"attention: expected one of vil, full, .* Did you mean 'vil'\?"),
        ({"attention": ["vil", "vil", "sr"]}, r"attention: expected one of .*, got 'sr'"),
        ({"num_global_tokens": -1}, r"num_global_tokens: expected at least 0, got -1"),
        (
            {"attention": "only_global", "num_global_tokens": [1, 1, 0]},
            r"num_global_tokens: expected at least 1 for only_global, got 0",
        ),
        ({"out_features": ["layer4"]}, r"out_features: expected some of layer1, layer2, layer3"),
        ({"out_features": []}, r"out_features: expected some of"),
        ({"num_classes": 5}, r"classifier: expected both classes and the output 'head'"),
        ({"out_features": ["layer3", "head"]}, r"classifier: .*num_classes 0 and out_features"),
        ({"frozen_stages": [0]}, r"frozen_stages: expected numbers from 1 to 3, got \[0\]"),
        ({"checkpoint_blocks": [3]}, r"checkpoint_blocks: expected numbers from 0 to 2, got \[3\]"),
        ({"exact": 2}, r"exact and mode: .*got exact 2, mode 0"),
        ({"sliding_chunk_backend": "cuda"}, r"sliding-chunk backend: expected one of auto, "),
        ({"attention_backend": "cuda"}, r"attention backend: expected one of auto, eager"),
        ({"arch": TOY}, r"MsViT: expected arch, or lists of one value a stage, got embed_dim, "),
        (
            {"arch": TOY, "embed_dim": None, "depth": None, "num_heads": None}
            | {"attention": ["vil", "full", "full"]},
            r"MsViT: expected arch, .* got attention=\['vil', 'full', 'full'\]",
        ),
    ],
)
def test_wrong_arguments(changes, text):
    arguments = dict(embed_dim=[8, 8, 8], depth=[1, 1, 1], num_heads=[2, 2, 2])
    arguments["out_features"] = ["layer3"]
    with pytest.raises(InputError, match=text) as error:
        MsViT(**arguments | changes)
    assert "\n" not in str(error.value)
