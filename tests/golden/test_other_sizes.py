"""Cases that are not stored: rectangles, other grids, other combinations, from other definitions.

A case is written as the stored ones are, and built from its JSON file alone. What came out is
computed by timm, or by an old EasyCV's network written out in plain torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from .build import Mode
from .cases import ABSENT, folder, read, reader
from .compare import loss_of
from .families import compare_case

timm = pytest.importorskip("timm")
ROOT = folder()
pytestmark = pytest.mark.skipif(ROOT is None, reason=ABSENT)
Weights = dict[str, torch.Tensor]
Network = Callable[[Weights, torch.Tensor], dict[str, torch.Tensor]]


def write_case(root: Path, info: dict[str, Any], network: Network, size: tuple[int, int]) -> str:
    """Run the network forward and backward and write the case; return its name."""
    assert ROOT is not None
    (root / "golden.py").write_text((ROOT / "golden.py").read_text())
    name = f"{info['family']}/case"
    (root / name).parent.mkdir()
    info = {"name": "case", "buffers_not_filled": {}, "extra": {}, "outputs": {}, **info}
    info |= {"input": {"seed": 5, "shape": [2, 3, *size]}, "subsampled": {"stride": {}}}
    info |= {"loss": 0.0, "parameters_without_grad": []}
    info["grad"] = (
        "eval mode, gradients on; loss = sum over outputs k in listed order of "
        "(output_k * golden.image(1000 + k, output_k.shape)).sum()"
    )
    path = (root / name).with_suffix(".json")
    path.write_text(json.dumps(info))
    np.savez(path.with_suffix(".npz"))
    case = read(root, name)
    weights, (image,) = case.weights(), case.images()
    trained = {k: v for k, v in weights.items() if v.is_floating_point() and "running" not in k}
    for value in trained.values():
        value.requires_grad_()
    outputs = network(weights, image)
    case.info["outputs"] = info["outputs"] = {k: list(v.shape) for k, v in outputs.items()}
    loss = loss_of(case, outputs)
    loss.backward()
    info["loss"] = loss.item()
    info["parameters_without_grad"] = [k for k, v in trained.items() if v.grad is None]
    arrays = {**outputs, "grad_input": image.grad}
    stored = {k: v.detach().numpy() for k, v in arrays.items() if v is not None}
    for key, value in list(stored.items()):
        stored[f"stats/{key}"] = np.array([value.mean(), value.std(), np.abs(value).max()])
    norms = {k: v.grad.double().norm().numpy() for k, v in trained.items() if v.grad is not None}
    path.write_text(json.dumps(info))
    np.savez(path.with_suffix(".npz"), **stored, **{f"grad_norm/{k}": v for k, v in norms.items()})
    return name


def check(root: Path, name: str) -> None:
    comparison = compare_case(root, name, Mode())
    assert len(comparison.differences) > 10
    assert not comparison.failures, comparison.text()


# --- timm --------------------------------------------------------------------------------------

_EVA = {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True}
_EVA |= {"use_rot_pos_emb": True}


@pytest.mark.parametrize(
    ("kind", "output", "changes", "size"),
    [
        ("Eva", "tokens", {**_EVA, "ref_feat_shape": [12, 12]}, (96, 160)),
        ("Eva", "tokens", {**_EVA, "ref_feat_shape": None}, (128, 128)),
        ("Eva", "tokens", {**_EVA, "ref_feat_shape": [7, 11], "img_size": [64, 96]}, (64, 96)),
        ("Eva", "map", {**_EVA, "ref_feat_shape": [24, 24], "class_token": False}, (160, 96)),
        (
            "Eva",
            "map",
            {**_EVA, "ref_feat_shape": [8, 5], "class_token": False, "img_size": [96, 64]},
            (112, 80),
        ),
        ("VisionTransformer", "tokens", {"img_size": [64, 96]}, (64, 96)),
        ("VisionTransformer", "map", {"img_size": [96, 48], "class_token": False}, (80, 112)),
    ],
)
def test_timm(kind: str, output: str, changes: Any, size: Any, tmp_path: Path) -> None:
    args = {"img_size": 128, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
    args |= {"num_classes": 0, "global_pool": "", "dynamic_img_size": True, **changes}
    model = getattr(timm.models.eva if kind == "Eva" else timm.models.vision_transformer, kind)
    net = model(**args).eval()

    def network(weights: Weights, image: torch.Tensor) -> dict[str, torch.Tensor]:
        given = {**weights, **dict(net.named_buffers())}
        if output == "tokens":
            call = net.forward_features
            return {"tokens": _functional(net, given, call, image)}

        def last_map(x: torch.Tensor) -> torch.Tensor:
            (found,) = net.forward_intermediates(x, [1], norm=False, intermediates_only=True)
            return found

        return {"map": _functional(net, given, last_map, image)}

    info = {"family": "timm", "model": kind, "config": {"output": output, "args": args}}
    info["config"] |= {"class": kind}
    info["tensors"] = {k: list(v.shape) for k, v in net.named_parameters()}
    check(tmp_path, write_case(tmp_path, info, network, size))


class _Called(torch.nn.Module):
    """A network whose forward is another method of it."""

    def __init__(self, net: torch.nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


def _functional(net: Any, weights: Weights, call: Any, image: torch.Tensor) -> torch.Tensor:
    given = {f"net.{name}": value for name, value in weights.items()}
    return torch.func.functional_call(_Called(net, call), given, (image,))


# --- EasyCV before v0.7 ------------------------------------------------------------------------

_OLD = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
_OLD |= {"qkv_bias": True, "use_abs_pos_emb": True, "interval": 2, "drop_path_rate": 0.1}


def old_tensors(config: dict[str, Any], grid: tuple[int, int]) -> dict[str, list[int]]:
    """Names and shapes of a network of width 16 with heads of 8 channels."""
    attn = config["aggregation"] == "attn"
    found = {"pos_embed": [1, grid[0] * grid[1], 16], "patch_embed.proj.weight": [16, 3, 4, 4]}
    found |= {"patch_embed.proj.bias": [16], "norm.weight": [16], "norm.bias": [16]}
    layers = {"attn.qkv": [48, 16], "attn.proj": [16, 16], "mlp.fc1": [32, 16], "mlp.fc2": [16, 32]}
    layers |= {"norm1": [16], "norm2": [16]}
    for i in range(3):
        shapes = {f"{k}.weight": v for k, v in layers.items()}
        shapes |= {f"{k}.bias": v[:1] for k, v in layers.items()}
        rows = 2 * grid[0] - 1 if attn and i == 1 else 27  # on both axes
        shapes |= {f"attn.rel_pos_{axis}": [rows, 8] for axis in "hw"}
        if not attn and i == 1:
            for k in (1, 2):
                shapes[f"conv_aggregation.conv{k}.weight"] = [16, 16, 3, 3]
                for each in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"conv_aggregation.bn{k}.{each}"] = [16]
        found |= {f"blocks.{i}.{k}": v for k, v in shapes.items()}
    return found


def old_network(weights: Weights, image: torch.Tensor, aggregation: str) -> torch.Tensor:
    """The map (B, 16, H, W) after the last norm."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (16,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def attend(x: torch.Tensor, name: str) -> torch.Tensor:
        B, H, W, _ = x.shape
        q, k, v = linear(x, f"{name}.qkv").view(B, H * W, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q = q * 8**-0.5
        logits = q @ k.mT
        row, column = torch.arange(H * W) // W, torch.arange(H * W) % W
        rows, columns = weights[f"{name}.rel_pos_h"], weights[f"{name}.rel_pos_w"]
        for place, table, side in ((row, rows, H), (column, columns, W)):
            vectors = table[place[:, None] - place[None] + side - 1]  # (L, L, 8)
            logits = logits + torch.einsum("bnqd,qkd->bnqk", q, vectors)
        return linear((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, H, W, 16), f"{name}.proj")

    def windows(x: torch.Tensor, name: str) -> torch.Tensor:
        H, W = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -W % 14, 0, -H % 14))
        rows = [
            torch.cat([attend(part, name) for part in row.split(14, 2)], 2)
            for row in x.split(14, 1)
        ]
        return torch.cat(rows, 1)[:, :H, :W]

    def batch_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        given = (weights[f"{name}.{e}"] for e in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *given)

    patch = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    x = F.conv2d(image, *patch, stride=4).permute(0, 2, 3, 1)
    x = x + weights["pos_embed"].view(1, *x.shape[1:])
    for i in range(3):
        name = f"blocks.{i}"
        whole = aggregation == "attn" and i == 1
        x = x + (attend if whole else windows)(norm(x, f"{name}.norm1"), f"{name}.attn")
        x = x + linear(
            F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2"
        )
        if aggregation != "attn" and i == 1:
            y, name = x.permute(0, 3, 1, 2), f"{name}.conv_aggregation"
            z = F.conv2d(y, weights[f"{name}.conv1.weight"], padding=1)
            z = F.conv2d(
                F.relu(batch_norm(z, f"{name}.bn1")), weights[f"{name}.conv2.weight"], padding=1
            )
            x = F.relu(y + batch_norm(z, f"{name}.bn2")).permute(0, 2, 3, 1)
    return norm(x, "norm").permute(0, 3, 1, 2)


