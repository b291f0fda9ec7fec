"""The stages of a multi-scale vision longformer: from keyword arguments, or from an ARCH string.

An ARCH string (microsoft/VisionLongformerForObjectDetection, msvit/msvit.py) has a part for each
stage, "l1,h3,d96,n1,s1,g1,p4,f7,a0_l2,...": l number of the stage, h heads, d channels, n blocks,
s 1 for the sparse attention that is chosen beside the string and 0 for full attention, g global
tokens, p patch size, f size of the attention, a 1 for absolute and 0 for relative positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NoReturn

from vitdet.utils.checks import fail, nearest

ATTENTION_KINDS = ("vil", "full", "only_global", "srformer", "linformer", "performer")
# Kinds that have relative positions; the others have none where absolute ones are off.
WITH_REL_POS = ("vil", "full", "only_global")

_DEFAULTS = {"l": 1, "h": 3, "d": 192, "n": 1, "s": 1, "g": 1, "p": 2, "f": 7, "a": 1}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        embed_dim: channels C of a token.
        depth: blocks, each an attention and an MLP.
        num_heads: heads of the attention.
        patch_size: side of the squares of the map before that become one token.
        num_global_tokens: learned tokens G that see, and are seen from, everywhere.
        attention: one of ATTENTION_KINDS.
        attention_size: vil: side of a chunk in tokens; srformer: side of the squares of tokens that
            become one key; linformer and performer: number of features; else of no meaning.
        use_abs_pos: absolute positions; without them vil, full and only_global have relative ones.

    Raises:
        InputError: a number that is too small, an unknown kind, heads that do not divide the
            channels, absolute positions for an odd number of channels, only_global without global
            tokens.
    """

    embed_dim: int = 192
    depth: int = 1
    num_heads: int = 3
    patch_size: int = 2
    num_global_tokens: int = 1
    attention: str = "vil"
    attention_size: int = 7
    use_abs_pos: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("embed_dim", "depth", "num_heads", "patch_size", "attention_size"):
            if getattr(self, name) < 1:
                fail(name, expected="at least 1", got=getattr(self, name), remedy="Change it.")
        if self.num_global_tokens < 0:
            got = self.num_global_tokens
            fail("num_global_tokens", expected="at least 0", got=got, remedy="Change it.")
        if self.attention not in ATTENTION_KINDS:
            _unknown("attention", self.attention, ATTENTION_KINDS)
        if self.embed_dim % self.num_heads:
            expected = f"a divisor of embed_dim {self.embed_dim}"
            fail("num_heads", expected=expected, got=self.num_heads, remedy="Change one of them.")
        if self.use_abs_pos and self.embed_dim % 2:
            expected = "an even number with absolute positions: half for rows, half for columns"
            remedy = "Change it, or set use_abs_pos=False."
            fail("embed_dim", expected=expected, got=self.embed_dim, remedy=remedy)
        if self.attention == "only_global" and not self.num_global_tokens:
            remedy = "Without global tokens nothing could be attended to."
            fail("num_global_tokens", expected="at least 1 for only_global", got=0, remedy=remedy)

    @property
    def use_rel_pos(self) -> bool:
        """Whether the attention has relative positions."""
        return not self.use_abs_pos and self.attention in WITH_REL_POS


def stages_of(**arguments: object) -> tuple[Stage, ...]:
    """Return the stages from the arguments of `Stage`, each a value or a list of one a stage.

    Raises:
        InputError: lists of different lengths, no list at all, another number than 3 or 4 stages.
    """
    lists = {
        name: list(value)
        for name, value in arguments.items()
        if isinstance(value, Sequence) and not isinstance(value, str)
    }
    counts = {name: len(value) for name, value in lists.items()}
    if len(set(counts.values())) != 1:
        got = ", ".join(f"{name} {count}" for name, count in counts.items()) or "no list"
        remedy = "Give lists of one value a stage."
        fail("stages", expected="lists of one length", got=got, remedy=remedy)
    count = next(iter(counts.values()))
    each = [
        {name: lists[name][i] if name in lists else value for name, value in arguments.items()}
        for i in range(count)
    ]
    return _checked(tuple(Stage(**values) for values in each), "stages")  # pyright: ignore


def parse_arch(arch: str, attention: str = "vil") -> tuple[Stage, ...]:
    """Return the stages of an ARCH string.

    Each stage has what its own part says. In the published code s0 also makes every later stage
    full, whatever its part says.

    Args:
        arch: the string. Parts may leave out keys, for l1, h3, d192, n1, s1, g1, p2, f7, a1.
        attention: kind of the stages with s1, one of ATTENTION_KINDS.

    Raises:
        InputError: not of that form, an unknown or repeated key, stages out of order, a wrong
            number.
    """
    if attention not in ATTENTION_KINDS:
        _unknown("attention", attention, ATTENTION_KINDS)
    stages = []
    for i, part in enumerate(arch.split("_")):
        what = f"ARCH, stage {i + 1}"
        numbers = _numbers(what, part)
        if numbers["l"] != i + 1:
            remedy = "Stages are numbered l1, l2, ... in order."
            fail(what, expected=f"l{i + 1}", got=f"l{numbers['l']}", remedy=remedy)
        for key in "sa":
            if numbers[key] not in (0, 1):
                expected = f"{key}0 or {key}1"
                got = f"{key}{numbers[key]}"
                fail(what, expected=expected, got=got, remedy="It is a switch.")
        stages.append(
            Stage(
                embed_dim=numbers["d"],
                depth=numbers["n"],
                num_heads=numbers["h"],
                patch_size=numbers["p"],
                num_global_tokens=numbers["g"],
                attention=attention if numbers["s"] else "full",
                attention_size=numbers["f"],
                use_abs_pos=bool(numbers["a"]),
            )
        )
    return _checked(tuple(stages), "ARCH")


def _numbers(what: str, part: str) -> dict[str, int]:
    given: dict[str, int] = {}
    for item in part.split(","):
        found = re.fullmatch(r"([a-z])(\d+)", item)
        if not found or found[1] not in _DEFAULTS:
            expected = "a letter of " + ", ".join(_DEFAULTS) + " and a number"
            remedy = 'Write it like "l1,h3,d96,n1,s1,g1,p4,f7,a0_l2,...".'
            fail(what, expected=expected, got=repr(item), remedy=remedy)
        if found[1] in given:
            fail(what, expected="each letter once", got=repr(part), remedy="Leave one out.")
        given[found[1]] = int(found[2])
    return _DEFAULTS | given


def _checked(stages: tuple[Stage, ...], what: str) -> tuple[Stage, ...]:
    if len(stages) not in (3, 4):
        fail(what, expected="3 or 4 stages", got=len(stages), remedy="Add or remove some.")
    return stages


def _unknown(what: str, name: str, names: Sequence[str]) -> NoReturn:
    close = nearest(name, names)
    remedy = f"Did you mean {close!r}?" if close else "Take one of these."
    fail(what, expected=f"one of {', '.join(names)}", got=repr(name), remedy=remedy)


STAGE_ARGUMENTS = tuple(field.name for field in fields(Stage))
