"""LayerScale multiplied into the layer before it (Touvron et al., "Going deeper with Image
Transformers", Sec. 2): gamma * (W x + b) = (gamma W) x + gamma b.
"""

from __future__ import annotations

import re

from vitdet.convert.places import Places
from vitdet.convert.plan import Given
from vitdet.convert.report import Report
from vitdet.convert.rules import Shapes
from vitdet.utils.checks import fail

_SCALE = re.compile(r"(.*)\.ls([12])\.gamma$")
_LAYERS = {"1": ("attn.proj",), "2": ("mlp.fc2", "mlp.w3")}


def fold(
    given: dict[str, Given], places: Places, target: Shapes, report: Report, source: str
) -> None:
    """Replace every scale in `given` by a scaled layer before it.

    Raises:
        InputError: the file has no LayerScale, or the model has.
    """
    scales = {name: found for name in given if (found := _SCALE.match(name))}
    kept = [name for name in scales if places.target(name) in target]
    if kept or not scales:
        got = f"{kept[0]} in the model" if kept else "none in the file"
        what, expected = f"{source}: --fold-layer-scale", "LayerScale in the file alone"
        fail(what, expected=expected, got=got, remedy="Leave the option out.")
    for name, found in scales.items():
        scale = given.pop(name)
        for layer in _LAYERS[found[2]]:
            for kind in ("weight", "bias"):
                _multiply(given, f"{found[1]}.{layer}.{kind}", scale)
    report.notes.append(f"LayerScale of {len(scales)} branches folded into the layers before it")


def _multiply(given: dict[str, Given], name: str, scale: Given) -> None:
    if name not in given:
        return
    layer = given[name]
    rows = scale.tensor.float().reshape(-1, *[1] * (layer.tensor.ndim - 1))
    tensor = (layer.tensor.float() * rows).to(layer.tensor.dtype)
    given[name] = Given((*layer.keys, *scale.keys), tensor, layer.rule)
