"""`vitdet weights`: the published weights that `--weights` takes by name."""

from __future__ import annotations

import argparse

from vitdet.published import ROWS

_TITLES = ("name", "kind", "box AP", "mask AP", "params [M]", "licence", "from")


def run(args: argparse.Namespace) -> int:
    """Print a line a file; return 0."""
    lines: list[tuple[str, ...]] = [_TITLES]
    for row in ROWS.values():
        if all(word.lower() in row.name.lower() for word in args.words):
            numbers = (row.box_ap or "-", row.mask_ap or "-", row.millions or "-")
            lines.append((row.name, row.kind, *numbers, row.licence, row.origin))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
    print("AP is their authors', on COCO val2017 or LVIS val; after Objects365, with --use ema.")
    print("--weights also takes hf:OWNER/NAME[/FILE][@REVISION], timm:NAME and https://...")
    return 0
