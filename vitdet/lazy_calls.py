"""The LazyCall nodes of a recipe beside the signatures of their callables."""

from __future__ import annotations

import inspect
from pydoc import ErrorDuringImport
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, Node

from vitdet.utils.checks import InputError, fail, nearest


def arguments(node: DictConfig) -> dict[str, Any]:
    """Return {argument: default} of the callable that a LazyCall node describes."""
    return {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in _parameters(node).items()
        if parameter.kind in _BY_NAME
    }


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(node: DictConfig) -> dict[str, inspect.Parameter]:
    target = node.get("_target_")
    if isinstance(target, str):
        target = _located(target)
    if target is None:
        return {}
    target = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    found = inspect.signature(target).parameters
    return {name: parameter for name, parameter in found.items() if name != "self"}


def _located(name: str) -> Any:
    """Return what a dotted name stands for, None for nothing; it may be imported for that."""
    try:
        return locate(name)
    except ErrorDuringImport as error:  # pydoc, which detectron2 asks, wraps ^C in it
        if isinstance(error.value, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


# What the engine gives when it builds a node.
_GIVEN = {
    "optimizer": {"model"},
    "dataloader.train": {"dataset", "start"},
    "dataloader.test": {"dataset"},
    "dataloader.evaluator": {"dataset"},
}
_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
}


def check_calls(node: Any, key: str = "") -> None:
    """Check every LazyCall below `node` against the signature of its callable.

    Args:
        node: a recipe, or what stands at `key` in one.
        key: its place, for messages.

    Raises:
        InputError: an argument that the callable does not have, lacks, or does not take a value of
            this type for; or no such callable.
    """
    if isinstance(node, DictConfig) and node._is_none() is False:
        if "_target_" in node:
            _check_call(node, key)
        children = {str(name): node._get_node(name) for name in node}
    elif isinstance(node, ListConfig) and node._is_none() is False:
        children = {str(index): node._get_node(index) for index in range(len(node))}
    else:
        return
    for name, child in children.items():
        check_calls(child, f"{key}.{name}" if key else name)


def _check_call(node: DictConfig, key: str) -> None:
    try:
        parameters = _parameters(node)
    except ImportError as error:
        expected = f"{key}._target_: expected a name that can be imported, got {node._target_}"
        raise InputError(f"{expected} ({error}). Correct it, or install its package.") from error
    except ValueError:  # of a callable written in C nothing is known
        return
    names = [name for name, each in parameters.items() if each.kind in _BY_NAME]
    given = [str(name) for name in node if name != "_target_"]
    what = getattr(node._target_, "__name__", node._target_)
    if all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
        for name in given:
            if name in names:
                continue
            close = nearest(name, names)
            hint = f"Did you mean {key}.{close}?" if close else f"It has {', '.join(names)}."
            expected = f"an argument of {what}"
            fail(f"{key}.{name}", expected=expected, got=repr(name), remedy=hint)
    for name in names:
        empty = parameters[name].default is inspect.Parameter.empty
        if empty and name not in given and name not in _GIVEN.get(key, ()):
            remedy = "Add it to the recipe."
            fail(
                f"{key}.{name}", expected=f"a value, as {what} asks for", got="none", remedy=remedy
            )
        if name in given:
            _check_kind(f"{key}.{name}", node._get_node(name), parameters[name].annotation)


def _check_kind(key: str, node: Any, annotation: Any) -> None:
    """Check a plain value against an annotation of plain types; others are not looked at."""
    value = node._value() if isinstance(node, Node) else node
    if not isinstance(value, bool | int | float | str):
        return
    if isinstance(value, str) and (value == "???" or "${" in value):
        return
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    kinds = [_KINDS.get(part.strip()) for part in text.split("|")]
    allowed = tuple(kind for known in kinds if known for kind in known)
    if None in kinds or type(value) in allowed:
        return
    fail(key, expected=text, got=repr(value), remedy="Give a value of that type.")
