"""Reading xml of strangers: any encoding that it declares, no entities, errors of one line."""

from __future__ import annotations

import codecs
import math
import re
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from vitdet.data.files import MAX_TEXT, kind_of, read_bytes
from vitdet.utils.checks import InputError

_DECLARED = re.compile(rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030"}  # what tools declare, and what they write
_MAX_DEPTH = 100


class _Builder(ElementTree.TreeBuilder):
    """Stops at depths that no label has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.depth = path, 0

    def start(self, tag: str, attrs: dict[str, str]) -> Element:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise InputError(f"{self.path}: expected xml, got elements nested too deep. Check it.")
        return super().start(tag, attrs)

    def end(self, tag: str) -> Element:
        self.depth -= 1
        return super().end(tag)


def read_xml(path: Path) -> Element:
    """Return the root element of a file.

    Raises:
        InputError: it cannot be read, is no xml, declares entities, or is nested too deep.
    """
    data = read_bytes(path, MAX_TEXT)
    try:
        text = _decoded(data)
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise InputError(
                f"{path}: expected plain xml, got declarations. Remove <!DOCTYPE ...>."
            )
        parser = ElementTree.XMLParser(target=_Builder(path))
        parser.feed(text)
        return parser.close()
    except ElementTree.ParseError as error:
        what = kind_of(data) or f"text that is not ({error.msg.partition(':')[0]})"
        raise InputError(
            f"{path}, line {error.position[0]}: expected xml, got {what}. "
            "Check that the file was written completely."
        ) from error
    except (LookupError, UnicodeError) as error:
        raise InputError(
            f"{path}: expected xml in UTF-8 or in the encoding that it declares, got text that is "
            f"in neither ({error}). Save it as UTF-8."
        ) from error


def _decoded(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16").partition("?>")[2]
    declared = _DECLARED.search(data[:300])
    encoding = declared[1].decode().lower() if declared else "utf-8"
    encoding = {"utf-8": "utf-8-sig", "utf8": "utf-8-sig", **_WIDER}.get(encoding, encoding)
    text = data.decode(encoding)
    return re.sub(r"^\s*<\?xml[^>]*\?>", "", text)


def is_voc(path: Path) -> bool:
    """Whether the file may be of Pascal VOC: it has such a root, or is broken."""
    head = read_bytes(path, MAX_TEXT)[:2000].replace(b"\x00", b"")
    return re.search(rb"<annotation[\s/>]", head) is not None or kind_of(head) is not None


def word(element: Element, tag: str) -> str:
    """Return the text of the first child of a tag, "" without one."""
    return (element.findtext(tag) or "").strip()


def child(path: Path, element: Element, tag: str) -> Element:
    """Return the first child of a tag.

    Raises:
        InputError: no such child.
    """
    found = element.find(tag)
    if found is None:
        raise InputError(
            f"{path}: expected <{tag}> in <{element.tag}>, got no such element. Add it."
        )
    return found


def number(path: Path, element: Element) -> float:
    """Return the text of an element as a number.

    Raises:
        InputError: it is none.
    """
    text = (element.text or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}: expected a number in <{element.tag}>, got {text!r}. Correct it.")
    return value
