"""What a source format is: a table of rules on its names, and how to recognise it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Drop:
    """Names that have no place in a ViTDet, and why."""

    pattern: str
    why: str


@dataclass(frozen=True)
class Rename:
    """Names that are spelt differently; the replacement is that of `re.sub`."""

    pattern: str
    replacement: str


@dataclass(frozen=True)
class Refuse:
    """Names that change what the network computes in a way our ViT has no part for."""

    pattern: str
    why: str


@dataclass(frozen=True)
class File:
    """What a format is recognised by.

    Attributes:
        keys: top-level keys of the file.
        nested_under: the one that holds the state dict, "" when the file is one.
        shapes: {name: shape} of the state dict.
    """

    keys: frozenset[str]
    nested_under: str
    shapes: Mapping[str, tuple[int, ...]]

    def has(self, pattern: str) -> bool:
        """Whether a name begins with the regular expression."""
        return any(map(re.compile(pattern).match, self.shapes))


@dataclass(frozen=True)
class Format:
    """A source format.

    Attributes:
        name: as in `--source-format`.
        what: one line for people: whose files these are.
        recognise: whether a file is of this format.
        anchor: the patch embedding's weight; what stands before it is the root of the backbone.
        rules: for names inside the backbone, without the root. The first that matches at the
            beginning of the name counts; a name that none matches keeps its spelling.
        outside: for names outside the backbone, whole. None matches: a pyramid's or head's name,
            spelt as in detectron2.
        detector: whether such files hold a pyramid and heads.
        tensor: changes the layout of one tensor of the backbone, given its new name.
    """

    name: str
    what: str
    recognise: Callable[[File], bool]
    rules: tuple[Drop | Rename | Refuse, ...] = ()
    outside: tuple[Drop | Refuse, ...] = ()
    anchor: str = "patch_embed.proj.weight"
    detector: bool = False
    tensor: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor


def root_of(names: Mapping[str, object], anchor: str) -> str | None:
    """Return what stands before `anchor`, "" for nothing, None when no name ends with it.

    The shortest is taken: a file may hold a second, nested network.
    """
    roots = [name[: -len(anchor)] for name in names if ("." + name).endswith("." + anchor)]
    return min(roots, key=len) if roots else None
