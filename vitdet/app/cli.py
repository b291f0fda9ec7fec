"""The command line: `vitdet COMMAND ...`.

Exit status: 0 done; 1 done, and the answer is no (each command says which); 2 an input is wrong,
with one line on the error stream.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitdet.app import inspect, plan
from vitdet.utils.checks import InputError


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        name: the word on the command line.
        what: one line for people.
        add_arguments: adds its options to a parser.
        run: does it, and returns the exit status.
        status: what exit status 1 means, "" when there is none.
    """

    name: str
    what: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    status: str = ""


COMMANDS = (
    Command(
        name="inspect",
        what="say what a weights file holds, and which recipes it fits",
        add_arguments=inspect.add_arguments,
        run=inspect.run,
        status="the file can be read, and its format is none that is known",
    ),
    Command(
        name="plan",
        what="say what a training takes: memory, time, and the batch that fits",
        add_arguments=plan.add_arguments,
        run=plan.run,
        status="not even one image fits",
    ),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
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
        command.add_arguments(part)
        part.set_defaults(run=command.run)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
