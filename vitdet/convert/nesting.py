"""Where in a file its state dict lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vitdet.utils.checks import fail
from vitdet.utils.state_dicts import some

# In this order: timm and mmcv take the moving average first where a file has both.
NESTS = (
    *("state_dict_ema", "state_dict", "model_state_dict", "model", "module", "net", "model_state"),
    *("ema_state", "model_ema", "teacher", "student", "weights", "params"),
)
# What stands before every name, in any order and number: of DistributedDataParallel, torch.compile,
# an attribute of a training class (Lightning), self-distillation.
_PREFIXES = ("module.", "_orig_mod.", "model.", "student.", "teacher.")


def unnest(
    content: Mapping[str, Any], source: str, weights: str | None = None
) -> tuple[dict[str, torch.Tensor], str]:
    """Return the state dict in a file's content, and the key that held it ("" for none).

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict.
        source: the file, for messages.
        weights: the key, None to find it.

    Raises:
        InputError: no such key, or no tensors there.
    """
    if weights is not None and not isinstance(content.get(weights), Mapping):
        got = f"{weights!r}, the file has {some(content, 8)}"
        expected = "a key of the file that holds weights"
        fail(f"{source}: --weights", expected=expected, got=got, remedy="Name one of these.")
    key = weights or next((key for key in nests(content)), "")
    inner: Mapping[str, Any] = content[key] if key else content
    wrong = [str(name) for name, value in inner.items() if not isinstance(value, torch.Tensor)]
    if wrong or not inner:
        got = f"other things: {some(wrong)}" if wrong else "nothing"
        remedy = f"The state dict may lie under one of: {', '.join(NESTS)}."
        if weights is not None or (wrong and not key):
            remedy += " Another one can be named with --weights."
        fail(f"{source}: state dict", expected="tensors", got=got, remedy=remedy)
    return _unwrap(inner), key


def nests(content: Mapping[str, Any]) -> list[str]:
    """Return the known keys of a file under which something lies, the preferred one first."""
    return [key for key in NESTS if isinstance(content.get(key), Mapping) and content[key]]


def _unwrap(inner: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {str(name): value for name, value in inner.items()}
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in named)), ""):
        named = {name[len(prefix) :]: value for name, value in named.items()}
    return named
