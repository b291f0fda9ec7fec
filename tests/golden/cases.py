"""Golden cases: find them, read them, and say no to what is not understood.

A case is NAME.json (what was run) and NAME.npz (what came out) in a folder named after its family.
The cases lie outside the project: in the folders VITDET_GOLDEN and VITDET_GOLDEN2, by default
../shared/golden and ../shared/golden2.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import ModuleType
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

# What says something about the run; the others, below, are for the reader.
_JSON_KEYS = frozenset(
    {"family", "name", "model", "config", "input", "tensors", "buffers_not_filled", "aliases"}
    | {"outputs", "extra", "subsampled", "grad", "loss", "parameters_without_grad"}
    | {"source", "call", "buffers_not_filled_note", "aliases_note", "extra_note", "stats", "notes"}
    | {"float32_error", "float32_error_note", "environment"}
    # Of conversions: what the published converter does not write, and what its source holds beside.
    | {"conversion", "target_keys_left_at_init", "model_keys_not_written", "output_top_level"}
    | {"output_shape_differs_from_model", "source_aliases", "source_integer_tensors"}
)
LOSS = (
    "eval mode, gradients on; loss = sum over outputs k in listed order of "
    "(output_k * golden.image(1000 + k, output_k.shape)).sum()"
)
_SECOND_LOSS = (
    "sum over the entries of outputs in listed order, k = 0, 1, ..., of "
    "(output_k * golden.image(1000 + k, output_k.shape)).sum(); eval mode, then backward()"
)


class UnsupportedCase(Exception):  # noqa: N818 (it is the case that is unsupported)
    """A case asks for something that these tests do not understand or vitdet does not have."""


def folder(variable: str = "VITDET_GOLDEN", default: Path = DEFAULT_FOLDER) -> Path | None:
    """Return the folder of the cases, None when the default one does not exist."""
    named = os.environ.get(variable)
    if named is None:
        return default.resolve() if default.is_dir() else None
    if not Path(named).is_dir():
        raise FileNotFoundError(f"{variable}={named} is not a folder")
    return Path(named).resolve()


def folders() -> list[Path | None]:
    """Return both folders, the first None when both are one."""
    first, second = folder(), folder("VITDET_GOLDEN2", SECOND_FOLDER)
    return [first, second] if first != second else [first]


ABSENT = (
    f"no golden cases: {DEFAULT_FOLDER} or {SECOND_FOLDER} does not exist; name the folder that "
    "holds them in the environment variable VITDET_GOLDEN or VITDET_GOLDEN2"
)


def not_built(name: str) -> str | None:
    """Return why a case is not built, None for the others."""
    return next((why for key, why in NOT_BUILT.items() if fnmatchcase(name, key)), None)


def discover(root: Path | None) -> list[str]:
    """Return the names (family/name) of all cases under `root`, sorted; [] for None."""
    if root is None:
        return []
    files = (path for path in root.rglob("*.json") if path.parent != root)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in files)


@cache
def reader(root: Path) -> ModuleType:
    """Import golden.py, which makes weights and images, from beside the cases."""
    found = next(p for p in (root / "golden.py", DEFAULT_FOLDER / "golden.py") if p.is_file())
    spec = importlib.util.spec_from_file_location("golden_reader", found)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Case:
    """One case: `info` is the JSON file, `arrays` the NPZ file, `golden` the module golden.py.

    Both formats look like the first one here. `buffers` are stored values that no rule makes.
    """

    name: str
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]
    golden: ModuleType
    buffers: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The folder."""
        return self.name.split("/")[0]

    def config(self) -> Options:
        """Return the config, every key of which has to be used."""
        return Options(self.info["config"], f"{self.name}: config")

    def weights(self) -> dict[str, torch.Tensor]:
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

    def images(self) -> list[torch.Tensor]:
        """Return the inputs, leaves that gather a gradient."""
        spec = Options(self.info["input"], f"{self.name}: input")
        spec.inert("what", "proposals", "proposals_what", "top_level")
        listed = spec.take("images", None)
        if listed is None:
            return [self._image(spec)]
        spec.done()
        return [self._image(Options(item, f"{self.name}: images")) for item in listed]

    def _image(self, spec: Options) -> torch.Tensor:
        spec.inert("name")  # they are listed in the order of the call
        value = self.golden.image(spec.take("seed"), tuple(spec.take("shape")))
        value = value * np.float32(spec.take("scale", 1.0)) + np.float32(spec.take("offset", 0.0))
        spec.done()
        return torch.from_numpy(value).requires_grad_()


