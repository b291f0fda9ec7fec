"""`vitdet report RUN`: a page about a run, whole in one file, that needs no network to be seen."""

from __future__ import annotations

import argparse

from vitdet.utils import thresholds
from vitdet.utils.checks import InputError


def run(args: argparse.Namespace) -> int:
    """Write the page; return 0.

    Raises:
        InputError: a wrong option; a folder without a run; data that is not there.
    """
    thresholds.chosen(args.threshold, {})  # said before the work
    if args.images < 0:
        raise InputError(f"--images {args.images}: expected 0 or more.")
    folder = args.run_folder.parent if args.run_folder.is_file() else args.run_folder
    out = args.out or folder / "report.html"
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}. Make it first.")
    # matplotlib and the engine are slow to import, and --help needs neither
    from vitdet.app.pages import render
    from vitdet.app.report.page import MARKS, NAMES, read_run, sections
    from vitdet.utils.files import write_text

    found = read_run(folder, args.predictions, trust=args.trust)
    source = str(folder / "results.json")
    which = min(found.note.get(thresholds.KEY, ["model"]))  # those of "ema" are evaluated last
    least = thresholds.chosen(args.threshold, found.note, which, source)
    verdict, parts = sections(found, args.iou_type, least, args.images)
    about = f"{found.checkpoint} on {found.dataset.name}, threshold {least.text()}"
    values = {"about": about, "verdict": verdict, "kind": NAMES[args.iou_type], "marks": MARKS}
    values["sections"] = parts
    write_text(out, render("report.html", title=folder.resolve().name, **values))
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
