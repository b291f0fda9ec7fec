"""Errors that a user can repair: one line saying what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn

_LONGEST_WORD = 1000


class InputError(ValueError):
    """A wrong input: file, config value, argument, annotation. Command lines print one line.

    Names out of a file may be in the text, so it is made one line of printable characters.
    """

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """Return the text in one line: control characters as escapes, endless words cut short."""
    words = (word if len(word) <= _LONGEST_WORD else f"{word[:100]}..." for word in text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(words))


def fail(what: str, *, expected: object, got: object, remedy: str) -> NoReturn:
    """Raise an InputError that names the thing, both values and the way out, in one line.

    Args:
        what: the thing that is wrong, with its place: a file, a config key, an annotation id.
        expected: what would have been right.
        got: what was found.
        remedy: a full sentence that tells what to do.

    Raises:
        InputError: always.
    """
    raise InputError(f"{what}: expected {expected}, got {got}. {remedy}")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that looks most like `name`, or None when none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None
