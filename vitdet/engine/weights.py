"""Which weights of a file a run takes, and whether they are for its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from torch import nn

from vitdet import checkpoint
from vitdet.engine.ema import KEY
from vitdet.utils.checks import fail

EVAL_WEIGHTS = ("model", "ema")


def chosen(content: Mapping[str, Any], which: str, source: str) -> Mapping[str, Any]:
    """Return a file's content with the weights to evaluate in the place of its weights.

    Args:
        content: what `checkpoint.read` returned.
        which: `train.eval_weights`: "model" for the weights, "ema" for their moving average.
        source: file name for error messages.

    Raises:
        InputError: no average in the file.
    """
    if which == "model":
        return content
    if KEY not in content:
        fail(
            f"weights to evaluate, {source}",
            expected=f'a moving average of the weights ("{KEY}"), as train.eval_weights=ema says',
            got=f"only the keys {', '.join(map(str, list(content)[:8]))}",
            remedy="Add train.eval_weights=model, or take a checkpoint of a run with "
            "train.ema_decay.",
        )
    return {**content, "model": content[KEY]}


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


def check_complete(content: Mapping[str, Any], source: str) -> None:
    """Stop an evaluation of weights that are meant to be trained first."""
    _, initialised = checkpoint.weights_of(content, source=source)
    if initialised:
        fail(
            f"weights to evaluate, {source}",
            expected="a trained detector",
            got=f"a start of training: {len(initialised)} tensors ({initialised[0]}, ...) are left "
            "to initialisation",
            remedy="Train from it first, and evaluate the checkpoint of that run.",
        )
