"""The README's and the docs' commands, files and keys exist."""

import re
import shlex
from pathlib import Path

import pytest

import train_net
from tests.recipes import NAMES
from vitdet.app.options import parse_convert
from vitdet.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"train_net.py": train_net.parse, "converter.py": parse_convert}


def commands():
    """Return the train_net and converter commands of all pages, split into words."""
    texts = [page.read_text().replace("\\\n", " ") for page in PAGES]
    pattern = re.compile(r"^\s*python ((?:train_net|converter)\.py .*)$", re.MULTILINE)
    found = [shlex.split(each, comments=True) for text in texts for each in pattern.findall(text)]
    return [words for words in found if not any(w.isupper() or "..." in w for w in words)]


@pytest.mark.slow
def test_commands_parse_and_their_keys_exist():
    assert len(commands()) >= 8
    for words in commands():
        args = PARSERS[words[0]](words[1:])
        load_config(ROOT / args.config_file, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    files = r"\b((?:configs|vitdet|benchmarks|docs|tests)/[\w/]+\.(?:py|md))\b"
    for name in re.findall(files, text):
        row = name.removeprefix("configs/").removesuffix(".py")
        assert (ROOT / name).exists() or row in NAMES, name
