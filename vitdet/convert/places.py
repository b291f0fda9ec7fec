"""Where backbone, pyramid and heads stand in the names of a file and of a model.

Inside this package a weight has an inner name, the same whatever stands round the backbone: without
the backbone's root ("blocks.0.norm1.weight"), and outside the backbone "/" and the name in a
detectron2 detector ("/backbone.simfp_2.0.weight", "/roi_heads.mask_head.deconv.weight").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vitdet.convert.rules import KINDS, Format, Kind, Rename, Rule, Shapes, root_of
from vitdet.utils.checks import fail
from vitdet.utils.state_dicts import some

_PYRAMID = "/backbone."


@dataclass(frozen=True)
class Places:
    """The roots of the backbone in a file and in a model.

    A root is "backbone.net." in a detector, "net." in a pyramid, "" for a bare backbone; the
    pyramid stands one step up.
    """

    fmt: Format
    source_root: str
    target_root: str

    def inner(self, key: str) -> tuple[str, Rule | None]:
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

    def target(self, inner: str) -> str | None:
        """Return the model's spelling of an inner name, None where the model has no such part."""
        if not inner.startswith("/"):
            return self.target_root + inner
        if inner.startswith(_PYRAMID):
            rest = inner[len(_PYRAMID) :]
            return _above(self.target_root) + rest if self.target_root else None
        return inner[1:] if _above(self.target_root) else None

    def inner_of_target(self, name: str) -> str:
        """Return the inner name of a model's weight."""
        if name.startswith(self.target_root):
            return name[len(self.target_root) :]
        return _outside(name, self.target_root)


def find_places(fmt: Format, keys: Shapes, target: Shapes, source: str) -> Places:
    """Return the places of a file's and a model's names.

    Raises:
        InputError: no backbone in one of them, or a backbone the format is not for.
    """
    kind, target_root = kind_of(target)
    if kind.name not in fmt.kinds:
        wanted = " or ".join(each.what for each in KINDS if each.name in fmt.kinds)
        remedy = "Use a recipe with that backbone."
        what = f"{source} as {fmt.name}: backbone of the model"
        fail(what, expected=wanted, got=kind.what, remedy=remedy)
    anchor = fmt.anchor or kind.anchor
    source_root = root_of(keys, anchor)
    if source_root is None:
        expected = f"a key that ends in {anchor}"
        remedy = "Check --source-format."
        fail(f"{source} as {fmt.name}", expected=expected, got=some(keys), remedy=remedy)
    return Places(fmt, source_root, target_root)


def kind_of(target: Shapes) -> tuple[Kind, str]:
    """Return the kind of a model's backbone and its root.

    Raises:
        InputError: none of `KINDS`.
    """
    for kind in KINDS:
        root = root_of(target, kind.anchor)
        if root is not None:
            mark = re.compile(re.escape(root) + kind.mark)
            if any(map(mark.match, target)):
                return kind, root
    known = ", ".join(kind.what for kind in KINDS)
    remedy = "Use a recipe with one of these."
    fail("backbone of the model", expected=known, got=f"names like {some(target)}", remedy=remedy)


def is_rename(rule: Rule | None) -> bool:
    """Whether a key that this rule holds for must find a place in the model."""
    return rule is None or isinstance(rule, Rename)


def _outside(name: str, root: str) -> str:
    above = _above(root)
    if root != "backbone." and name.startswith(above):
        return _PYRAMID + name[len(above) :]
    return "/" + name


def _above(root: str) -> str:
    # a bare backbone of a detector has no pyramid, and the heads stand beside it
    return root if root == "backbone." else re.sub(r"[^.]+\.$", "", root)
