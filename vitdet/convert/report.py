"""The account of a conversion: what became of every key."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
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
        used: {source key: target name}, resized ones among them.
        resized: {target name: (shape in the file, shape in the model)}.
        dropped: {source key: the rule that says why}.
        initialised: target names that the source cannot fill; the model's own initialisation stays.
        unaccounted: source keys that no rule covers and that the target has no place for.
        missing: target names that the source should have filled and does not.
        notes: anything else worth reading.
    """

    source_format: str
    nested_under: str = ""
    used: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)
    unaccounted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Return the account in a few lines: counts, rules, first names."""
        nested = f" (under {self.nested_under!r})" if self.nested_under else ""
        lines = [f"format       {self.source_format}{nested}"]
        lines.append(f"used         {len(self.used)} keys")
        for name, (have, want) in list(self.resized.items())[:4]:
            lines.append(f"resized      {name}: {_shape(have)} to {_shape(want)}")
        if len(self.resized) > 4:
            lines.append(f"resized      {len(self.resized) - 4} more")
        for rule, count in Counter(self.dropped.values()).items():
            names = [name for name, why in self.dropped.items() if why == rule]
            lines.append(f"dropped      {count}: {rule} ({some(names)})")
        for word in ("initialised", "unaccounted", "missing"):
            names = getattr(self, word)
            if names:
                lines.append(f"{word:<12} {len(names)} names ({some(names)})")
        lines += [f"note         {note}" for note in self.notes]
        return "\n".join(lines)


class UnaccountedError(InputError):
    """Keys or weights are left over. `report` says which."""

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape))
