"""Golden cases: find them and read them.

A case is NAME.json (what was run) and NAME.npz (what came out) in a folder named after its family.
The cases lie outside the project: in the folders VITDET_GOLDEN and VITDET_GOLDEN2, by default
../shared/golden and ../shared/golden2.
"""

from __future__ import annotations

import json
import os
import runpy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parents[2]
DEFAULT_FOLDER = PROJECT.parent / "shared" / "golden"
SECOND_FOLDER = DEFAULT_FOLDER.with_name("golden2")

# Cases that are not built, and why. Every other one is; what no builder knows fails.
NOT_BUILT = {
    "timm/beit_tokens": "full bias table over all pairs of places, which no ViT of vitdet has",
    "c_radio/*": "positions stretched to a square and cut, prefix tokens that windows leave out: "
    "no ViT of vitdet has these",
}


class UnsupportedCase(Exception):  # noqa: N818
    """A case asks for something that these tests do not understand or vitdet does not have."""


def folder(variable="VITDET_GOLDEN", default=DEFAULT_FOLDER):
    """Return the folder of the cases, None when the default one does not exist."""
    named = os.environ.get(variable)
    if named is None:
        return default.resolve() if default.is_dir() else None
    if not Path(named).is_dir():
        raise FileNotFoundError(f"{variable}={named} is not a folder")
    return Path(named).resolve()


def folders():
    """Return both folders, the first None when both are one."""
    first, second = folder(), folder("VITDET_GOLDEN2", SECOND_FOLDER)
    return [first, second] if first != second else [first]


ABSENT = (
    f"no golden cases: {DEFAULT_FOLDER} or {SECOND_FOLDER} does not exist; name the folder that "
    "holds them in the environment variable VITDET_GOLDEN or VITDET_GOLDEN2"
)


def not_built(name):
    """Return why a case is not built, None for the others."""
    return next((why for key, why in NOT_BUILT.items() if fnmatchcase(name, key)), None)


def discover(root):
    """Return the names (family/name) of all cases under `root`, sorted; [] for None."""
    if root is None:
        return []
    files = (path for path in root.rglob("*.json") if path.parent != root)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in files)


@cache
def reader(root):
    """Import golden.py, which makes weights and images, from beside the cases."""
    found = next(p for p in (root / "golden.py", DEFAULT_FOLDER / "golden.py") if p.is_file())
    return SimpleNamespace(**runpy.run_path(str(found)))


@dataclass(frozen=True)
class Case:
    """One case: `info` is the JSON file, `arrays` the NPZ file, `golden` the module golden.py.

    Both formats look like the first one here. `buffers` are stored values that no rule makes.
    """

    name: str
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]
    golden: SimpleNamespace
    buffers: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def family(self):
        """The folder."""
        return self.name.split("/")[0]

    def config(self):
        """Return what the model was built with."""
        return self.info["config"]

    def weights(self):
        """Return every tensor that has a value by the name that the published code gives it.

        Aliases are given too. Buffers that the case leaves as constructed have no value.
        """
        filled = self.golden.fill(self.info["tensors"]) | self.buffers
        tensors = {name: torch.from_numpy(value) for name, value in filled.items()}
        variances = [name for name in tensors if name.endswith(".running_var")]
        tensors |= {name: tensors[name].abs() + 0.5 for name in variances}
        for alias, name in self.info.get("aliases", {}).items():
            tensors[alias] = tensors[name]
        return tensors

    def images(self):
        """Return the inputs, leaves that gather a gradient."""
        spec = self.info["input"]
        return [self._image(each) for each in spec.get("images", [spec])]

    def _image(self, spec):
        value = self.golden.image(spec["seed"], tuple(spec["shape"]))
        value = value * np.float32(spec.get("scale", 1.0)) + np.float32(spec.get("offset", 0.0))
        return torch.from_numpy(value).requires_grad_()


def read(root, name):
    """Read a case that has both files."""
    golden = reader(root)
    info, arrays = golden.load(root / name)
    buffers = {}
    if "stored" in info:
        info, arrays, buffers = _normalised(info, arrays)
    return Case(name, info, arrays, golden, buffers)


def _normalised(info, arrays):
    """Return a case of the second format as one of the first, and its stored buffers.

    The second format has "stored.step" for "subsampled.stride", the numbers about gradients under
    "grad", "output/X" for "X" in the NPZ file, and inputs by name where there are several.
    """
    inputs = [image.get("name") for image in info["input"].get("images", ())]

    def key(old):
        stats, rest = ("stats/", old[6:]) if old.startswith("stats/") else ("", old)
        if rest.startswith("grad_input/"):
            rest = f"grad_input/{inputs.index(rest.removeprefix('grad_input/'))}"
        return stats + rest.removeprefix("output/")

    new = {k: value for k, value in info.items() if k not in ("builder", "stored")}
    new |= {"subsampled": {"stride": {key(k): step for k, step in info["stored"]["step"].items()}}}
    new.setdefault("extra", {})
    new["float32_error"] = {key(k): value for k, value in info.get("float32_error", {}).items()}
    grad = info["grad"]
    if isinstance(grad, dict):
        new |= {"loss": grad["loss_value"]}
        new |= {"parameters_without_grad": grad["parameters_without_grad"]}
    else:
        new |= {"conversion": True, "parameters_without_grad": [], "loss": 0.0}
    buffers = {k[7:]: value for k, value in arrays.items() if k.startswith("buffer/")}
    kept = {key(k): value for k, value in arrays.items() if not k.startswith("buffer/")}
    return new, kept, buffers


def read_info(root, name):
    """Read the JSON file of a case; one of lr_decay has no other."""
    return json.loads((root / name).with_suffix(".json").read_text())
