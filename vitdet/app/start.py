"""A training that begins with a file of another project: converted in the first process."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from vitdet import weights
from vitdet.app import convert, follow, options
from vitdet.config import load_config
from vitdet.convert.describe import about_of
from vitdet.engine.run import alone_in, check_new
from vitdet.utils.checks import InputError


def converted(
    source: str | Path, place: Path, recipe: str | Path, words: Sequence[str], fits: str
) -> tuple[str, list[str]]:
    """Convert a file into `place`/start.pth for a recipe.

    Args:
        source: what --weights named.
        place: a folder; it may be made.
        recipe: the recipe's file.
        words: other words for the converter, changes to the recipe among them.
        fits: what an error begins with.

    Returns:
        The file written, and the changes to the recipe that it is for.

    Raises:
        InputError: it cannot be converted.
    """
    place.mkdir(parents=True, exist_ok=True)
    output = str(place / "start.pth")
    given = ["--source-model", str(source), "--output-model", output, "--config-file", str(recipe)]
    args = options.parse_convert([*given, *words])
    try:
        convert.convert_file(args)
    except InputError as error:
        why = str(error).removeprefix(f"{source}: ")
        if "--" in why:
            given[3:4], allow = ["OUT.pth"], ["--allow-inexact"] * ("--allow-inexact" in why)
            command = shlex.join(["vitdet", "convert", *given, *words, *allow])
            why += f" `{command}` has these options, and --weights OUT.pth takes what it writes."
        raise InputError(f"--weights {source}: {fits}: {why}") from error
    return output, args.overrides


@contextmanager
def from_weights(args: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the changes to the recipe of train_net.py's command line, first --weights', --tune's.

    A file of ours, or one that converter.py wrote, is loaded as it is, with the changes that it
    was converted for. Any other is converted: into the run's folder, whose record a --resume reads,
    or, where nothing is trained, into one that goes at the end of the block.

    Raises:
        InputError: the file, or a launch of several that would each convert it.
    """
    trains = not (args.dry_run or args.eval_only or args.print_groups)
    with ExitStack() as stack:
        lines: list[str] = []
        if args.weights or args.resume or trains:
            place = Path(load_config(args.config_file, args.overrides).train.output_dir)
            if record := follow.begun(args, place):
                lines = record["overrides"]
            elif args.weights or trains:
                if not trains:
                    place = Path(stack.enter_context(TemporaryDirectory()))
                check_new(place, args.resume)
                _forget(args, place)
                lines = _begun(args, place) if args.weights else []
        if args.tune:
            lines += follow.tuned(load_config(args.config_file), args.tune, args.overrides)
        yield [*lines, *args.overrides]


def _forget(args: argparse.Namespace, place: Path) -> None:
    """Remove the record of a run that ended before its first checkpoint."""
    record, is_main = place / follow.RECORD, os.environ.get("RANK", "0") == "0"
    if is_main and not args.machine_rank and record.is_file():
        with alone_in(place):
            record.unlink()


def _begun(args: argparse.Namespace, place: Path) -> list[str]:
    """Convert the file into `place` if need be; return the changes to the recipe, and keep them."""
    args.weights = weights.locate(args.weights)
    source, content = f"--weights {args.weights}", weights.read(args.weights).content
    start, lines = str(args.weights), follow.remembered(content, source=source)
    if args.num_machines > 1 or "LOCAL_RANK" in os.environ:
        if not about_of(content):
            raise InputError(
                f"{source}: expected one machine without torchrun for a file that has to be "
                "converted. Convert it first (vitdet convert), and give --weights the output."
            )
        return [*lines, follow.setting("train.init_checkpoint", start)]
    with alone_in(place):
        if not about_of(content):
            recipe, typed = Path(args.config_file), args.overrides
            fits = f"it does not fit {recipe.name}"
            start, changed = converted(args.weights, place, recipe, typed, fits)
            lines = changed[: len(changed) - len(typed)]
        lines = [*lines, follow.setting("train.init_checkpoint", start)]
        follow.keep(place, {"overrides": lines, "weights": str(args.weights.absolute())})
    return lines
