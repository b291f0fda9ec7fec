"""How much memory a conversion takes: at most 2.2 times the file."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

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
target = {name: tuple(shape) for name, shape in json.loads(given).items()}
weights, report = convert(checkpoint.read(source), target)
checkpoint.write(output, {"model": weights, "vitdet": report.as_dict()})
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
print(int(peak[1]) * 1024)
"""


def shapes(model, depth, **changes):
    """Return shapes of a model of 28 MB a block."""
    with torch.device("meta"):
        return shapes_of(model(**SIZES, depth=depth, **changes).state_dict())


def peak(depth, folder):
    """Return the largest resident size of a conversion and the size of the file, in bytes.

    The file is a pickle of arrays, with q, k and v apart as timm has them.
    """
    weights = {name: torch.ones(shape) for name, shape in shapes(EVA02ViT, depth).items()}
    written, _ = export(weights, "timm", allow_inexact=True)
    path = folder / "a.pkl"
    path.write_bytes(pickle.dumps({name: value.numpy() for name, value in written.items()}))
    target = json.dumps(shapes(ViT, depth, ffn_layer="swiglu_norm", mlp_ratio=8 / 3))
    words = [sys.executable, "-c", PROGRAM, str(path), str(folder / "out.pth"), target]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), path.stat().st_size


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
def test_a_conversion_takes_at_most_two_and_a_fifth_of_the_file(tmp_path):
    small, small_file = peak(1, tmp_path)
    size, file = peak(5, tmp_path)
    assert file > 130e6
    assert size - (small - small_file) < 2.2 * file
