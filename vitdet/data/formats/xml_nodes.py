"""A small reader of xml that keeps the line of every element, so that an error can name it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from vitdet.utils.checks import InputError, fail


@dataclass
class Node:
    """An element: its tag, text and children, and where it stands."""

    tag: str
    path: Path
    line: int
    text: str = ""
    children: list[Node] = field(default_factory=list)

    @property
    def where(self) -> str:
        """File and line, for error messages."""
        return f"{self.path}, line {self.line}"

    def all(self, tag: str) -> Iterator[Node]:
        """Yield the children of a tag."""
        return (child for child in self.children if child.tag == tag)

    def find(self, tag: str) -> Node | None:
        """Return the first child of a tag, None without one."""
        return next(self.all(tag), None)

    def word(self, tag: str) -> str | None:
        """Return the text of the first child of a tag, None without one or without text."""
        child = self.find(tag)
        return (child.text.strip() or None) if child is not None else None

    def number(self, tag: str) -> float:
        """Return the number that the first child of a tag holds.

        Raises:
            InputError: no such child, or no number.
        """
        child = self.find(tag)
        if child is None:
            remedy = "Add it."
            fail(self.where, expected=f"<{tag}> in <{self.tag}>", got="no such element",
                 remedy=remedy)  # fmt: skip
        return child.as_number()

    def as_number(self) -> float:
        """Return the text as a number.

        Raises:
            InputError: it is none.
        """
        try:
            value = float(self.text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            expected = f"a number in <{self.tag}>"
            fail(self.where, expected=expected, got=repr(self.text.strip()), remedy="Correct it.")
        return value


def read_xml(path: Path) -> Node:
    """Return the root element of a file.

    Raises:
        InputError: it cannot be read, or is not xml; names the line.
    """
    parser = expat.ParserCreate()
    root = Node("", path, 0)
    open_nodes = [root]

    def start(tag: str, _: object) -> None:
        node = Node(tag, path, parser.CurrentLineNumber)
        open_nodes[-1].children.append(node)
        open_nodes.append(node)

    def end(_: str) -> None:
        open_nodes.pop()

    def text(words: str) -> None:
        open_nodes[-1].text += words

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        message = expat.ErrorString(error.code)
        raise InputError(
            f"{path}, line {error.lineno}: expected xml, got text that is not ({message}). "
            "Check that the file was written completely."
        ) from error
    except OSError as error:
        raise InputError(f"{path}: expected a file, got {error.strerror}. Check it.") from error
    return root.children[0]
