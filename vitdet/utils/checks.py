"""Errors that a user can repair: one line saying what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn


class InputError(ValueError):
    """A wrong input: file, config value, argument, annotation. Command lines print one line."""


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
    text = f"{what}: expected {expected}, got {got}. {remedy}"
    raise InputError(" ".join(text.split()))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that looks most like `name`, or None when none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None
