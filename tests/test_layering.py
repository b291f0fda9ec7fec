"""The arrows of docs/architecture.md: who may import whom, held by reading the imports.

An import points down a room only. Units (packages and modules of `vitdet`) of one room never import
each other, and some see less than what lies below them.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).resolve().parents[1]

ROOMS = {
    "utils": 0,
    "layers": 1,
    "postprocess": 1,
    "scores": 1,
    "backbones": 2,
    "pyramid": 2,
    "heads": 2,
    "optim": 2,
    "data": 2,
    "evaluation": 2,
    "drawing": 2,
    "checkpoint": 2,
    "convert": 2,
    "plain_recipes": 2,
    "settings": 2,
    "config": 3,
    "engine": 4,
    "predict": 4,
    "export": 4,
    "app": 5,
}

# Units that see less of vitdet than the rooms below them; "layers.positions" is one module.
NARROW = {
    "convert": {"utils", "layers.positions"},  # the two resizes
    "config": {
        "utils",
        "plain_recipes",
        "settings",
    },  # builds by dotted path, so it imports no model
    "engine": {
        "utils",
        "checkpoint",
        "config",
        "settings",
        "drawing",
    },  # everything else comes out of a recipe
    "predict": {
        *("utils", "checkpoint", "config", "plain_recipes", "drawing", "data", "postprocess"),
    },
    "export": {"utils", "postprocess", "heads"},
    "vitdet": {"config", "predict", "utils.quiet"},  # the doors in vitdet/__init__.py
}

# Files and folders under vitdet/ that may import detectron2.
DETECTRON2 = {
    *(
        "backbones/base.py",
        "pyramid.py",
        "heads.py",
        "data",
        "evaluation.py",
        "config.py",
    ),
    "drawing.py",
    *("engine", "predict", "export", "app"),
}

# What some units may import from outside vitdet, besides the standard library and detectron2.
OUTSIDE = {
    "utils": {"torch", "numpy"},
    "layers": {"torch"},
    "layers.positions": {"torch", "numpy"},  # a spline whose numbers are no tensors
    "layers.attention": {"torch", "xformers"},
    "layers.kernels": {"torch", "triton"},
    "postprocess": {"torch"},
    "utils.run_lengths": {"numpy", "pycocotools"},
    "scores": {"numpy", "faster_coco_eval"},
    "backbones": {"torch"},
    "pyramid": {"torch"},
    "heads": {"torch"},
    "optim": {"torch", "fvcore"},
    "checkpoint": {"torch", "numpy", "safetensors"},
    "convert": {"torch", "numpy"},
    "config": {"torch", "omegaconf", "yaml"},
    "plain_recipes": {"yaml"},
    "settings": {"omegaconf"},
}

# What recipes may import of vitdet: what a config node calls.
CONFIGS_SEE = {"layers", "backbones", "pyramid", "heads", "optim", "data", "evaluation"}
SCRIPTS = ("train_net.py", "converter.py")


class Import(NamedTuple):
    """One import: dotted name of the file's module, line, dotted name that is imported."""

    module: str
    line: int
    target: str


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the project."""
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Yield every import in a source text, also inside functions and by `import_module`.

    `from a import b` gives "a.b": b may be a module or a name in a.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                above = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield Import(module, node.lineno, f"{base}.{alias.name}")
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            values = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            if name in ("import_module", "__import__") and values:
                yield Import(module, node.lineno, str(values[0]))


def files(folder: str) -> list[Path]:
    """Return the Python files under a folder of the project."""
    return sorted((PROJECT / folder).rglob("*.py"))


def imports(paths: list[Path]) -> list[Import]:
    """Return all imports of files."""
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        found += imports_of(text, module_name(path), path.name == "__init__.py")
    return found


def unit(module: str) -> str:
    """Return the unit of a dotted name inside vitdet: "vitdet.layers.mlp" is in "layers"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "vitdet"


def is_unit(target: str) -> bool:
    """Whether a dotted name lies in a unit of vitdet (and is no name in vitdet/__init__.py)."""
    return target.startswith("vitdet.") and unit(target) in ROOMS


def outside(target: str) -> str:
    """Return the top-level package of an import that is not of vitdet or the standard library."""
    top = target.partition(".")[0]
    return "" if top == "vitdet" or top in sys.stdlib_module_names else top


def points_wrong(each: Import) -> bool:
    """Whether an import inside vitdet goes against the arrows."""
    source = unit(each.module)
    if each.target.split(".")[0] != "vitdet":
        return False
    if not is_unit(each.target):
        return True  # the doors are for users
    target = unit(each.target)
    if source == target:
        return False
    if source in NARROW:
        inside = each.target.removeprefix("vitdet.")
        return not any(f"{inside}.".startswith(f"{seen}.") for seen in NARROW[source])
    return ROOMS[target] >= ROOMS[source]


def wrong_outside(each: Import) -> bool:
    """Whether a file imports a package that its unit must do without."""
    top = outside(each.target)
    place = each.module.removeprefix("vitdet.")
    if not top:
        return False
    if top == "detectron2":
        names = (f"{place.replace('.', '/')}.py", place.split(".")[0])
        return each.module != "vitdet" and not DETECTRON2.intersection(names)
    keys = [key for key in OUTSIDE if f"{place}.".startswith(f"{key}.")]
    return bool(keys) and top not in OUTSIDE[max(keys, key=len)]


