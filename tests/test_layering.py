"""The arrows of docs/architecture.md: who may import whom, held by reading the imports."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
ROOMS = (  # an import points to an earlier line only, or stays in its own package or module
    {"utils"},
    {"layers", "postprocess", "scores"},
    {"backbones", "pyramid", "heads", "optim", "data", "evaluation", "drawing", "checkpoint"}
    | {"convert", "plain_recipes", "published"},
    {"config", "weights"},
    {"engine", "predict", "export"},
    {"app"},
)
LEVEL = {unit: level for level, units in enumerate(ROOMS) for unit in units}
# Units that see less than what lies below them: recipes name their parts, so nobody imports those.
NARROW = {
    "convert": ("utils", "layers.positions"),  # the two resizes
    "config": ("utils", "plain_recipes"),
    "weights": ("utils", "checkpoint", "published"),
    "engine": ("utils", "checkpoint", "config", "drawing"),
    "configs": ("layers", "backbones", "pyramid", "heads", "optim", "data", "evaluation"),
}
# Packages from outside that low units do with, beside the standard library.
OUTSIDE = {
    "utils": {"torch", "numpy", "pycocotools"},
    "layers": {"torch", "numpy", "xformers"},
    "postprocess": {"torch"},
    "optim": {"torch", "fvcore"},
    "checkpoint": {"torch", "numpy", "safetensors"},
    "convert": {"torch", "numpy"},
    "plain_recipes": {"yaml"},
    "published": set(),
    "backbones": {"torch", "detectron2"},
    "configs": {"detectron2", "omegaconf"},
}


def imports_of(source, package):
    """Yield every dotted name that a text imports, also inside functions and by import_module.

    `from a import b` gives "a.b": b may be a module or a name in a.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def modules(folder):
    """{dotted name: imports} of the files of a folder."""
    found = {}
    for path in (PROJECT / folder).rglob("*.py"):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        package = ".".join(parts[:-1])
        name = package if parts[-1] == "__init__" else ".".join(parts)
        found[name] = set(imports_of(path.read_text(encoding="utf-8"), package))
    return found


def is_wrong(module, target):
    """Whether an import goes against the arrows, or to a package that its unit does without."""
    home, unit = (*module.split("."), "vitdet")[:2]
    source = home if home == "configs" else unit
    top, _, inside = target.partition(".")
    if top in sys.stdlib_module_names or top == "configs" or module == "vitdet":
        return False
    if target == "vitdet.__version__":
        return False
    if top != "vitdet":
        return top not in OUTSIDE.get(source, {top})
    goal = inside.split(".")[0]
    if goal == source:
        return False
    if source in NARROW:
        return not f"{inside}.".startswith(tuple(f"{seen}." for seen in NARROW[source]))
    return LEVEL.get(goal, 9) >= LEVEL[source]


VITDET = modules("vitdet")


def test_imports_point_down():
    assert {name.split(".")[1] for name in VITDET if "." in name} == set(LEVEL)
    found = VITDET | modules("configs")
    wrong = [
        (name, each) for name, each_ in found.items() for each in each_ if is_wrong(name, each)
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others():
    graph = {
        name: {each for each in (t.rpartition(".")[0] for t in targets) if each in VITDET}
        | {each for each in targets if each in VITDET}
        for name, targets in VITDET.items()
    }
    packages = {name for name in VITDET if any(other.startswith(f"{name}.") for other in VITDET)}
    inner = {name: seen - packages - {name} for name, seen in graph.items()}
    assert len(list(TopologicalSorter(inner).static_order())) >= len(VITDET)
