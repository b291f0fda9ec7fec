"""The golden tests can fail: spoilt models and unknown families are noticed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import nn

from vitdet.backbones import block as block_module
from vitdet.backbones.vit import PlainViT
from vitdet.layers import positions as positions_module
from vitdet.layers.norms import ChannelLayerNorm
from vitdet.layers.parts import Mlp, window_partition, window_reverse

from .build import Mode
from .cases import ABSENT, Case, UnsupportedCase, discover, folder
from .compare import compare
from .families import compare_case

ROOT = folder()

# --- spoilt models are noticed -----------------------------------------------------------------


def setting(kind, attribute, value):
    """Return what sets an attribute in every module of a kind."""

    def spoil(model, _):
        modules = [module for module in model.modules() if isinstance(module, kind)]
        assert modules, f"no {kind.__name__} in the model"
        for module in modules:
            setattr(module, attribute, value)

    return spoil


def scaling(factor, *names):
    """Return what multiplies the parameters with a name in theirs by a number."""

    def spoil(model, _):
        for name, value in model.named_parameters():
            if any(each in name for each in names):
                value.data *= factor(value)

    return spoil


def rel_pos_aligned_corners(_, patch):
    def interpolate(table, **options):
        return F.interpolate(table, **options | {"align_corners": True})

    patch.setattr(positions_module, "F", SimpleNamespace(interpolate=interpolate))


def window_padding_above(_, patch):
    def partition(x, size):
        padded = F.pad(x, (0, 0, -x.shape[2] % size, 0, -x.shape[1] % size, 0))
        return window_partition(padded, size)

    def reverse(windows, size):
        side = windows.shape[1]
        above, left = -size[0] % side, -size[1] % side
        return window_reverse(windows, (size[0] + above, size[1] + left))[:, above:, left:]

    patch.setattr(block_module, "window_partition", partition)
    patch.setattr(block_module, "window_reverse", reverse)


def gradient_cut(model, _):
    model.get_submodule("blocks.2.mlp").register_forward_hook(lambda _, __, output: output.detach())


# what is spoilt, in which public case of detectron2, and keys that have to differ
SPOILT = [
    (setting(nn.LayerNorm, "eps", 1e-5), "vit_small_input", ["last_feat"]),
    (
        scaling(lambda _: 1.01, "blocks.1.mlp.fc1.weight"),
        "vit_small_input",
        ["last_feat", "grad_norm/blocks.1.norm2.weight"],
    ),
    (setting(Mlp, "act_layer", "gelu_tanh"), "vit_plain", ["last_feat"]),
    # (scale * q) . r is q . (scale * r)
    (scaling(lambda table: table.shape[1] ** -0.5, "rel_pos"), "vit_rel_pos", ["extra/blocks.0"]),
    (rel_pos_aligned_corners, "vit_rel_pos_resized", ["extra/blocks.2"]),
    (
        setting(PlainViT, "pos_embed_resize", "bicubic_antialias"),
        "vit_window",
        ["extra/tokens_with_pos"],
    ),
    (window_padding_above, "vit_rel_pos", ["extra/blocks.0", "grad_input"]),
    (scaling(lambda _: 0.0, "blocks.1.residual.norm3."), "vit_residual", ["extra/blocks.1"]),
    (gradient_cut, "vit_plain", ["grad_norm/blocks.2.mlp.fc1.weight", "grad_input"]),
    (setting(ChannelLayerNorm, "eps", 1e-5), "simple_feature_pyramid", ["p2"]),
    (
        setting(DefaultAnchorGenerator, "offset", 0.5),
        "cascade_mask_rcnn",
        ["extra/rpn.anchors.p2"],
    ),
    (
        lambda model, _: setattr(
            model.get_submodule("roi_heads.box_predictor.1").box2box_transform,
            *("weights", (10, 10, 5, 5)),
        ),
        "cascade_mask_rcnn",
        ["extra/box.stage2.proposals"],
    ),
]


@pytest.mark.parametrize(("spoil", "name", "keys"), SPOILT)
def test_spoilt_model_is_noticed(spoil, name, keys, monkeypatch):
    if ROOT is None:
        pytest.skip(ABSENT)
    if f"detectron2/{name}" not in discover(ROOT):
        pytest.skip(f"{ROOT} has no case {name}")
    found = compare_case(
        ROOT, f"detectron2/{name}", Mode("eager"), lambda model: spoil(model, monkeypatch)
    )
    for key in keys:
        assert key in failing(found)
        assert f"\n  {key}: max difference " in found.text()


# --- what is not understood is noticed ---------------------------------------------------------


def test_an_unknown_family_fails(tmp_path):
    (tmp_path / "golden.py").write_text("def load(path):\n    return {'model': 'Swinny'}, {}\n")
    with pytest.raises(UnsupportedCase, match=r"swinny/x: model 'Swinny', known .* are \[\]"):
        compare_case(tmp_path, "swinny/x", Mode())


# --- the comparison itself ---------------------------------------------------------------------


def toy_case(arrays, **info):
    """Make a case with one output y (2, 3) = 0..5, stored whole."""
    y = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = {"y": y, "stats/y": np.array([2.5, y.std(), 5.0]), "grad_norm/w": np.float32(4.0)}
    golden = SimpleNamespace(image=lambda _, shape: np.zeros(shape, np.float32))
    defaults = {"outputs": {"y": [2, 3]}, "extra": {}, "subsampled": {"stride": {}}, "loss": 0.0}
    defaults |= {"parameters_without_grad": []}
    return Case("toy/case", defaults | info, {**stored, **arrays}, golden)


def compare_toy(case, y=None, w=None, **extra):
    if y is None:
        y = torch.arange(6.0).view(2, 3)
    gradients = {"w": torch.full((4,), 2.0) if w is None else w}
    return compare(case, {"y": y}, extra, gradients, [])


def failing(comparison):
    return sorted(each.key for each in comparison.failures)


def test_values_shapes_and_nan():
    assert failing(compare_toy(toy_case({}))) == []
    y = torch.arange(6.0).view(2, 3)
    assert failing(compare_toy(toy_case({}), y.view(3, 2))) == ["y"]
    y[1, 0] += 2e-4
    comparison = compare_toy(toy_case({}), y)
    assert failing(comparison) == ["y"]
    assert comparison.text() == (
        "golden case toy/case: 1 of 4 keys differ\n"
        "  y: max difference 0.0002, tolerance 0.0001, at [1, 0]: got 3.0002, stored 3"
    )
    y[0, 0] = torch.nan
    assert failing(compare_toy(toy_case({}), y)) == ["loss", "stats/y", "y"]


def test_stored_keys_must_be_compared():
    case = toy_case({"extra/blocks.0": np.zeros(1, np.float32), "grad_norm/v": np.float32(1)})
    comparison = compare_toy(case)
    assert failing(comparison) == ["extra/blocks.0", "grad_norm/v"]
    assert "vitdet offers nothing to compare" in comparison.text()


def test_gradient_norms_are_relative():
    assert failing(compare_toy(toy_case({}), w=torch.full((4,), 2.00001))) == []
    assert failing(compare_toy(toy_case({}), w=torch.full((4,), 2.0001))) == ["grad_norm/w"]
    off = {"what": "against float64", "grad_norm (largest relative)": 1e-5}  # the stored one too
    inexact = toy_case({}, float32_error=off)
    assert failing(compare_toy(toy_case({}), w=torch.full((4,), 2.00003))) == ["grad_norm/w"]
    assert failing(compare_toy(inexact, w=torch.full((4,), 2.00003))) == []
    assert failing(compare_toy(inexact, w=torch.full((4,), 2.00005))) == ["grad_norm/w"]
    none_stored = toy_case({}, parameters_without_grad=["w"])
    assert failing(compare_toy(none_stored)) == ["grad_norm/w"]


@pytest.mark.parametrize(("moved", "expected"), [(1, []), (5, ["extra/detections.0.scores"])])
def test_near_ties_may_change_order(moved, expected):
    stored = np.linspace(1, 0, 100, dtype=np.float32)
    stats, key = np.array([stored.mean(), stored.std(), 1.0]), "extra/detections.0.scores"
    case = toy_case({key: stored, f"stats/{key}": stats}, extra={"detections.0.scores": [100]})
    got = torch.from_numpy(stored.copy())
    got[[40, 41]] = got[[41, 40]]
    got[50 : 50 + moved] += 0.003  # found nowhere
    extra = {"detections.0.scores": got}
    assert failing(compare_toy(case, **extra)) == expected
