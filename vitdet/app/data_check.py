"""`vitdet data check FOLDER`: what is wrong with a data set, and a repaired copy of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from vitdet.app.data_page import page
from vitdet.data.checking import KINDS, Checked, Finding, check_data
from vitdet.data.checking.repair import check_output, write_repaired
from vitdet.data.formats import FORMATS, find_data
from vitdet.utils.files import write_text

_EXAMPLES = 3  # a kind, in the text; the page has pictures of more
_IN_JSON = 20
_STEP = 200  # images between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("action", choices=["check"], help="the only one so far")
    parser.add_argument("data", type=Path, help="folder of the data, or an annotation file")
    parser.add_argument("--format", choices=list(FORMATS), help="of the data; left out: found out")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="images, where they are not with the labels"
    )
    parser.add_argument("--out", type=Path, metavar="HTML", help="write a page with pictures")
    parser.add_argument(
        "--fix", type=Path, metavar="DIR", help="write a repaired copy into this new folder"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")


def run(args: argparse.Namespace) -> int:
    """Check; return 0, or 1 when there are faults (with --fix: in the repaired copy).

    Raises:
        InputError: data that cannot be read at all, or an output that cannot be written.
    """
    data = find_data(args.data, args.format, args.images)
    if args.fix:  # before the work rather than after it
        check_output(data.folder, [part.images for part in data.parts.values()], args.fix)
    checked = check_data(data, None if args.json else _progress)
    if args.out:
        write_text(args.out, page(checked))
    print(json.dumps(as_json(checked), indent=1) if args.json else _text(checked), flush=True)
    if args.out:
        _say(args, f"page         {args.out}")
    if not args.fix:
        return 1 if checked.faults else 0
    repairs = write_repaired(checked, args.fix)
    again = check_data(find_data(args.fix))
    _say(args, f"repaired     {len(repairs)} changes, listed in {args.fix / 'repairs.json'}")
    for kind, count in Counter(each.kind for each in again.faults).items():
        _say(args, f"still        {count} x {kind}")
    return 1 if again.faults else 0


def as_json(checked: Checked) -> dict[str, Any]:
    """Return what was found, as plain values."""
    by_kind = _by_kind(checked)
    return {
        "folder": str(checked.data.folder),
        "format": checked.data.format,
        "parts": {
            split: {key: len(part.content[key]) for key in ("images", "annotations")}
            for split, part in checked.data.parts.items()
        },
        "faults": len(checked.faults),
        "classes": {split: class_counts(checked, split) for split in checked.data.parts},
        "findings": {
            kind: {
                "severity": KINDS[kind].severity,
                "text": KINDS[kind].text,
                "repair": KINDS[kind].repair,
                "count": len(found),
                "examples": [_example(each) for each in found[:_IN_JSON]],
            }
            for kind, found in by_kind.items()
        },
    }


def class_counts(checked: Checked, split: str) -> dict[str, int]:
    """Return {class: objects} of a part, crowd regions left out."""
    content = checked.data.parts[split].content
    counts = Counter(
        each.get("category_id")
        for each in content["annotations"]
        if not each.get("iscrowd") and isinstance(each.get("category_id"), int)
    )
    return {each["name"]: counts[each["id"]] for each in content["categories"]}


def _example(finding: Finding) -> dict[str, Any]:
    keys = ("split", "where", "expected", "got", "image_id")
    return {key: getattr(finding, key) for key in keys}


def _by_kind(checked: Checked) -> dict[str, list[Finding]]:
    """Return the findings of each kind, faults first, then the most frequent."""
    found: dict[str, list[Finding]] = defaultdict(list)
    for each in checked.findings:
        found[each.kind].append(each)
    order = sorted(found, key=lambda kind: (KINDS[kind].severity != "fault", -len(found[kind])))
    return {kind: found[kind] for kind in order}


def _text(checked: Checked) -> str:
    parts = [
        f"{split} {len(part.content['images'])} images, {len(part.content['annotations'])} objects"
        for split, part in checked.data.parts.items()
    ]
    lines = [f"data         {checked.data.format}: {'; '.join(parts)}"]
    for kind, found in _by_kind(checked).items():
        about = KINDS[kind]
        lines.append(f"{about.severity:<12} {len(found)} x {kind}: {about.text}")
        for each in found[:_EXAMPLES] if about.severity == "fault" else []:
            lines.append(f"{'':<14} {each.split}, {each.where}: {_told(each)}")
    faults, images = checked.faults, {(each.split, each.image_id) for each in checked.faults}
    result = f"{len(faults)} faults in {len(images)} images" if faults else "no faults"
    return "\n".join([*lines, f"result       {result}"])


def _told(finding: Finding) -> str:
    expected = f"expected {finding.expected}, " if finding.expected else ""
    return f"{expected}got {finding.got}"


def _say(args: argparse.Namespace, text: str) -> None:
    """Print a line; beside JSON on the error stream."""
    print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def _progress(seen: int, total: int) -> None:
    if seen % _STEP == 0 and total > _STEP:
        print(f"looked at {seen} of {total} images", file=sys.stderr, flush=True)
