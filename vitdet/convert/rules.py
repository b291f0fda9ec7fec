"""What a source format is: a table of rules on its names, and how to recognise it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Drop:
    """Names that may be left out, and why. A name that the model has a place for is used.

    Attributes:
        pattern: regular expression that the name begins with.
        why: the rule, for the account.
        to: the model's spelling, as in `re.sub`; None when it is the same.
        same_as: the name, as in `re.sub`, of a tensor that this one repeats. Where it does not,
            leaving it out is inexact, see `Inexact`.
    """

    pattern: str
    why: str
    to: str | None = None
    same_as: str | None = None


@dataclass(frozen=True)
class Inexact:
    """Names that change what the network computes, and that a model may have no place for.

    As `Drop`, but leaving them out needs the user's leave (`allow_inexact`).
    """

    pattern: str
    why: str
    to: str | None = None


@dataclass(frozen=True)
class Rename:
    """Names that are spelt differently; the replacement is that of `re.sub`.

    A replacement that begins with "/" counts from the top of a detector and not from its backbone:
    "/backbone.simfp_2.0." for a pyramid that a source keeps inside its backbone.
    """

    pattern: str
    to: str


@dataclass(frozen=True)
class Refuse:
    """Names that change what the network computes in a way no flag makes usable."""

    pattern: str
    why: str


Rule = Drop | Inexact | Rename | Refuse
# (tensors of the sources in order, None for an absent optional one; shape in the model) -> tensor
Function = Callable[[Sequence[torch.Tensor | None], Shape], torch.Tensor]


@dataclass(frozen=True)
class Make:
    """How a weight of the model is computed from others; see `vitdet.convert.tensors`.

    Attributes:
        pattern: regular expression that begins a name of the model, without the backbone's root;
            names outside the backbone begin with "/", as in `Rename`.
        sources: names after renaming, as replacements in `re.sub`. Those that begin with "?" may be
            absent; when another one is absent the rule does not hold.
        function: computes the weight. Without side effects, and on the meta device too.
        note: for the account, when the rule was used.
    """

    pattern: str
    sources: tuple[str, ...]
    function: Function
    note: str = ""

    def names(self, name: str) -> tuple[tuple[str, bool], ...]:
        """Return (name of a source, whether it may be absent) for a name of the model."""
        found = re.match(self.pattern, name)
        if found is None:
            return ()
        return tuple(
            (found.expand(source.removeprefix("?")), source.startswith("?"))
            for source in self.sources
        )


@dataclass(frozen=True)
class OtherThan:
    """A setting that may be anything but one value.

    Attributes:
        value: the one.
    """

    value: object

    def __repr__(self) -> str:
        return f"other than {self.value!r}"


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
    shapes: Shapes

    def has(self, pattern: str) -> bool:
        """Whether a name begins with the regular expression."""
        places = (f"/{key}" for key in (*(self.keys & {"vitdet"}), self.nested_under))
        return any(map(re.compile(pattern).match, (*self.shapes, *places)))


@dataclass(frozen=True)
class Kind:
    """A kind of backbone that models are built with, told from its names.

    Attributes:
        name: as in `Format.kinds`.
        what: for messages.
        anchor: a name that every such backbone has; what stands before it is its root.
        mark: regular expression of names, without the root, that only this kind has among those
            that follow it in `KINDS`.
    """

    name: str
    what: str
    anchor: str
    mark: str


KINDS = (
    Kind("vil", "a Vision Longformer", "layer1.0.proj.weight", r"layer1\.1\."),
    Kind("vitae_s", "a ViTAE-S", "layers.0.RC.PCM.0.weight", r"layers\.\d+\.NC\."),
    Kind("vitae", "a ViTAE-B", "patch_embed.proj.weight", r"blocks\.0\.PCM\."),
    Kind("eva02", "an EVA-02", "patch_embed.proj.weight", r"blocks\.0\.attn\.q_proj\.weight$"),
    Kind("vit", "a plain ViT", "patch_embed.proj.weight", r"blocks\.0\.attn\.qkv\.weight$"),
)
EVERY_KIND = tuple(kind.name for kind in KINDS)


@dataclass(frozen=True)
class Format:
    """A source format.

    Attributes:
        name: as in `--source-format`.
        what: one line for people: whose files these are.
        recognise: whether a file is of this format. At most one format may say so of a file.
        anchor: a name that every such backbone has, as the source spells it; what stands before it
            is the root of the backbone. "" for that of the model's kind.
        rules: for names inside the backbone, without the root. The first that matches at the
            beginning of the name counts; a name that none matches keeps its spelling.
        outside: for names outside the backbone, whole. A `Rename` gives the name in a detectron2
            detector ("backbone.simfp_2.0.weight", "roi_heads..."). None matches: a pyramid's or
            head's name, spelt as in detectron2.
        makes: weights of the model that are computed. The first that holds counts; a weight for
            which none holds comes from the tensor of its own name. Where there is such a tensor, a
            rule that does not read it does not hold.
        kinds: names in `KINDS` that such a file can be converted for.
        optional: regular expressions of the model's names, without the root, that a file may lack
            as a whole: each group keeps the model's own initialisation.
        detector: whether such files hold a pyramid and heads.
        settings: arguments of the backbone's constructor that such weights were trained with and
            that no shape tells; and "pyramid.norm", "box_head.norm", "mask_head.norm" as
            `vitdet.config.model_settings` says. What is not known of a model is not asked.
        notes: for the account.
    """

    name: str
    what: str
    marks: tuple[str, ...]
    absent: tuple[str, ...] = ()
    anchor: str = ""
    rules: tuple[Rule, ...] = ()
    outside: tuple[Rule, ...] = ()
    makes: tuple[Make, ...] = ()
    kinds: tuple[str, ...] = ("vit",)
    optional: tuple[str, ...] = ()
    detector: bool = False
    settings: tuple[tuple[str, object], ...] = ()
    notes: tuple[str, ...] = ()

    def recognise(self, file: File) -> bool:
        """Whether a file has all the marks and nothing that must be absent."""
        return all(map(file.has, self.marks)) and not any(map(file.has, self.absent))


def root_of(names: Iterable[str], anchor: str) -> str | None:
    """Return what stands before `anchor`, "" for nothing, None when no name ends with it.

    The shortest is taken: a file may hold a second, nested network.
    """
    roots = [name[: -len(anchor)] for name in names if ("." + name).endswith("." + anchor)]
    return min(roots, key=len) if roots else None
