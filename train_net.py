"""Train or evaluate a recipe: `python train_net.py --config-file configs/... [key=value ...]`.

`vitdet recipe` does the same.
"""

from __future__ import annotations

import argparse
import sys

from vitdet.app import recipe
from vitdet.app.options import ARGUMENTS
from vitdet.app.recipe import main
from vitdet.app.words import translated
from vitdet.utils.checks import exit_status

__all__ = ["main", "parse", "run"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as detectron2's tools name it."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=recipe.WHAT, epilog=recipe.ENDS
    )
    ARGUMENTS["recipe"](parser)
    words = sys.argv[1:] if arguments is None else arguments
    return parser.parse_intermixed_args(translated(parser, words))


def run(arguments: list[str] | None = None) -> int:
    """Start the processes; return the exit status, that of a preemption as a SystemExit."""
    args = parse(arguments)
    return exit_status(lambda: recipe.run(args))


if __name__ == "__main__":
    sys.exit(run())