def _counters(aggregation: str) -> dict[str, list[int]]:
    names = [f"blocks.1.conv_aggregation.bn{k}.num_batches_tracked" for k in (1, 2)]
    return {} if aggregation == "attn" else {name: [] for name in names}


@pytest.mark.parametrize(
    ("aggregation", "sides"),
    [("basicblock", (40, 72)), ("basicblock", (72, 40)), ("attn", (64, 40)), ("attn", (56, 56))],
)
def test_old_easycv(aggregation: str, sides: tuple[int, int], tmp_path: Path) -> None:
    grid = sides[0] // 4, sides[1] // 4
    config = {**_OLD, "img_size": list(sides), "aggregation": aggregation}
    info = {"family": "easycv", "model": "ViTDet", "config": config}
    info |= {"tensors": old_tensors(config, grid), "buffers_not_filled": _counters(aggregation)}

    def network(weights: Weights, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": old_network(weights, image, aggregation)}

    check(tmp_path, write_case(tmp_path, info, network, sides))


def _group_norm(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    return F.group_norm(x, 1, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def new_pyramid(weights: Weights, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """EasyCV's SFP of v0.7 on a map of 16 channels, with 8 channels a level."""

    def up(x: torch.Tensor, name: str) -> torch.Tensor:
        kernel = weights[f"neck.{name}.weight"], weights[f"neck.{name}.bias"]
        return F.conv_transpose2d(x, *kernel, stride=2)

    finest = F.gelu(_group_norm(up(x, "sfp_0.0"), weights, "neck.sfp_0.1"))
    maps = [up(finest, "sfp_0.3"), up(x, "sfp_1.0"), x, F.max_pool2d(x, 2)]
    levels = {}
    for k, (level, first) in enumerate(zip(maps, (4, 1, 0, 1), strict=True)):
        name, then = (f"neck.sfp_{k}.{place}" for place in (first, first + 1))
        y = F.conv2d(level, weights[f"{name}.conv.weight"])
        y = F.conv2d(
            _group_norm(y, weights, f"{name}.gn"), weights[f"{then}.conv.weight"], padding=1
        )
        levels[f"p{k + 2}"] = _group_norm(y, weights, f"{then}.gn")
    return levels | {"p6": F.max_pool2d(levels["p5"], 1, 2)}


def test_old_easycv_with_the_new_pyramid(tmp_path: Path) -> None:
    config = {**_OLD, "img_size": [40, 72], "aggregation": "basicblock"}
    neck = {"in_channels": 16, "out_channels": 8, "scale_factors": [4.0, 2.0, 1.0, 0.5]}
    neck |= {"norm_cfg": {"type": "GN", "num_groups": 1, "eps": 1e-6}, "num_outs": 5}
    tensors = {f"backbone.{k}": v for k, v in old_tensors(config, (10, 18)).items()}
    for name, shape in {"0.0": [16, 8, 2, 2], "0.3": [8, 4, 2, 2], "1.0": [16, 8, 2, 2]}.items():
        tensors[f"neck.sfp_{name}.weight"] = shape
        tensors[f"neck.sfp_{name}.bias"] = shape[1:2]
    tensors |= {"neck.sfp_0.1.weight": [8], "neck.sfp_0.1.bias": [8]}
    for k, (width, first) in enumerate(((4, 4), (8, 1), (16, 0), (16, 1))):
        for place, shape in ((first, [8, width, 1, 1]), (first + 1, [8, 8, 3, 3])):
            tensors[f"neck.sfp_{k}.{place}.conv.weight"] = shape
            tensors |= {f"neck.sfp_{k}.{place}.gn.{each}": [8] for each in ("weight", "bias")}
    info = {"family": "easycv", "model": "SFP", "config": {"backbone": config, "neck": neck}}
    info |= {"tensors": tensors}
    info |= {"buffers_not_filled": {f"backbone.{k}": [] for k in _counters("basicblock")}}

    def network(weights: Weights, image: torch.Tensor) -> dict[str, torch.Tensor]:
        inside = {k.removeprefix("backbone."): v for k, v in weights.items()}
        return new_pyramid(weights, old_network(inside, image, "basicblock"))

    check(tmp_path, write_case(tmp_path, info, network, (40, 72)))


# --- conversion --------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(40, 72), (72, 40), (60, 64), (56, 56)])
def test_positions_of_a_converted_file_fill_a_rectangle(sides: Any, tmp_path: Path) -> None:
    """The loader of ViTAE's detectors, on a file of 14 x 14 places and a class row."""
    assert ROOT is not None
    grid = sides[0] // 4, sides[1] // 4
    tensors = old_tensors({"aggregation": "attn"}, (14, 14))
    tensors |= {"pos_embed": [1, 197, 16], "cls_token": [1, 1, 16]}
    tables = [name for name in tensors if "rel_pos" in name]
    tensors = {name: shape for name, shape in tensors.items() if name not in tables}
    fill = reader(ROOT).fill(tensors)
    state = {name: torch.from_numpy(value) for name, value in fill.items() if name != "cls_token"}
    # the published loader takes the sides for the same where their roots are, and leaves it out
    same = int((grid[0] * grid[1]) ** 0.5) == 14
    positions = state.pop("pos_embed")[:, 1:].view(1, 14, 14, 16).permute(0, 3, 1, 2)
    if not same:
        resized = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
        state["pos_embed"] = resized.permute(0, 2, 3, 1).flatten(1, 2)
    (tmp_path / "golden.py").write_text((ROOT / "golden.py").read_text())
    (tmp_path / "vitae_vitdet").mkdir()
    info = {"family": "vitae_vitdet", "name": "case", "model": "checkpoint conversion"}
    info |= {"conversion": True, "config": {**_OLD, "img_size": list(sides)}, "loss": 0.0}
    info |= {"input": {"top_level": "model"}, "tensors": tensors, "extra": {}}
    info |= {"target_keys_left_at_init": [*tables, *(["pos_embed"] if same else [])]}
    info |= {"outputs": {name: list(value.shape) for name, value in state.items()}}
    info |= {"subsampled": {"stride": {}}, "parameters_without_grad": [], "grad": "none"}
    path = tmp_path / "vitae_vitdet/case.json"
    path.write_text(json.dumps(info))
    arrays = {name: value.numpy() for name, value in state.items()}
    stats = {f"stats/{k}": np.array([v.mean(), v.std(), abs(v).max()]) for k, v in arrays.items()}
    np.savez(path.with_suffix(".npz"), **arrays, **stats)
    check(tmp_path, "vitae_vitdet/case")