def read(root: Path, name: str) -> Case:
    """Read a case that has both files."""
    golden = reader(root)
    info, arrays = golden.load(root / name)
    buffers: dict[str, np.ndarray] = {}
    if "stored" in info:
        info, arrays, buffers = _normalised(name, info, arrays)
    unknown = sorted(set(info) - _JSON_KEYS)
    if unknown:
        raise UnsupportedCase(f"{name}: unknown keys {unknown} at the top of the JSON file")
    if not info.get("conversion") and not str(info["grad"]).startswith(LOSS):
        raise UnsupportedCase(f"{name}: unknown loss {info['grad']!r}")
    return Case(name, info, arrays, golden, buffers)


def _normalised(
    name: str, info: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a case of the second format as one of the first, and its stored buffers.

    The second format has "stored.step" for "subsampled.stride", the numbers about gradients under
    "grad", "output/X" for "X" in the NPZ file, and inputs by name where there are several.
    """
    inputs = [image.get("name") for image in info["input"].get("images", ())]

    def key(old: str) -> str:
        stats, rest = ("stats/", old[6:]) if old.startswith("stats/") else ("", old)
        if rest.startswith("grad_input/"):
            rest = f"grad_input/{inputs.index(rest.removeprefix('grad_input/'))}"
        return stats + rest.removeprefix("output/")

    new = {k: value for k, value in info.items() if k not in ("builder", "stored")}
    new |= {"subsampled": {"stride": {key(k): step for k, step in info["stored"]["step"].items()}}}
    new.setdefault("extra", {})
    new["float32_error"] = {key(k): value for k, value in info.get("float32_error", {}).items()}
    grad = info["grad"]
    if isinstance(grad, str) and grad.startswith("none: outputs are the"):
        new |= {"conversion": True, "parameters_without_grad": [], "loss": 0.0}
    elif isinstance(grad, dict) and grad["loss"] == _SECOND_LOSS:
        new |= {"grad": LOSS, "loss": grad["loss_value"]}
        new |= {"parameters_without_grad": grad["parameters_without_grad"]}
    else:
        raise UnsupportedCase(f"{name}: unknown loss {grad!r}")
    buffers = {k[7:]: value for k, value in arrays.items() if k.startswith("buffer/")}
    kept = {key(k): value for k, value in arrays.items() if not k.startswith("buffer/")}
    return new, kept, buffers


def read_info(root: Path, name: str) -> dict[str, Any]:
    """Read the JSON file of a case; one of lr_decay has no other."""
    return json.loads((root / name).with_suffix(".json").read_text())


_REQUIRED = object()


@dataclass
class Options:
    """A config that must be understood completely: take every key, then call `done`."""

    values: Mapping[str, Any]
    place: str
    _taken: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return the value of `key`."""
        self._taken.add(key)
        if key in self.values:
            return self.values[key]
        if default is _REQUIRED:
            raise UnsupportedCase(f"{self.place}: no key {key!r}, and it has no default")
        return default

    def several(self, *keys: str) -> dict[str, Any]:
        """Return the values of keys that must be there."""
        return {key: self.take(key) for key in keys}

    def section(self, key: str) -> Options:
        """Return the options under `key`."""
        return Options(self.take(key), f"{self.place}.{key}")

    def only(self, key: str, allowed: Iterable[Any], default: Any = _REQUIRED) -> Any:
        """Return the value of `key`, which must be one of `allowed`."""
        value = self.take(key, default)
        allowed = list(allowed)
        # True == 1 in Python, but not in a config.
        if not any(
            isinstance(value, bool) == isinstance(each, bool) and value == each for each in allowed
        ):
            raise UnsupportedCase(f"{self.place}.{key}: expected one of {allowed}, got {value!r}")
        return value

    def fixed(self, **values: Any) -> None:
        """Take keys that may have these values alone."""
        for key, value in values.items():
            self.only(key, (value,), value)

    def inert(self, *keys: str) -> None:
        """Mark keys that cannot change what is compared."""
        self._taken.update(keys)

    def done(self) -> None:
        """Raise UnsupportedCase when a key was not taken."""
        unknown = sorted(set(self.values) - self._taken)
        if unknown:
            known = ", ".join(sorted(self._taken))
            raise UnsupportedCase(f"{self.place}: unknown keys {unknown}; known are {known}")
