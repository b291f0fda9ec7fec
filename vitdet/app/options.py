"""Options that several commands have: a weights file, how it is read, how its detector is used."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdet.utils.checks import fail

if TYPE_CHECKING:  # slow to import, and what only reads options needs none of them
    from vitdet.predict.augmentation import TestTimeAugmentation
    from vitdet.predict.predictor import Predictor
    from vitdet.predict.slicing import Slices


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a weights file is read."""
    parser.add_argument(
        "--use",
        choices=["model", "ema"],
        default="model",
        help="ema: the moving average of the weights",
    )
    parser.add_argument("--config-file", metavar="FILE", help="recipe, where the file holds none")
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="JSON",
        help="list of names or COCO json, where it holds none",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="build parts from outside vitdet that the file names: it may run code of its author",
    )


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
    parser.add_argument(
        "--weights",
        type=Path,
        required=True,
        metavar="FILE",
        help="a run's .pth, a file of `vitdet strip`, or with --config-file a converted file",
    )
    add_file_arguments(parser)


def add_predictor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which detector computes, and how."""
    add_weights_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at once")
    parser.add_argument(
        "--tta", action="store_true", help="test-time augmentation: look at the mirror image, too"
    )
    parser.add_argument(
        "--tta-scales", metavar="A,B", help="and at these sizes; 1 is the recipe's (with --tta)"
    )
    parser.add_argument(
        "--slices", type=int, metavar="SIDE", help="cut images into overlapping parts of this side"
    )
    parser.add_argument(
        "--overlap", type=float, metavar="SHARE", help="of neighbouring parts (default 0.25)"
    )


def load_predictor(args: argparse.Namespace, **options: Any) -> Predictor:
    """Return the predictor that the options describe.

    Args:
        args: the options of `add_predictor_arguments`.
        options: further arguments of `Predictor.from_checkpoint`.

    Raises:
        InputError: a wrong option, or what `Predictor.from_checkpoint` raises.
    """
    from vitdet.predict.predictor import Predictor

    return Predictor.from_checkpoint(
        args.weights,
        **file_options(args),
        device=args.device,
        batch_size=args.batch_size,
        tta=_views(args),
        slices=_slices(args),
        **options,
    )


def _views(args: argparse.Namespace) -> TestTimeAugmentation | None:
    from vitdet.predict.augmentation import TestTimeAugmentation

    if not args.tta_scales:
        return TestTimeAugmentation() if args.tta else None
    try:
        scales = tuple(float(word) for word in args.tta_scales.split(","))
    except ValueError:
        expected = "numbers such as 1,1.25"
        fail("--tta-scales", expected=expected, got=args.tta_scales, remedy="Correct it.")
    return TestTimeAugmentation(scales, flip=args.tta)


def _slices(args: argparse.Namespace) -> Slices | None:
    from vitdet.predict.slicing import Slices

    if args.slices is None:
        if args.overlap is not None:
            fail("--overlap", expected="--slices beside it", got="none", remedy="Add --slices.")
        return None
    return Slices(args.slices, 0.25 if args.overlap is None else args.overlap)


def make_folder(folder: Path) -> None:
    """Make the folder of --out.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        expected, got = "a folder that can be made", error.strerror
        fail(f"--out {folder}", expected=expected, got=got, remedy="Choose another one.")
