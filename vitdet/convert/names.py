"""Where a file keeps its weights, and one name for a weight whatever stands round the backbone.

Inside this package a weight has an inner name: without the backbone's root
("blocks.0.norm1.weight"), and outside the backbone "/" and the name in a detectron2 detector
("/backbone.simfp_2.0.weight", "/roi_heads.mask_head.deconv.weight").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vitdet.convert.rules import KINDS, Format, Kind, Rule, Shapes, root_of
from vitdet.utils.checks import InputError
from vitdet.utils.state_dicts import some

# In this order: timm and mmcv take the moving average first where a file has both.
NESTS = (
    *("state_dict_ema", "state_dict", "model_state_dict", "model", "module", "net", "model_state"),
    *("ema_state", "model_ema", "teacher", "student", "weights", "params"),
)
# What stands before every name, in any order and number: of DistributedDataParallel, torch.compile,
# an attribute of a training class (Lightning), self-distillation.
_PREFIXES = ("module.", "_orig_mod.", "model.", "student.", "teacher.")
_PYRAMID = "/backbone."


def unnest(
    content: Mapping[str, Any], source: str, weights: str | None = None
) -> tuple[dict[str, torch.Tensor], str]:
    """Return the state dict in a file's content, and the key that held it ("" for none).

    `weights` names the key. Raises InputError when there is no such key, or no tensors there.
    """
    if weights is not None and not isinstance(content.get(weights), Mapping):
        raise InputError(
            f"{source}: --weights: expected a key of the file that holds weights, got {weights!r}, "
            f"the file has {some(content, 8)}. Name one of these."
        )
    key = weights or next(iter(nests(content)), "")
    named = {str(name): value for name, value in (content[key] if key else content).items()}
    wrong = [name for name, value in named.items() if not isinstance(value, torch.Tensor)]
    if wrong or not named:
        got = f"other things: {some(wrong)}" if wrong else "nothing"
        raise InputError(
            f"{source}: state dict: expected tensors, got {got}. The state dict may lie under one "
            f"of {', '.join(NESTS)}; --weights names another one."
        )
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in named)), ""):
        named = {name[len(prefix) :]: value for name, value in named.items()}
    return named, key


def nests(content: Mapping[str, Any]) -> list[str]:
    """Return the known keys of a file under which something lies, the preferred one first."""
    return [key for key in NESTS if isinstance(content.get(key), Mapping) and content[key]]


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape}."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Source:
    """What a file gives for one inner name; several keys when tensors were put together."""

    keys: tuple[str, ...]
    tensor: torch.Tensor
    rule: Rule | None


@dataclass(frozen=True)
class Names:
    """The names of a file and of a model, told by the roots of the backbone in both.

    A root is "backbone.net." in a detector, "net." in a pyramid, "" for a bare backbone; the
    pyramid stands one step up.
    """

    fmt: Format
    source_root: str
    target_root: str

    def of_file(self, key: str) -> tuple[str, Rule | None]:
        """Return the inner name of a file's key, and the rule for it."""
        inside = key.startswith(self.source_root)
        text = key[len(self.source_root) :] if inside else key
        rules = self.fmt.rules if inside else self.fmt.outside
        rule = next((rule for rule in rules if re.match(rule.pattern, text)), None)
        to = getattr(rule, "to", None)
        if rule is not None and to is not None:
            name = re.sub(rule.pattern, to, text, count=1)
            return (name if inside else "/" + name.removeprefix("/")), rule
        return (text if inside else _outside(text, self.source_root)), rule

    def of_model(self, name: str) -> str:
        """Return the inner name of a model's weight."""
        if name.startswith(self.target_root):
            return name[len(self.target_root) :]
        return _outside(name, self.target_root)

    def in_model(self, inner: str) -> str | None:
        """Return the model's spelling of an inner name, None where the model has no such part."""
        if not inner.startswith("/"):
            return self.target_root + inner
        if inner.startswith(_PYRAMID):
            rest = inner[len(_PYRAMID) :]
            return _above(self.target_root) + rest if self.target_root else None
        return inner[1:] if _above(self.target_root) else None


def find_names(fmt: Format, keys: Shapes, target: Shapes | None, source: str) -> Names:
    """Return the names of a file and of a model, or without one of a detector of ours.

    Raises InputError when one has no backbone, or one that the format is not for.
    """
    anchors, target_root = [kind.anchor for kind in KINDS], ""
    if target is not None:
        kind, target_root = kind_of(target)
        anchors = [kind.anchor]
        if kind.name not in fmt.kinds:
            wanted = " or ".join(each.what for each in KINDS if each.name in fmt.kinds)
            raise InputError(
                f"{source} as {fmt.name}: backbone of the model: expected {wanted}, got "
                f"{kind.what}. Use a recipe with that backbone."
            )
    anchors = [fmt.anchor] if fmt.anchor else anchors
    source_root = root_of(keys, *anchors)
    if source_root is None:
        raise InputError(
            f"{source} as {fmt.name}: expected a key that ends in {anchors[0]}, got {some(keys)}. "
            "Check --source-format."
        )
    if target is None:
        ours = "backbone.net." if fmt.detector else ""
        target_root = ours if fmt.renames else source_root
    return Names(fmt, source_root, target_root)


def kind_of(target: Shapes, what: str = "model") -> tuple[Kind, str]:
    """Return the kind of a model's backbone and its root; an InputError for none of `KINDS`."""
    for kind in KINDS:
        root = root_of(target, kind.anchor)
        if root is not None and any(map(re.compile(re.escape(root) + kind.mark).match, target)):
            return kind, root
    known = ", ".join(kind.what for kind in KINDS)
    raise InputError(
        f"{what}: backbone: expected {known}, got names like {some(target)}. "
        "Use a file and a recipe with one of these."
    )


def _outside(name: str, root: str) -> str:
    above = _above(root)
    if root != "backbone." and name.startswith(above):
        return _PYRAMID + name[len(above) :]
    return "/" + name


def _above(root: str) -> str:
    # a bare backbone of a detector has no pyramid, and the heads stand beside it
    return root if root == "backbone." else re.sub(r"[^.]+\.$", "", root)
