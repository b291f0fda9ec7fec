"""The account of a conversion: what became of every key."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vitdet.utils.checks import InputError
from vitdet.utils.state_dicts import some

Shape = tuple[int, ...]


@dataclass
class Report:
    """What became of every key of the source and of every name of the target.

    Attributes:
        source_format: name of the format, as in `FORMATS`.
        nested_under: key of the file that held the state dict, "" when the file is one.
        used: {source key: target name}, resized ones among them; the first name when a key fills
            several.
        made: {target name: source keys} where a weight was computed: joined, cut out, scaled.
        resized: {target name: (shape in the file, shape in the model)}.
        dropped: {source key: the rule that says why}.
        inexact: {source key: what the model has no place for}: without it the numbers differ.
        initialised: target names that the source cannot fill; the model's own initialisation stays.
        unaccounted: source keys that no rule covers and that the target has no place for.
        missing: target names that the source should have filled and does not.
        settings: {argument of the model's backbone: (what the weights want, what the model has)}
            where they differ.
        notes: anything else worth reading.
        target_format: the other project's format that was written, "" for ours.
        classes: for a head that went to other classes, which rows it took from which.
    """

    source_format: str
    nested_under: str = ""
    used: dict[str, str] = field(default_factory=dict)
    made: dict[str, list[str]] = field(default_factory=dict)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    inexact: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)
    unaccounted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    settings: dict[str, tuple[object, object]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    target_format: str = ""
    classes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Return the account in a few lines: counts, rules, first names."""
        nested = f" (under {self.nested_under!r})" if self.nested_under else ""
        to = f" to {self.target_format}" if self.target_format else ""
        lines = [f"format       {self.source_format}{nested}{to}"]
        lines.append(f"used         {len(self.used)} keys")
        for name, (have, want) in list(self.resized.items())[:4]:
            lines.append(f"resized      {name}: {_shape(have)} to {_shape(want)}")
        if len(self.resized) > 4:
            lines.append(f"resized      {len(self.resized) - 4} more")
        if self.made:
            lines.append(f"made         {len(self.made)} names ({some(self.made)})")
        for word, rules in (("dropped", self.dropped), ("inexact", self.inexact)):
            for rule, count in Counter(rules.values()).items():
                names = [name for name, why in rules.items() if why == rule]
                lines.append(f"{word:<12} {count}: {rule} ({some(names)})")
        for word in ("initialised", "unaccounted", "missing"):
            names = getattr(self, word)
            if names:
                lines.append(f"{word:<12} {len(names)} names ({some(names)})")
        for name, (want, have) in self.settings.items():
            lines.append(f"inexact      {name} is {have!r}, the weights were made with {want!r}")
        lines += self._classes_lines()
        lines += [f"note         {note}" for note in self.notes]
        return "\n".join(lines)

    def _classes_lines(self) -> list[str]:
        words = {"carried": "carried over", "initialised": "start anew", "left_out": "left out"}
        parts = [(self.classes.get(key, ()), word) for key, word in words.items()]
        return [
            f"classes      {len(names)} {word} ({some(names)})" for names, word in parts if names
        ]


def chain(first: Report, second: Report) -> Report:
    """Return the account of two steps as one: the second had the names that the first gave.

    Args:
        first: of a file into our names.
        second: of our names into those of another project.
    """
    to = second.used
    whole = replace(second, source_format=first.source_format, nested_under=first.nested_under)
    whole.used = {key: to[name] for key, name in first.used.items() if name in to}
    for word in ("dropped", "inexact"):
        late: dict[str, str] = getattr(second, word)
        left = {key: late[name] for key, name in first.used.items() if name in late}
        setattr(whole, word, getattr(first, word) | left)
    whole.made = {to[name]: keys for name, keys in first.made.items() if name in to}
    whole.resized = dict(second.resized)
    for name, (have, want) in first.resized.items():
        if name in to:
            whole.resized[to[name]] = have, second.resized.get(to[name], (want, want))[1]
    whole.unaccounted = first.unaccounted + second.unaccounted
    whole.missing = first.missing + second.missing
    whole.notes = first.notes + second.notes
    whole.settings = first.settings | second.settings
    whole.classes = first.classes | second.classes
    return whole


class UnaccountedError(InputError):
    """Keys or weights are left over. `report` says which."""

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape))
