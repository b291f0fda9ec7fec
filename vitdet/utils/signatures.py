"""Functions that pass arguments on: their signature shows whose they are."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def passes_on(source: Callable[..., Any], **defaults: Any) -> Callable[[_Function], _Function]:
    """Show the arguments of `source` in the place of a function's **arguments.

    `help` and the check of a recipe's calls then know their names, types and defaults.

    Args:
        source: what is called with them.
        defaults: those that differ.
    """

    def decorate(function: _Function) -> _Function:
        own = signature(function)
        named = [each for each in own.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
        passed = [
            each.replace(kind=Parameter.KEYWORD_ONLY, default=defaults.get(name, each.default))
            for name, each in signature(source).parameters.items()
            if name not in own.parameters
        ]
        vars(function)["__signature__"] = own.replace(parameters=[*named, *passed])
        return function

    return decorate
