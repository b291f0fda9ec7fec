"""Weights of a file, loaded when they are for the classes of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from torch import nn

from vitdet import checkpoint
from vitdet.utils.checks import fail


def load_weights(
    detector: nn.Module, content: Mapping[str, Any], source: str, class_names: Iterable[str]
) -> None:
    """Load the weights of a file's content exactly; its class names, if any, must be ours.

    Raises:
        InputError: another size, class count, format, or other class names.
    """
    state, initialised = checkpoint.weights_of(content, source=source)
    checkpoint.load_weights(detector, state, source=source, initialised=initialised)
    about = content.get("vitdet")
    theirs = about.get("class_names") if isinstance(about, dict) else None
    if theirs is not None and list(theirs) != list(class_names):
        pairs = zip_longest(theirs, class_names, fillvalue="no class")
        first = next((a, b) for a, b in pairs if a != b)
        fail(
            f"class names of {source}",
            expected=f"those of the data set, {first[1]} among them",
            got=f"{first[0]} in its place",
            remedy="Use the data set that the file was trained on; to start another training from "
            "these weights, pass them through converter.py, which drops the names.",
        )