VITDET = files("vitdet")
CONFIGS = files("configs")


def told(wrong: list[Import]) -> list[str]:
    """Return imports as lines to read."""
    return [f"{each.module}:{each.line} imports {each.target}" for each in wrong]


def test_files_are_seen() -> None:
    """The other tests look at something: the project has at least so many files and units."""
    assert len(VITDET) >= 55
    assert len(CONFIGS) >= 33
    assert all((PROJECT / script).is_file() for script in SCRIPTS)
    seen = {unit(module_name(path)) for path in VITDET} - {"vitdet"}
    assert seen <= set(ROOMS), f"no room for {seen - set(ROOMS)}: put it into ROOMS"
    assert seen >= set(ROOMS)
    assert len(imports(VITDET)) >= 300


def test_arrows_point_down() -> None:
    assert told([each for each in imports(VITDET) if points_wrong(each)]) == []


def test_narrow_units_are_below() -> None:
    """The table of narrow views itself has no arrow upwards or across."""
    for source, seen in NARROW.items():
        if source != "vitdet":
            assert all(ROOMS[name.split(".")[0]] < ROOMS[source] for name in seen), source


def test_packages_from_outside() -> None:
    """detectron2 only where it belongs; the low rooms need little more than torch."""
    assert told([each for each in imports(VITDET) if wrong_outside(each)]) == []


def test_recipes_see_parts_only() -> None:
    """A recipe imports what its nodes call, and never what runs it."""
    found = imports(CONFIGS)
    used = {unit(each.target) for each in found if each.target.split(".")[0] == "vitdet"}
    assert used <= CONFIGS_SEE
    assert used  # they are seen
    packages = {outside(each.target) for each in found} - {"", "configs"}
    assert packages <= {"detectron2", "omegaconf", "torch"}


def test_nothing_imports_room_5_tests_or_benchmarks() -> None:
    paths = [*VITDET, *CONFIGS, *files("benchmarks"), *(PROJECT / name for name in SCRIPTS)]
    for each in imports(paths):
        top = each.target.split(".")[0]
        home = each.module.split(".")[0]
        assert top != "tests", told([each])
        assert top != "benchmarks" or home == "benchmarks", told([each])
        room_5 = f"{each.target}.".startswith("vitdet.app.")
        command_line = each.module == "converter"  # `vitdet convert` is the same
        assert not room_5 or command_line or each.module.startswith("vitdet.app"), told([each])


# --- the checks can fail -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vitdet.layers.mlp", "from vitdet.backbones.vit import ViT"),  # up
        ("vitdet.pyramid", "from vitdet.backbones import vit"),  # across
        ("vitdet.data.mapper", "from vitdet import evaluation"),  # across, the module by name
        ("vitdet.convert.fit", "from ..layers.mlp import Mlp"),  # relative, not a resize
        ("vitdet.config", "def f():\n    import vitdet.pyramid"),  # inside a function
        ("vitdet.engine.run", "import importlib\nimportlib.import_module('vitdet.data.loaders')"),
        ("vitdet.engine.run", "from vitdet.predict import predictor"),  # across
        ("vitdet.utils.env", "from vitdet import build_model"),  # the doors are for users
        ("vitdet.predict.predictor", "if TYPE_CHECKING:\n    from vitdet.app import demo"),
    ],
)
def test_wrong_arrow_is_found(module: str, source: str) -> None:
    assert [points_wrong(each) for each in imports_of(source, module)].count(True) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vitdet.backbones.vit", "from . import base"),
        ("vitdet.convert.fit", "from vitdet.layers.positions import resize_rel_pos"),
        ("vitdet.convert.engine", "from vitdet.convert import formats"),
        ("vitdet.engine.run", "from vitdet import checkpoint, config"),
        ("vitdet.app.demo", "from vitdet.engine.run import train"),
        ("vitdet.utils.env", "import torch, os"),
    ],
)
def test_right_arrow_is_not_found(module: str, source: str) -> None:
    assert not any(points_wrong(each) for each in imports_of(source, module))


@pytest.mark.parametrize(
    ("module", "target", "wrong"),
    [
        ("vitdet.backbones.vit", "detectron2.layers", True),
        ("vitdet.backbones.base", "detectron2.modeling", False),
        ("vitdet.convert.detectron2", "detectron2.checkpoint", True),
        ("vitdet.optim", "detectron2.solver", True),
        ("vitdet.heads", "detectron2.layers", False),
        ("vitdet.data.mapper", "detectron2.data", False),
        ("vitdet.layers.mlp", "numpy", True),
        ("vitdet.layers.attention", "triton", True),
        ("vitdet.layers.kernels.blocks", "triton.language", False),
        ("vitdet.layers.kernels.blocks", "json", False),
        ("vitdet.data.mapper", "PIL", False),
    ],
)
def test_outside_packages_are_found(module: str, target: str, wrong: bool) -> None:
    assert wrong_outside(Import(module, 1, target)) is wrong
