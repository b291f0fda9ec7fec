"""The keys under `train` of a recipe: which there are, what holds without them, their types."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from vitdet.utils.checks import fail, nearest

TRAIN_KEYS = frozenset(
    {
        *("output_dir", "init_checkpoint", "seed", "device", "precision", "num_images", "ddp"),
        *("checkpoint_every", "keep_checkpoints", "eval_every", "log_every", "clip_grad_norm"),
    }
)
# What a recipe may leave out (configs saved before there were these keys do), and what holds then.
OPTIONAL_TRAIN_KEYS = {
    **{"ema_decay": None, "eval_weights": "model", "compile": False},
    **{"epochs": None, "reference_batch": None},  # engine/length.py
    **{"eval_precision": "fp32", "async_checkpoints": True},
    **{"best_metric": None, "early_stopping": None},
    **{"allow_changed_data": False, "loggers": []},
    **{"accumulate": 1, "freeze_blocks": 0, "on_bad_step": "stop", "max_bad_steps": 10},
    **{"parallel": "ddp", "step_timeout": 1800.0},
}

# Of recipes that earlier versions saved; they changed no weights, and are passed over.
_FORMER_KEYS = {"looks_every", "sharded_checkpoints", "hash_images", "tags"}
_FORMER_KEYS |= {"first_step_timeout"}

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
    "step_timeout": (*_NUMBER, _NOTHING),
}
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_WORDS |= {list: "a list", dict: "a mapping", _NOTHING: "null"}


def optional(train: DictConfig, key: str) -> Any:
    """Return the value of a key that a recipe may leave out."""
    return train.get(key, OPTIONAL_TRAIN_KEYS[key])


def check_train(train: DictConfig) -> None:
    """Check the keys and the types of the values of a recipe's `train`.

    A key that may be left out has the type of what holds without it, where `_TYPES` says nothing.

    Raises:
        InputError: a key that is missing or unknown, or a value of another type.
    """
    given = {str(key) for key in train} - set(OPTIONAL_TRAIN_KEYS) - _FORMER_KEYS
    if given != TRAIN_KEYS:
        absent, unknown = sorted(TRAIN_KEYS - given), sorted(given - TRAIN_KEYS)
        close = [nearest(key, {*TRAIN_KEYS, *OPTIONAL_TRAIN_KEYS}) for key in unknown]
        fail(
            "recipe key train",
            expected=", ".join(sorted({*TRAIN_KEYS, *OPTIONAL_TRAIN_KEYS})),
            got=f"{', '.join(absent) or 'nothing'} missing, "
            f"{', '.join(unknown) or 'nothing'} unknown",
            remedy=f"Did you mean {close[0]}?" if close and close[0] else "Correct the recipe.",
        )
    for key in map(str, train):
        allowed = _TYPES.get(key)
        if allowed is None and OPTIONAL_TRAIN_KEYS.get(key) is not None:
            allowed = _like(OPTIONAL_TRAIN_KEYS[key])
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
