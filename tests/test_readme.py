"""The README's and the docs' commands, files and keys exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import train_net
from tests.recipes import NAMES
from vitdet.app import convert
from vitdet.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"train_net.py": train_net.parse, "converter.py": convert.parse}


def commands() -> list[list[str]]:
    """Return the train_net and converter commands of all pages, split into words."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^\s*python ((?:train_net|converter)\.py .*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if not any(word.isupper() or "..." in word for word in words):
                found.append(words)
    return found


def test_pages_are_found():
    assert len(PAGES) >= 7
    assert len(commands()) >= 8


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_parse_and_their_keys_exist(words):
    args = PARSERS[words[0]](words[1:])
    load_config(ROOT / args.config_file, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
    for name in re.findall(
        r"\b((?:configs|vitdet|benchmarks|docs|tests)/[\w/]+\.(?:py|md))\b", text
    ):
        row = name.removeprefix("configs/").removesuffix(".py")
        assert (ROOT / name).exists() or row in NAMES, name
