"""Cases that are not stored, of rectangles and other grids: timm is run here, forward and backward.

A case is written as the stored ones are, and built from its JSON file alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .build import Mode, leaves_of
from .cases import ABSENT, LOSS, folder, read
from .compare import loss_of
from .families import compare_case

timm = pytest.importorskip("timm")
ROOT = folder()
pytestmark = pytest.mark.skipif(ROOT is None, reason=ABSENT)

_ARGS = {"img_size": 128, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
_ARGS |= {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
_EVA = {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True}
_EVA |= {"use_rot_pos_emb": True}


class _Called(torch.nn.Module):
    """A network whose forward gives tokens, or the map before its last norm."""

    def __init__(self, net: Any, output: str) -> None:
        super().__init__()
        self.net, self.output = net, output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.output == "tokens":
            return self.net.forward_features(x)
        return self.net.forward_intermediates(x, [1], norm=False, intermediates_only=True)[0]


def write_case(root: Path, info: dict[str, Any], net: _Called) -> None:
    """Run the network forward and backward and write the case."""
    assert ROOT is not None
    (root / "golden.py").write_text((ROOT / "golden.py").read_text())
    path = root / "timm/case.json"
    path.parent.mkdir()
    np.savez(path.with_suffix(".npz"))
    path.write_text(json.dumps(info))
    case = read(root, "timm/case")
    leaves, (image,) = leaves_of(case), case.images()
    given = {
        f"net.{name}": value for name, value in (leaves | dict(net.net.named_buffers())).items()
    }
    output = torch.func.functional_call(net, given, (image,))
    outputs = {net.output: output}
    info["outputs"] = case.info["outputs"] = {net.output: list(output.shape)}
    loss = loss_of(case, outputs)
    loss.backward()
    info["loss"] = loss.item()
    info["parameters_without_grad"] = [name for name, x in leaves.items() if x.grad is None]
    assert image.grad is not None
    stored = {net.output: output.detach().numpy(), "grad_input": image.grad.numpy()}
    for key, value in list(stored.items()):
        stored[f"stats/{key}"] = np.array([value.mean(), value.std(), np.abs(value).max()])
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            stored[f"grad_norm/{name}"] = leaf.grad.double().norm().numpy()
    path.write_text(json.dumps(info))
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **stored)


@pytest.mark.parametrize(
    ("kind", "output", "changes", "size"),
    [
        ("Eva", "tokens", {**_EVA, "ref_feat_shape": [12, 12]}, (96, 160)),
        ("Eva", "tokens", {**_EVA, "ref_feat_shape": None}, (128, 128)),
        ("Eva", "tokens", {**_EVA, "ref_feat_shape": [7, 11], "img_size": [64, 96]}, (64, 96)),
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
    args = _ARGS | changes
    module = timm.models.eva if kind == "Eva" else timm.models.vision_transformer
    net = getattr(module, kind)(**args).eval()
    info = {"family": "timm", "name": "case", "model": kind, "buffers_not_filled": {}}
    info |= {"config": {"output": output, "args": args, "class": kind}, "extra": {}, "loss": 0.0}
    info |= {"input": {"seed": 5, "shape": [2, 3, *size]}, "subsampled": {"stride": {}}}
    info |= {"tensors": {k: list(v.shape) for k, v in net.named_parameters()}}
    info |= {"outputs": {}, "parameters_without_grad": [], "grad": LOSS}
    write_case(tmp_path, info, _Called(net, output))
    comparison = compare_case(tmp_path, "timm/case", Mode())
    assert len(comparison.differences) > 10
    assert not comparison.failures, comparison.text()
