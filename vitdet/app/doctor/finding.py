"""One line of the page: how it stands, with what, and what to do."""

from __future__ import annotations

from typing import NamedTuple

OK, WARNING, FAULT = "ok", "warning", "FAULT"


class Finding(NamedTuple):
    """What one check says.

    Attributes:
        level: OK, WARNING or FAULT.
        subject: what was looked at, in a word.
        text: what was found.
        remedy: what to do, "" for nothing.
    """

    level: str
    subject: str
    text: str
    remedy: str = ""


def page(findings: list[Finding]) -> str:
    """Return the findings as text, and how many there are of each level."""
    width = max(len(each.subject) for each in findings)
    lines = []
    for each in findings:
        lines.append(f"{each.level:<8} {each.subject:<{width}}  {each.text}")
        if each.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {each.remedy}")
    counts = {
        level: sum(each.level == level for each in findings) for level in (FAULT, WARNING, OK)
    }
    words = [f"{counts[FAULT]} fault" + "s" * (counts[FAULT] != 1)]
    words += [f"{counts[WARNING]} warning" + "s" * (counts[WARNING] != 1), f"{counts[OK]} ok"]
    return "\n".join([*lines, "", ", ".join(words)])
