"""The account of a conversion: what became of every key."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vitdet.utils.checks import InputError
from vitdet.utils.state_dicts import some

Shape = tuple[int, ...]
_OF_CLASSES = {"carried": "carried over", "initialised": "start anew", "left_out": "left out"}


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
        constants: {target name: rule} of what is used and may be left out. Not in the record.
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
    constants: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "constants"}

    def by_rule(self, word: str) -> list[tuple[str, list[str]]]:
        """Return (rule, names) of `dropped` or `inexact`."""
        rules: dict[str, list[str]] = {}
        for name, why in getattr(self, word).items():
            rules.setdefault(why, []).append(name)
        return list(rules.items())

    def then(self, second: Report) -> Report:
        """Return the account of two steps as one: `second` had the names that this one gave."""
        to = second.used
        result = replace(second, source_format=self.source_format, nested_under=self.nested_under)
        result.used = {key: to[name] for key, name in self.used.items() if name in to}
        for word in ("dropped", "inexact"):
            late: dict[str, str] = getattr(second, word)
            left = {key: late[name] for key, name in self.used.items() if name in late}
            setattr(result, word, getattr(self, word) | left)
        result.made = {to[name]: keys for name, keys in self.made.items() if name in to}
        result.resized = dict(second.resized)
        for name, (have, want) in self.resized.items():
            if name in to:
                result.resized[to[name]] = have, second.resized.get(to[name], (want, want))[1]
        result.notes = self.notes + second.notes
        result.settings = self.settings | second.settings
        result.classes = self.classes | second.classes
        return result

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
            for rule, names in self.by_rule(word):
                lines.append(f"{word:<12} {len(names)}: {rule} ({some(names)})")
        for word in ("initialised", "unaccounted", "missing"):
            if names := getattr(self, word):
                lines.append(f"{word:<12} {len(names)} names ({some(names)})")
        for name, (want, have) in self.settings.items():
            lines.append(f"inexact      {name} is {have!r}, the weights were made with {want!r}")
        lines += [
            f"classes      {len(names)} {word} ({some(names)})"
            for key, word in _OF_CLASSES.items()
            if (names := self.classes.get(key))
        ]
        return "\n".join(lines + [f"note         {note}" for note in self.notes])


class UnaccountedError(InputError):
    """Keys or weights are left over. `report` says which."""

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report
