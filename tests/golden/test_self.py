"""The golden tests can fail: spoilt models, unknown configs and unknown families are noticed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones import block as block_module
from vitdet.backbones.vit import PlainViT
from vitdet.layers import positions as positions_module
from vitdet.layers.norms import ChannelLayerNorm
from vitdet.layers.parts import Mlp, window_partition, window_reverse

from .build import Mode, vit_options
from .cases import ABSENT, Case, Options, UnsupportedCase, discover, folder
from .compare import Comparison, compare
from .families import compare_case

ROOT = folder()

# --- spoilt models are noticed -----------------------------------------------------------------

Patch = pytest.MonkeyPatch


def _set(model: nn.Module, kind: type[nn.Module], attribute: str, value: object) -> None:
    modules = [module for module in model.modules() if isinstance(module, kind)]
    assert modules, f"no {kind.__name__} in the model"
    for module in modules:
        setattr(module, attribute, value)


def norm_eps(model: nn.Module, _: Patch) -> None:
    _set(model, nn.LayerNorm, "eps", 1e-5)


def channel_norm_eps(model: nn.Module, _: Patch) -> None:
    _set(model, ChannelLayerNorm, "eps", 1e-5)


def one_weight(model: nn.Module, _: Patch) -> None:
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] += 1e-2


def tanh_gelu(model: nn.Module, _: Patch) -> None:
    _set(model, Mlp, "act_layer", "gelu_tanh")


def rel_pos_of_scaled_q(model: nn.Module, _: Patch) -> None:
    # (scale * q) . r is q . (scale * r)
    for name, table in model.named_parameters():
        if "rel_pos" in name:
            table.data *= table.shape[1] ** -0.5


def rel_pos_aligned_corners(_: nn.Module, patch: Patch) -> None:
    def interpolate(table: torch.Tensor, **options: Any) -> torch.Tensor:
        options["align_corners"] = True
        return F.interpolate(table, **options)

    patch.setattr(positions_module, "F", SimpleNamespace(interpolate=interpolate))


def pos_embed_antialias(model: nn.Module, _: Patch) -> None:
    _set(model, PlainViT, "pos_embed_resize", "bicubic_antialias")


def window_padding_above(_: nn.Module, patch: Patch) -> None:
    def partition(x: torch.Tensor, size: int) -> torch.Tensor:
        return window_partition(
            F.pad(x, (0, 0, -x.shape[2] % size, 0, -x.shape[1] % size, 0)), size
        )

    def reverse(windows: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        side = windows.shape[1]
        above, left = -size[0] % side, -size[1] % side
        return window_reverse(windows, (size[0] + above, size[1] + left))[:, above:, left:]

    patch.setattr(block_module, "window_partition", partition)
    patch.setattr(block_module, "window_reverse", reverse)


def propagation_left_out(model: nn.Module, _: Patch) -> None:
    for last in ("weight", "bias"):
        model.get_parameter(f"blocks.1.residual.norm3.{last}").data.zero_()


def gradient_cut(model: nn.Module, _: Patch) -> None:
    model.get_submodule("blocks.2.mlp").register_forward_hook(lambda _, __, output: output.detach())


def anchors_moved(model: nn.Module, _: Patch) -> None:
    model.get_submodule("proposal_generator.anchor_generator").offset = 0.5  # pyright: ignore


def stage_weights(model: nn.Module, _: Patch) -> None:
    predictor = model.get_submodule("roi_heads.box_predictor.1")
    predictor.box2box_transform.weights = (10, 10, 5, 5)  # pyright: ignore


# what is spoilt, in which public case, and a key that has to differ
SPOILT: list[tuple[Callable[[nn.Module, Patch], None], str, str]] = [
    (norm_eps, "detectron2/vit_small_input", "last_feat"),
    (one_weight, "detectron2/vit_small_input", "last_feat"),
    (one_weight, "detectron2/vit_small_input", "grad_norm/blocks.1.norm2.weight"),
    (tanh_gelu, "detectron2/vit_plain", "last_feat"),
    (rel_pos_of_scaled_q, "detectron2/vit_rel_pos", "extra/blocks.0"),
    (rel_pos_aligned_corners, "detectron2/vit_rel_pos_resized", "extra/blocks.2"),
    (pos_embed_antialias, "detectron2/vit_window", "extra/tokens_with_pos"),
    (window_padding_above, "detectron2/vit_rel_pos", "extra/blocks.0"),
    (window_padding_above, "detectron2/vit_rel_pos", "grad_input"),
    (propagation_left_out, "detectron2/vit_residual", "extra/blocks.1"),
    (gradient_cut, "detectron2/vit_plain", "grad_norm/blocks.2.mlp.fc1.weight"),
    (gradient_cut, "detectron2/vit_plain", "grad_input"),
    (channel_norm_eps, "detectron2/simple_feature_pyramid", "p2"),
    (anchors_moved, "detectron2/cascade_mask_rcnn", "extra/rpn.anchors.p2"),
    (stage_weights, "detectron2/cascade_mask_rcnn", "extra/box.stage2.proposals"),
]


@pytest.mark.parametrize(
    ("spoil", "name", "key"), SPOILT, ids=[f"{s.__name__}-{n}-{k}" for s, n, k in SPOILT]
)
def test_spoilt_model_is_noticed(
    spoil: Callable[[nn.Module, Patch], None], name: str, key: str, monkeypatch: Patch
) -> None:
    if ROOT is None:
        pytest.skip(ABSENT)
    if name not in discover(ROOT):
        pytest.skip(f"{ROOT} has no case {name}")
    comparison = compare_case(ROOT, name, Mode("eager"), lambda model: spoil(model, monkeypatch))
    assert key in failing(comparison)
    assert f"\n  {key}: max difference " in comparison.text()


# --- what is not understood is noticed ---------------------------------------------------------

INFO = {
    "family": "detectron2",
    "grad": "eval mode, gradients on; loss = sum over outputs k in listed order of "
    "(output_k * golden.image(1000 + k, output_k.shape)).sum()",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, r"swinny/x: unknown keys \['dropout'\] at the top"),
        ({"grad": "train mode"}, "swinny/x: unknown loss 'train mode'"),
        ({"model": "Swinny"}, r"swinny/x: model 'Swinny', known of this family are \[\]"),
    ],
)
def test_unknown_files_and_families_fail(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    stub = f"def load(path):\n    return {INFO | change!r}, {{}}\n"
    (tmp_path / "golden.py").write_text(stub)
    with pytest.raises(UnsupportedCase, match=message):
        compare_case(tmp_path, "swinny/x", Mode())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope": True}, r"place: unknown keys \['rope'\]; known are act_layer, depth, "),
        ({"qkv_bias": 1}, r"place.qkv_bias: expected one of \[True, False\], got 1"),
        ({"act_layer": {"name": "SiLU"}}, r"place.act_layer.name: expected one of \['GELU'\]"),
    ],
)
def test_unknown_config_fails(config: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedCase, match=message):
        vit_options(Options(config, "place"))


# --- the comparison itself ---------------------------------------------------------------------


def toy_case(arrays: Mapping[str, Any], **info: object) -> Case:
    """Make a case with one output y (2, 3) = 0..5, stored whole."""
    y = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = {"y": y, "stats/y": np.array([2.5, y.std(), 5.0]), "grad_norm/w": np.float32(4.0)}
    golden = ModuleType("toy")
    golden.image = lambda _, shape: np.zeros(shape, np.float32)  # pyright: ignore
    defaults = {"outputs": {"y": [2, 3]}, "extra": {}, "subsampled": {"stride": {}}, "loss": 0.0}
    defaults |= {"parameters_without_grad": []}
    return Case("toy/case", defaults | info, {**stored, **arrays}, golden)


def compare_toy(
    case: Case, y: torch.Tensor | None = None, w: torch.Tensor | None = None, **extra: torch.Tensor
) -> Comparison:
    if y is None:
        y = torch.arange(6.0).view(2, 3)
    gradients = {"w": torch.full((4,), 2.0) if w is None else w}
    return compare(case, {"y": y}, extra, gradients, [])


def failing(comparison: Comparison) -> list[str]:
    return sorted(each.key for each in comparison.failures)


def test_values_shapes_and_nan() -> None:
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


def test_stored_keys_must_be_compared() -> None:
    case = toy_case({"extra/blocks.0": np.zeros(1, np.float32), "grad_norm/v": np.float32(1)})
    comparison = compare_toy(case)
    assert failing(comparison) == ["extra/blocks.0", "grad_norm/v"]
    assert "vitdet offers nothing to compare" in comparison.text()


def test_gradient_norms_are_relative() -> None:
    assert failing(compare_toy(toy_case({}), w=torch.full((4,), 2.00001))) == []
    assert failing(compare_toy(toy_case({}), w=torch.full((4,), 2.0001))) == ["grad_norm/w"]
    none_stored = toy_case({}, parameters_without_grad=["w"])
    assert failing(compare_toy(none_stored)) == ["grad_norm/w"]


@pytest.mark.parametrize(("moved", "expected"), [(1, []), (5, ["extra/detections.0.scores"])])
def test_near_ties_may_change_order(moved: int, expected: list[str]) -> None:
    stored = np.linspace(1, 0, 100, dtype=np.float32)
    stats, key = np.array([stored.mean(), stored.std(), 1.0]), "extra/detections.0.scores"
    case = toy_case({key: stored, f"stats/{key}": stats}, extra={"detections.0.scores": [100]})
    got = torch.from_numpy(stored.copy())
    got[[40, 41]] = got[[41, 40]]
    got[50 : 50 + moved] += 0.003  # found nowhere
    extra = {"detections.0.scores": got}
    assert failing(compare_toy(case, **extra)) == expected
