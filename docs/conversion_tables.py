"""The tables of docs/conversion.md, made from the code: `python docs/conversion_tables.py`.

What a target format can hold is found by exporting the names and shapes of every recipe as it
follows a published file (of the manifests that the tests read: PYTHONPATH=. has to lead there).
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import torch

from tests.convert.manifests import find
from vitdet.app import follow
from vitdet.config import build_model, load_config
from vitdet.convert import FORMATS, TARGETS, export
from vitdet.convert.recipes import COMMANDS, WITHOUT_REL_POS, Command
from vitdet.utils.checks import InputError
from vitdet.utils.files import replacing
from vitdet.weights import Weights

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "conversion.md"
_BEGIN = "<!-- begin: python docs/conversion_tables.py -->\n"
_END = "<!-- end -->\n"
_REL_POS = re.compile(r".*\.rel_pos_[hw]$")
# What a target may have no place for: names, word, and whether a network is left without it.
_PARTS = (
    (r"rel_pos_", "relative positions", True),
    (r"residual\.", "propagation blocks", True),
    (r"ls[12]\.gamma$|gamma_[12]$", "LayerScale", True),
    (r"(^|\.)norm_pre\.", "first norm", True),
    (r"(^|\.)net\.norm\.", "last norm", True),
    (r"pos_embed$", "class row", True),
    (r"\.mlp\.w\d", "SwiGLU", False),
    (r"\.[qv]_bias$", "biases of q and v", False),
)


def main() -> int:
    """Write the tables into the page; return the exit status."""
    try:
        text = with_tables(PAGE.read_text())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with replacing(PAGE) as partial:
        partial.write_text(text)
    return 0


def with_tables(page: str) -> str:
    """Return a page with its generated part made anew.

    Raises:
        InputError: the page has no such part.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise InputError(f"{PAGE}: it has no part {_BEGIN.strip()} ... {_END.strip()}. Add it.")
    return before + begin + tables() + end + after


def tables() -> str:
    """Return the generated part of the page."""
    formats = [f"| `{fmt.name}` | {fmt.what} |" for fmt in FORMATS.values()]
    sources = [_source_row(command) for command in COMMANDS]
    direct = ", ".join(f"`{fmt.name}`" for fmt in FORMATS.values() if not fmt.makes)
    parts = [
        _table(("`--source-format`", "files"), formats),
        "### In: the command for a file\n",
        "`python converter.py --source-model FILE --output-model OUT --config-file configs/RECIPE "
        "ADD`.\n",
        _table(("files", "format", "RECIPE", "ADD"), sources),
        "### Out: what other projects can hold of it\n",
        "The command above with `--target-format`, for the backbone. *yes*: every weight; a list: "
        "what is left out with `--allow-inexact`; *no*: another network.\n",
        _table(("from", *(f"`{name}`" for name in TARGETS)), _target_rows()),
        f"No recipe is needed for `--target-format` from {direct}: their weights are renamed "
        "and nothing else.\n",
    ]
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: list[str]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *rows]
    return "\n".join(lines) + "\n"


def _source_row(command: Command) -> str:
    files = ", ".join(f"`{name}`" for name in command.files)
    added = " ".join((*command.options, *command.overrides))
    cells = (files, command.format, f"`{command.recipe}.py`", f"`{added}`" if added else "")
    return f"| {' | '.join(cells)} |"


def _target_rows() -> list[str]:
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for command in COMMANDS:
        row = groups.setdefault(cells(command), {})
        row.setdefault(command.format, []).extend(command.files)
    every: dict[str, int] = {}
    for command in COMMANDS:
        every[command.format] = every.get(command.format, 0) + len(command.files)
    rows = []
    for found, formats in groups.items():
        parts = (
            f"all of {name}" if len(files) == every[name] else f"{name}: {_some(files)}"
            for name, files in formats.items()
        )
        rows.append(f"| {'; '.join(parts)} | {' | '.join(found)} |")
    return rows


def _some(files: list[str]) -> str:
    names = ", ".join(f"`{name}`" for name in files[:3])
    return names + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def cells(command: Command) -> tuple[str, ...]:
    """Return for every target format what it can hold of the backbone that a command gives."""
    weights = _backbone(command)
    if command.format in WITHOUT_REL_POS:
        weights = {name: value for name, value in weights.items() if not _REL_POS.match(name)}
    return tuple(_cell(weights, target) for target in TARGETS)


@cache
def _backbone(command: Command) -> dict[str, torch.Tensor]:
    path = ROOT / "configs" / f"{command.recipe}.py"
    cfg = load_config(path, command.overrides)
    found = Weights(find(command.files[0]).content())
    if lines := follow.changes(cfg, found, command.overrides):
        cfg = load_config(path, [*lines, *command.overrides])
    return build_model(cfg.model, device="meta").state_dict()


def _cell(weights: dict[str, torch.Tensor], target: str) -> str:
    try:
        _, report = export(weights, target, backbone_only=True, allow_inexact=True)
    except InputError:
        return "no"
    lost: dict[str, bool] = {}
    for name in report.inexact:
        found = next((part for part in _PARTS if re.search(part[0], name)), None)
        if found is None:
            raise InputError(f"{target}: there is no word for {name}. Add one to _PARTS.")
        lost[found[1]] = found[2]
    if not all(lost.values()):
        return "no"
    return ", ".join(lost) or "yes"


if __name__ == "__main__":
    sys.exit(main())
