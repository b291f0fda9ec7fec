"""The command line: `vitdet COMMAND ...`.

Exit status: 0 done; 1 done, and the answer is no (each command says which); 2 an input is wrong or
a file cannot be read or written, with one line on the error stream; 130 interrupted by ^C.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from vitdet import __version__
from vitdet.app.options import ARGUMENTS, check_paths
from vitdet.app.words import translated
from vitdet.utils.checks import exit_status

# Command -> one line for people, and what exit status 1 means, if anything. Its options stand in
# `options.ARGUMENTS`; `run(args)` of the module of its name in `vitdet.app` returns the status.
COMMANDS = {
    "train": ("train a detector on your own images",),
    "recipe": ("train or evaluate a recipe, on one machine or several",),
    "data": ("check a data set: faults with pictures, and a repaired copy", "there are faults"),
    "predict": (
        "find objects in images, folders and videos, and draw them",
        "some of the images could not be read",
    ),
    "val": ("evaluate a checkpoint: AP on its recipe's test set or on other data",),
    "strip": ("write a checkpoint's weights, class names and recipe alone, to predict with",),
    "weights": ("list published weights that have a name here: AP, size, licence, origin",),
    "convert": (
        "convert weights for a recipe, to other classes, or to another project's names",
        "some keys of the file are unaccounted for, and nothing is written",
    ),
    "inspect": (
        "say what a weights file holds, and which recipes it fits",
        "the file can be read, and its format is none that is known",
    ),
    "export": (
        "write a detector as ONNX, compared with PyTorch",
        "the file does not find what the model finds, and is not written",
    ),
    "report": ("write a page about a run: AP, curves, errors and the worst images",),
    "setup": ("bring detectron2, and what it imports, where they are missing",),
    "serve": ("serve a page to which one gives an image, and sees what is found",),
}
_MODULES = {"data": "data_check"}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line, and as `module` where the `run` of its command is.

    What is no option may stand before, between and behind the options.
    """
    ends = "Exit status: 0 done{}; 2 an input is wrong."
    whole = argparse.ArgumentParser(
        prog="vitdet",
        allow_abbrev=False,
        description="Plain-ViT object detection and instance segmentation.",
        epilog=ends.format("; 1 done and the answer is no"),
    )
    whole.add_argument("--version", action="version", version=f"vitdet {__version__}")
    parts = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (what, *no) in COMMANDS.items():
        text = f"{what[0].upper()}{what[1:]}."
        epilog = ends.format("".join(f"; 1 {each}" for each in no))
        about = {"help": what, "description": text, "epilog": epilog}
        part = parts.add_parser(name, allow_abbrev=False, **about)
        if words and words[0] == name:
            ARGUMENTS[name](part)
            part.set_defaults(module=f"vitdet.app.{_MODULES.get(name, name)}")
            return part.parse_intermixed_args(translated(part, words[1:]))
    return whole.parse_args(words)  # prints the help, or what is wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""

    def run() -> int:
        args = parse(sys.argv[1:] if argv is None else argv)
        check_paths(args)
        return importlib.import_module(args.module).run(args)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
