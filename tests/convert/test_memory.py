"""How much memory a conversion takes: at most 2.2 times the file."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT
from vitdet.convert import export
from vitdet.convert.names import shapes_of

SIZES = {"img_size": 64, "embed_dim": 768, "num_heads": 12, "pretrain_img_size": 64}
# What the converter does but for the recipe, whose model takes no memory. ru_maxrss would count
# what the process had before it became this program.
PROGRAM = """
import json, re, sys
from pathlib import Path
from vitdet import checkpoint
from vitdet.convert import convert
source, output, given = sys.argv[1:]
given = json.loads(given)
content = checkpoint.read(source)
target = {name: tuple(shape) for name, shape in given["target"].items()}
weights, report = convert(content, target, **given["options"])
checkpoint.write(output, {"model": weights, "vitdet": report.as_dict()})
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
print(int(peak[1]) * 1024)
"""


def ones(model: Any, depth: int, **changes: Any) -> dict[str, torch.Tensor]:
    """Return weights of a model: 28 MB a block."""
    with torch.device("meta"):
        shapes = shapes_of(model(**SIZES, depth=depth, **changes).state_dict())
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def pickled(depth: int, path: Path) -> None:
    arrays = {name: value.numpy() for name, value in ones(ViT, depth).items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))


def folded(depth: int, path: Path) -> None:
    torch.save({"model": ones(ViT, depth, layer_scale=True), "epoch": 3}, path)


def joined(depth: int, path: Path) -> None:
    weights, _ = export(ones(EVA02ViT, depth), "timm", allow_inexact=True)
    torch.save(weights, path)


# what writes a file, its suffix, options of the conversion, options of the model
FILES: dict[str, tuple[Callable[[int, Path], None], str, dict[str, object], dict[str, Any]]] = {
    "pickle": (pickled, ".pkl", {}, {}),
    "LayerScale folded": (folded, ".pth", {"fold_layer_scale": True}, {}),
    "q, k and v joined": (joined, ".pth", {}, {"ffn_layer": "swiglu_norm", "mlp_ratio": 8 / 3}),
}


def peak(kind: str, depth: int, folder: Path) -> tuple[int, int]:
    """Return the largest resident size of a conversion and the size of the file, in bytes."""
    write, suffix, options, changes = FILES[kind]
    file = folder / f"{depth}{suffix}"
    write(depth, file)
    with torch.device("meta"):
        target = shapes_of(ViT(**SIZES | changes, depth=depth).state_dict())
    given = json.dumps({"target": target, "options": options})
    words = [sys.executable, "-c", PROGRAM, str(file), str(folder / "out.pth"), given]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), file.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
def test_a_conversion_takes_at_most_two_and_a_fifth_of_the_file(tmp_path: Path) -> None:
    small, file = peak("pickle", 1, tmp_path)
    for kind in FILES:
        size, file_size = peak(kind, 5, tmp_path)
        assert file_size > 130e6
        print(f"{kind}: {(size - small + file) / file_size:.2f} times the file")
        assert size - (small - file) < 2.2 * file_size, kind
