"""The command line: `vitdet COMMAND ...`.

Exit status: 0 done; 1 done, and the answer is no (each command says which); 2 an input is wrong,
with one line on the error stream.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitdet.app import (
    convert,
    data_check,
    doctor,
    export,
    inspect,
    plan,
    predict,
    replay,
    report,
    serve,
    strip,
    train,
    val,
)
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
        name="train",
        what="train a detector on your own images",
        add_arguments=train.add_arguments,
        run=train.run,
    ),
    Command(
        name="doctor",
        what="say what would go wrong in a training, before it starts",
        add_arguments=doctor.add_arguments,
        run=doctor.run,
        status="there is a fault",
    ),
    Command(
        name="data",
        what="check a data set: faults with pictures, and a repaired copy",
        add_arguments=data_check.add_arguments,
        run=data_check.run,
        status="there are faults",
    ),
    Command(
        name="predict",
        what="find objects in images, folders and videos, and draw them",
        add_arguments=predict.add_arguments,
        run=predict.run,
        status="some of the images could not be read",
    ),
    Command(
        name="val",
        what="evaluate a checkpoint: AP on its recipe's test set or on other data",
        add_arguments=val.add_arguments,
        run=val.run,
    ),
    Command(
        name="strip",
        what="write a checkpoint's weights, class names and recipe alone, to predict with",
        add_arguments=strip.add_arguments,
        run=strip.run,
    ),
    Command(
        name="convert",
        what="convert weights for a recipe, to other classes, or to another project's names",
        add_arguments=convert.add_arguments,
        run=convert.run,
        status="some keys of the file are unaccounted for, and nothing is written",
    ),
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
    Command(
        name="export",
        what="write a detector for ONNX, TorchScript or torch.export, compared with PyTorch",
        add_arguments=export.add_arguments,
        run=export.run,
        status="the file does not find what the model finds, and is not written",
    ),
    Command(
        name="replay",
        what="run the batch of a bad training step again, image by image",
        add_arguments=replay.add_arguments,
        run=replay.run,
        status="all is finite with these weights",
    ),
    Command(
        name="report",
        what="write a page about a run: AP, curves, errors and the worst images",
        add_arguments=report.add_arguments,
        run=report.run,
    ),
    Command(
        name="serve",
        what="serve a page to which one gives an image, and sees what is found",
        add_arguments=serve.add_arguments,
        run=serve.run,
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
    except BrokenPipeError:  # what reads the output, as head does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
