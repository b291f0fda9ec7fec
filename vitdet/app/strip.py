"""`vitdet strip FILE OUT`: a slim file of weights, class names and recipe, to predict with."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitdet.app.options import add_file_arguments, file_options
from vitdet.predict.inference_file import save_for_inference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("source", type=Path, metavar="FILE", help="a checkpoint")
    parser.add_argument("output", type=Path, metavar="OUT", help=".safetensors or .pth")
    add_file_arguments(parser)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe"
    )


def run(args: argparse.Namespace) -> int:
    """Write the file; return 0.

    Raises:
        InputError: what `save_for_inference` raises.
    """
    written = save_for_inference(
        args.source,
        args.output,
        overrides=args.overrides,
        **file_options(args),
    )
    before, after = args.source.stat().st_size, written.stat().st_size
    print(f"wrote {written}: {after / 2**20:.1f} MiB ({args.source}: {before / 2**20:.1f} MiB)")
    return 0
