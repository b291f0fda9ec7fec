"""Types of the values under `train`: a wrong one is named before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from vitdet.utils.checks import fail

_NUMBER, _NOTHING = (int, float), type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "output_dir": (str,),
    "init_checkpoint": (str, _NOTHING),
    "seed": (int,),
    "device": (str,),
    "precision": (str,),
    "keep_checkpoints": (int,),
    "log_every": (int,),
    "clip_grad_norm": (*_NUMBER, _NOTHING),
    "ddp": (dict, _NOTHING),
    "ema_decay": (*_NUMBER, _NOTHING),
    "reference_batch": (int, _NOTHING),
    "first_step_timeout": (*_NUMBER, _NOTHING),
}
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_WORDS |= {list: "a list", dict: "a mapping", _NOTHING: "null"}


def check_types(train: DictConfig, optional: Mapping[str, Any]) -> None:
    """Check the values of a recipe's `train`.

    Args:
        train: the node.
        optional: {key: value that holds when the recipe has none}; the type of such a value is the
            key's, where this module says nothing else.

    Raises:
        InputError: a value of another type.
    """
    for key in map(str, train):
        allowed = _TYPES.get(key)
        if allowed is None and optional.get(key) is not None:
            allowed = _like(optional[key])
        value = _plain(train[key])
        if allowed is None or type(value) in allowed:
            continue
        words = [_WORDS[kind] for kind in allowed if not (kind is int and float in allowed)]
        fail(
            f"train.{key}",
            expected=" or ".join(words),
            got=repr(value),
            remedy="Give a value of that type.",
        )


def _like(default: Any) -> tuple[type, ...]:
    """Return the types that may stand where `default` does; null switches off."""
    kind = type(default)
    return (bool,) if kind is bool else (*(_NUMBER if kind is float else (kind,)), _NOTHING)


def _plain(value: Any) -> Any:
    if isinstance(value, DictConfig | ListConfig):
        return OmegaConf.to_container(value)
    return value
