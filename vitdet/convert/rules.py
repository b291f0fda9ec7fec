"""What a source format is, a table of rules on its names, and what a conversion says it did."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch

from vitdet.utils.checks import InputError
from vitdet.utils.state_dicts import some

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
# (shape in the model, tensors of the sources, None for an absent optional one) -> tensor
Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Rename:
    """Names that are spelt differently, as in `re.sub` from their beginning.

    "/backbone.simfp_2.0.": a replacement that counts from the top of a detector, not its backbone.
    """

    pattern: str
    to: str


@dataclass(frozen=True)
class Drop:
    """Names that may be left out, and why. A name that the model has a place for is used.

    `to` is the model's spelling where it is another. `same_as` is the name of a tensor that this
    one repeats (as in `re.sub`, both); where it does not, leaving it out is inexact.
    """

    pattern: str
    why: str
    to: str | None = None
    same_as: str | None = None


class Inexact(Drop):
    """As `Drop`, but without these the network computes something else: --allow-inexact."""


@dataclass(frozen=True)
class Refuse:
    """Names that change what the network computes in a way no option makes usable."""

    pattern: str
    why: str


Rule = Drop | Rename | Refuse


@cache
def renames(*pairs: tuple[str, str], out: bool = False) -> tuple[Rename, ...]:
    """Return the rules from their names to ours, or with `out` from ours to theirs.

    Args:
        pairs: (ours, theirs): beginnings of names up to a dot, or whole names. "{}" is a number.
        out: the direction.
    """
    rules = []
    for ours, theirs in pairs:
        name, to = (ours, theirs) if out else (theirs, ours)
        pattern = re.escape(name).replace(r"\{\}", r"(\d+)") + ("" if name.endswith(".") else "$")
        rules.append(Rename(pattern, to.replace("{}", r"\1")))
    return tuple(rules)


@dataclass(frozen=True)
class Make:
    """How a weight of the model is computed from others.

    Attributes:
        pattern: begins a name of the model, without the backbone's root (or with "/", as above).
        sources: names after renaming, as replacements in `re.sub`. Those that begin with "?" may be
            absent; when another one is absent the rule does not hold.
        function: of `vitdet.convert.tensors`; works on the meta device too.
        note: for the account, when the rule was used.
    """

    pattern: str
    sources: tuple[str, ...]
    function: Function
    note: str = ""

    def find(self, name: str, given: Collection[str]) -> tuple[str | None, ...]:
        """Return which of the given names `name` is made from, () when the rule does not hold."""
        match = re.match(self.pattern, name)
        if match is None:
            return ()
        wanted = [match.expand(source.removeprefix("?")) for source in self.sources]
        found = tuple(each if each in given else None for each in wanted)
        unread = name in given and name not in wanted
        pairs = zip(found, self.sources, strict=True)
        if unread or not any(found) or any(not n and s[0] != "?" for n, s in pairs):
            return ()
        return found


@dataclass(frozen=True)
class OtherThan:
    """A setting that may be anything but one value."""

    value: object

    def __repr__(self) -> str:
        return f"other than {self.value!r}"


@dataclass(frozen=True)
class Kind:
    """A kind of backbone that models are built with.

    What stands before `anchor`, which all of a kind have, is the backbone's root; `mark` begins a
    name, without the root, that none of the kinds after it in `KINDS` has.
    """

    name: str
    what: str
    anchor: str
    mark: str


PATCH = "patch_embed.proj.weight"
KINDS = (
    Kind("vil", "a Vision Longformer", "layer1.0.proj.weight", r"layer1\.1\."),
    Kind("vitae_s", "a ViTAE-S", "layers.0.RC.PCM.0.weight", r"layers\.\d+\.NC\."),
    Kind("vitae", "a ViTAE-B", PATCH, r"blocks\.0\.PCM\."),
    Kind("eva02", "an EVA-02", PATCH, r"blocks\.0\.attn\.q_proj\.weight$"),
    Kind("vit", "a plain ViT", PATCH, r"blocks\.0\.attn\.qkv\.weight$"),
)
EVERY_KIND = tuple(kind.name for kind in KINDS)


@dataclass(frozen=True)
class Format:
    """A source format.

    Patterns are regular expressions of the beginning of a name; the first that matches counts.

    Attributes:
        name: as in `--source-format`.
        what: one line for people: whose files these are.
        marks: patterns that every such file has. "/" and the key that holds the state dict counts
            as a name, and "/vitdet" in files of ours.
        absent: patterns that no such file has.
        anchor: a name that every such backbone has, as the source spells it; what stands before it
            is the root of the backbone. "" for that of the model's kind.
        rules: for names inside the backbone, without the root; others keep their spelling.
        outside: for names outside the backbone, whole. A `Rename` gives the name in a detectron2
            detector ("backbone.simfp_2.0.weight", "roi_heads..."), which others have already.
        makes: weights of the model that are computed. Others come from the tensor of their own
            name; where there is one, a rule that does not read it does not hold.
        kinds: names in `KINDS` that such a file can be converted for.
        optional: patterns of the model's names that a file may lack, each as a whole: these keep
            the model's own initialisation.
        detector: whether such files hold a pyramid and heads.
        settings: arguments of the backbone that such weights were trained with and that no shape
            tells; and "pyramid.norm", "box_head.norm", "mask_head.norm", see
            `vitdet.config.model_settings`. What is not known of a model is not asked.
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

    @property
    def renames(self) -> bool:
        """Whether it spells any name differently than detectron2."""
        return any(getattr(rule, "to", None) is not None for rule in (*self.rules, *self.outside))

    def fits(self, names: Collection[str]) -> bool:
        """Whether a file's names have all the marks and nothing that must be absent."""

        def has(pattern: str) -> bool:
            return any(map(re.compile(pattern).match, names))

        return all(map(has, self.marks)) and not any(map(has, self.absent))


