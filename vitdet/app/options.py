"""Options that several commands have: a weights file, how it is read, how its detector is used."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdet.utils.checks import InputError

if TYPE_CHECKING:  # slow to import, and what only reads options needs none of it
    from vitdet.predict.predictor import Predictor


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a weights file is read."""
    add = parser.add_argument
    text = "ema: the moving average of the weights"
    add("--use", choices=["model", "ema"], default="model", help=text)
    add("--config-file", metavar="FILE", help="recipe, where the file holds none")
    text = "list of names or COCO json, where it holds none"
    add("--class-names", type=Path, metavar="JSON", help=text)
    text = "build parts from outside vitdet that the file names: it may run code of its author"
    add("--trust", action="store_true", help=text)


def file_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of `add_file_arguments` are to `Predictor.from_checkpoint`.

    Raises:
        InputError: a list of class names that cannot be read.
    """
    from vitdet.convert.classes import read_classes

    return {
        "config": args.config_file,
        "class_names": read_classes(args.class_names) if args.class_names else None,
        "weights": args.use,
        "trust": args.trust,
    }


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --weights and the options that say how that file is read."""
    text = "a run's .pth, a file of `vitdet strip`, a detector of another project, or a name"
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help=text)
    add_file_arguments(parser)


def add_threshold_argument(parser: argparse.ArgumentParser) -> None:
    """Add the score from which a detection counts."""
    text = "least score; left out: by class what the evaluation found (0.5 where there was none)"
    parser.add_argument("--threshold", type=float, metavar="SCORE", help=text)


def add_predictor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which detector computes, and how."""
    add_weights_arguments(parser)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--batch-size", type=int, default=1, metavar="N", help="images at once")
    add("--tta", action="store_true", help="test-time augmentation: also look at the mirror image")
    text = "and at these sizes; 1 is the recipe's (with --tta)"
    add("--tta-scales", metavar="A,B", help=text)
    text = "cut images into overlapping parts of this side"
    add("--slices", type=int, metavar="SIDE", help=text)
    text = "of neighbouring parts (default 0.25)"
    add("--overlap", type=float, metavar="SHARE", help=text)


def load_predictor(args: argparse.Namespace, **options: Any) -> Predictor:
    """Return the predictor that the options of `add_predictor_arguments` describe.

    `options` are further arguments of `Predictor.from_checkpoint`.

    Raises:
        InputError: a wrong option, or what `Predictor.from_checkpoint` raises.
    """
    from vitdet.predict.augmentation import TestTimeAugmentation
    from vitdet.predict.predictor import Predictor
    from vitdet.predict.slicing import Slices

    try:
        scales = tuple(map(float, (args.tta_scales or "1").split(",")))
    except ValueError as error:
        text = f"expected numbers such as 1,1.25, got {args.tta_scales}"
        raise InputError(f"--tta-scales: {text}") from error
    if args.overlap is not None and args.slices is None:
        raise InputError("--overlap: expected --slices beside it, got none. Add it.")
    overlap = 0.25 if args.overlap is None else args.overlap
    return Predictor.from_checkpoint(
        args.weights,
        **file_options(args),
        device=args.device,
        batch_size=args.batch_size,
        tta=TestTimeAugmentation(scales, flip=args.tta) if args.tta or args.tta_scales else None,
        slices=None if args.slices is None else Slices(args.slices, overlap),
        **options,
    )
