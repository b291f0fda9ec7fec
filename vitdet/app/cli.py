"""The command line: `vitdet COMMAND ...`.

Exit status: 0 done; 1 done, and the answer is no (each command says which); 2 an input is wrong or
a file cannot be read or written, with one line on the error stream; 130 interrupted by ^C.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitdet.utils.checks import exit_status


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        name: the word on the command line.
        what: one line for people.
        home: the module of `vitdet.app` with `add_arguments(parser)` and `run(args)`, which returns
            the exit status. It is imported when the command is called.
        status: what exit status 1 means, "" when there is none.
    """

    name: str
    what: str
    home: str
    status: str = ""

    def module(self) -> Any:
        """Import its module."""
        return importlib.import_module(f"vitdet.app.{self.home}")


COMMANDS = (
    Command(
        name="train",
        what="train a detector on your own images",
        home="train",
    ),
    Command(
        name="data",
        what="check a data set: faults with pictures, and a repaired copy",
        home="data_check",
        status="there are faults",
    ),
    Command(
        name="predict",
        what="find objects in images, folders and videos, and draw them",
        home="predict",
        status="some of the images could not be read",
    ),
    Command(
        name="val",
        what="evaluate a checkpoint: AP on its recipe's test set or on other data",
        home="val",
    ),
    Command(
        name="strip",
        what="write a checkpoint's weights, class names and recipe alone, to predict with",
        home="strip",
    ),
    Command(
        name="convert",
        what="convert weights for a recipe, to other classes, or to another project's names",
        home="convert",
        status="some keys of the file are unaccounted for, and nothing is written",
    ),
    Command(
        name="inspect",
        what="say what a weights file holds, and which recipes it fits",
        home="inspect",
        status="the file can be read, and its format is none that is known",
    ),
    Command(
        name="export",
        what="write a detector as ONNX, compared with PyTorch",
        home="export",
        status="the file does not find what the model finds, and is not written",
    ),
    Command(
        name="report",
        what="write a page about a run: AP, curves, errors and the worst images",
        home="report",
    ),
    Command(
        name="serve",
        what="serve a page to which one gives an image, and sees what is found",
        home="serve",
    ),
)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line, and the `run` of the command that it names.

    What is no option may stand before, between and behind the options.
    """
    whole = argparse.ArgumentParser(
        prog="vitdet",
        description="Plain-ViT object detection and instance segmentation.",
        epilog="Exit status: 0 done, 1 done and the answer is no, 2 an input is wrong.",
    )
    parts = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        status = f"; 1 {command.status}" if command.status else ""
        part = parts.add_parser(
            command.name,
            help=command.what,
            description=f"{command.what[0].upper()}{command.what[1:]}.",
            epilog=f"Exit status: 0 done{status}; 2 an input is wrong.",
        )
        if words and words[0] == command.name:
            module = command.module()
            module.add_arguments(part)
            part.set_defaults(run=module.run)
            return part.parse_intermixed_args(words[1:])
    return whole.parse_args(words)  # prints the help, or what is wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""

    def run() -> int:
        args = parse(sys.argv[1:] if argv is None else argv)
        return args.run(args)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
