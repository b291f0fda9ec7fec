"""`vitdet doctor CONFIG`: what would go wrong in a training, before it starts.

The model is built without memory (meta device), the annotations are read, and some image files are
looked for. Nothing is written, but for the embedded data set, which is drawn when it is not there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vitdet.app.doctor.finding import FAULT, page
from vitdet.app.doctor.patient import examine
from vitdet.config import load_config
from vitdet.utils.checks import fail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("config", type=Path, help="a recipe")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to it"
    )
    parser.add_argument("--processes", type=int, default=1, help="that share the batch")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of each; left out: what is free here"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out what follows a whole step (memory)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the page; return 0, or 1 when there is a fault.

    Raises:
        InputError: a recipe that does not load, a wrong option.
    """
    for name, least in (("processes", 1), ("memory", 0.0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            fail(f"--{name}", expected=f"at least {least:g}", got=value, remedy="Leave it out.")
    cfg = load_config(args.config, args.overrides)
    findings = examine(cfg, processes=args.processes, memory_gib=args.memory, quick=args.quick)
    print(f"vitdet doctor {args.config}\n\n{page(findings)}")
    return int(any(each.level == FAULT for each in findings))
