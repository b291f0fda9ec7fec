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
import safetensors.torch
import torch
from torch import nn

from vitdet.backbones.vit import ViT

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
Weights = dict[str, torch.Tensor]


def weights(depth: int) -> Weights:
    """Return what MAE would save: 28 MB a block."""
    with torch.device("meta"):
        vit = ViT(**SIZES, depth=depth)
    state = {name: torch.ones(value.shape) for name, value in vit.state_dict().items()}
    tokens = {"cls_token": torch.zeros(1, 1, 768), "norm.weight": torch.ones(768)}
    return state | tokens | {"norm.bias": torch.zeros(768)}


def eva(depth: int) -> Weights:
    """Return what timm would save of an EVA-02: our ViT puts q, k and v together."""
    with torch.device("meta"):
        vit = ViT(**SIZES, depth=depth, ffn_layer="swiglu_norm", mlp_ratio=8 / 3)
    result: Weights = {"fc_norm.weight": torch.ones(768)}
    inner = {"w1": "fc1_g", "w2": "fc1_x", "ffn_ln": "norm", "w3": "fc2"}
    state = {name: torch.ones(value.shape) for name, value in vit.state_dict().items()}
    for name, value in state.items():
        if name.endswith("qkv.weight"):
            parts = zip("qkv", value.chunk(3), strict=True)
            result |= {name.replace("qkv", f"{x}_proj"): part.clone() for x, part in parts}
        elif name.endswith("qkv.bias"):
            result |= {name.replace("qkv", f"{x}_proj"): value[:768].clone() for x in "qv"}
        else:
            layer = name.rpartition(".")[0].rpartition(".")[2]
            result[name.replace(f".{layer}.", f".{inner.get(layer, layer)}.")] = value
    return result


def torch_file(depth: int, folder: Path) -> Path:
    torch.save({"model": weights(depth), "epoch": 3}, folder / f"{depth}.pth")
    return folder / f"{depth}.pth"


def safetensors_file(depth: int, folder: Path) -> Path:
    state = weights(depth) | {"head.weight": torch.ones(2, 768), "head.bias": torch.ones(2)}
    safetensors.torch.save_file(state, folder / f"{depth}.safetensors")
    return folder / f"{depth}.safetensors"


def pickle_file(depth: int, folder: Path) -> Path:
    state = {n: v.numpy() for n, v in weights(depth).items() if "norm." not in n and "cls" not in n}
    with (folder / f"{depth}.pkl").open("wb") as file:
        pickle.dump({"model": state, "__author__": "someone"}, file)
    return folder / f"{depth}.pkl"


def joined_file(depth: int, folder: Path) -> Path:
    torch.save(eva(depth), folder / f"{depth}.joined.pth")
    return folder / f"{depth}.joined.pth"


def scaled_file(depth: int, folder: Path) -> Path:
    scales = {f"blocks.{i}.ls{k}.gamma": torch.ones(768) for i in range(depth) for k in (1, 2)}
    torch.save(weights(depth) | scales, folder / f"{depth}.scaled.pth")
    return folder / f"{depth}.scaled.pth"


def archive_file(depth: int, folder: Path) -> Path:
    root = nn.Module()
    for name, value in weights(depth).items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(last, value)
    torch.jit.script(root).save(str(folder / f"{depth}.pt"))
    return folder / f"{depth}.pt"


# file, options of the conversion, options of the model
FILES: dict[str, tuple[Callable[[int, Path], Path], dict[str, object], dict[str, Any]]] = {
    "torch": (torch_file, {}, {}),
    "safetensors": (safetensors_file, {}, {}),
    "pickle": (pickle_file, {}, {}),
    "q, k and v joined": (joined_file, {}, {"ffn_layer": "swiglu_norm", "mlp_ratio": 8 / 3}),
    "LayerScale folded": (
        scaled_file,
        {"source_format": "timm", "fold_layer_scale": True},
        {},
    ),
    "TorchScript": (archive_file, {"source_format": "timm"}, {}),
}


def peak(kind: str, depth: int, folder: Path) -> tuple[int, int]:
    """Return the largest resident size of a conversion and the size of the file, in bytes."""
    make, options, changes = FILES[kind]
    file = make(depth, folder)
    with torch.device("meta"):
        vit = ViT(**SIZES | changes, depth=depth)
    target = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    given = json.dumps({"target": target, "options": options})
    words = [sys.executable, "-c", PROGRAM, str(file), str(folder / "out.pth"), given]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), file.stat().st_size


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The largest resident size with a small file: that of the program."""
    size, file = peak("torch", 1, tmp_path_factory.mktemp("small"))
    return size - file


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
@pytest.mark.parametrize("kind", FILES)
def test_a_conversion_takes_at_most_two_and_a_fifth_of_the_file(
    kind: str, idle: int, tmp_path: Path
) -> None:
    size, file = peak(kind, 7, tmp_path)
    assert file > 190e6
    print(f"{kind}: {(size - idle) / file:.2f} times the file")
    assert size - idle < 2.2 * file