def root_of(names: Iterable[str], *anchors: str) -> str | None:
    """Return what stands before the first anchor that is there, None where there is none.

    The shortest is taken: a file may hold a second, nested network.
    """
    for anchor in anchors:
        roots = [name[: -len(anchor)] for name in names if ("." + name).endswith("." + anchor)]
        if roots:
            return min(roots, key=len)
    return None


# --- the account ---------------------------------------------------------------------------------

_OF_CLASSES = {"carried": "carried over", "initialised": "start anew", "left_out": "left out"}


@dataclass
class Report:
    """What became of every key of the source and of every name of the target."""

    source_format: str
    nested_under: str = ""  # key of the file that held the state dict
    used: dict[str, str] = field(default_factory=dict)  # {key: name}, the first where it fills many
    made: dict[str, list[str]] = field(default_factory=dict)  # {name: keys} that was computed
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # {name: (from, to)}
    dropped: dict[str, str] = field(default_factory=dict)  # {key: the rule that says why}
    inexact: dict[str, str] = field(default_factory=dict)  # {key: what there is no place for}
    initialised: list[str] = field(default_factory=list)  # names that keep the model's own values
    unaccounted: list[str] = field(default_factory=list)  # keys that no rule covers
    missing: list[str] = field(default_factory=list)  # names that should have been filled
    settings: dict[str, tuple[object, object]] = field(
        default_factory=dict
    )  # {name: (file, model)}
    notes: list[str] = field(default_factory=list)
    target_format: str = ""  # the other project's that was written
    classes: dict[str, Any] = field(default_factory=dict)  # which rows went where
    # {name: rule} of what is used and may be left out; not in the record
    constants: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "constants"}

    def summary(self) -> str:
        """Return the account in a few lines: counts, rules, first names."""
        nested = f" (under {self.nested_under!r})" if self.nested_under else ""
        to = f" to {self.target_format}" if self.target_format else ""
        lines = [f"format       {self.source_format}{nested}{to}"]
        lines.append(f"used         {len(self.used)} keys")
        for name, shapes in list(self.resized.items())[:4]:
            have, want = ("x".join(map(str, shape)) for shape in shapes)
            lines.append(f"resized      {name}: {have} to {want}")
        if len(self.resized) > 4:
            lines.append(f"resized      {len(self.resized) - 4} more")
        if self.made:
            lines.append(f"made         {len(self.made)} names ({some(self.made)})")
        for word in ("dropped", "inexact"):
            for rule, names in by_rule(getattr(self, word)).items():
                lines.append(f"{word:<12} {len(names)}: {rule} ({some(names)})")
        for word in ("initialised", "unaccounted", "missing"):
            if names := getattr(self, word):
                lines.append(f"{word:<12} {len(names)} names ({some(names)})")
        for name, (want, have) in self.settings.items():
            lines.append(f"inexact      {name} is {have!r}, the weights were made with {want!r}")
        lines += [
            f"classes      {len(names)} {_OF_CLASSES[word]} ({some(names)})"
            for word, names in self.classes.items()
            if names
        ]
        return "\n".join(lines + [f"note         {note}" for note in self.notes])


def by_rule(entries: Mapping[str, str]) -> dict[str, list[str]]:
    """Return {rule: names} of {name: rule}."""
    rules: dict[str, list[str]] = {}
    for name, why in entries.items():
        rules.setdefault(why, []).append(name)
    return rules


class UnaccountedError(InputError):
    """Keys or weights are left over. `report` says which."""

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report
