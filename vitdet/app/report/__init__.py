"""`vitdet report RUN`: a page about a run, whole in one file, that needs no network to be seen."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitdet.utils.checks import fail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_folder", type=Path, help="train.output_dir of a run, evaluated")
    parser.add_argument("--out", type=Path, help="the page; left out: report.html in the folder")
    parser.add_argument(
        "--iou-type",
        choices=["bbox", "segm"],
        default="bbox",
        help="what curves, errors and confusion are about: boxes or masks (default bbox)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="score that counts in pictures and confusion matrix (default 0.5)",
    )
    parser.add_argument("--images", type=int, default=12, help="worst images shown (default 12)")
    parser.add_argument(
        "--predictions",
        type=Path,
        help="results in COCO's format; left out: the weights run over the test data once",
    )
    parser.add_argument(
        "--trust", action="store_true", help="build parts of the run's recipe from outside vitdet"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def run(args: argparse.Namespace) -> int:
    """Write the page; return 0.

    Raises:
        InputError: a wrong option; a folder without a run; data that is not there.
    """
    if not 0 <= args.threshold <= 1:
        got = args.threshold
        fail("--threshold", expected="a score from 0 to 1", got=got, remedy="Correct it.")
    if args.images < 0:
        fail("--images", expected="0 or more", got=args.images, remedy="Correct it.")
    # matplotlib and the engine are slow to import, and --help needs neither
    from vitdet.app.report.page import write_page
    from vitdet.app.report.run_folder import read_run

    if args.run_folder.is_file():  # model_final.pth, results.json: its run is meant
        args.run_folder = args.run_folder.parent
    out = args.out or args.run_folder / "report.html"
    if not out.parent.is_dir():
        got = f"no folder {out.parent}"
        fail(f"--out {out}", expected="a folder that exists", got=got, remedy="Make it first.")
    found = read_run(args.run_folder, args.predictions, args.device, trust=args.trust)
    write_page(found, out, args.iou_type, args.threshold, args.images)
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
