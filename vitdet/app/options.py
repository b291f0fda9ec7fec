"""The options of every command, and of converter.py.

Nothing here imports torch, so help and wrong words are told at once. `run` of the module that is
called as the command does the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitdet.app.words import translated
from vitdet.utils.checks import InputError

if TYPE_CHECKING:
    from vitdet.predict.predictor import Predictor

# The words of tables whose modules are slow to import; tests/app/test_cli.py compares them.
BOXES = ("ask", "xywh", "corners", "fractions")
DATA_FORMATS = ("coco", "yolo", "voc")
MASKS = ("pasted", "boxes", "none")
OPSETS = range(17, 21)
PARTS = ("detector", "backbone")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
PRESETS = ("light", "standard", "strong", "aerial", "documents", "cells")
SIZES = ("tiny", "light", "small", "base", "large")
SPLITS = ("train", "val", "test")
TUNE = ("all", "lora", "head")
EPOCHS = 50


# --- what several commands have ------------------------------------------------------------------


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "ema: the moving average of the weights"
    add("--use", choices=["model", "ema"], default="model", help=text)
    add("--config-file", metavar="FILE", help="recipe, where the file holds none")
    text = "list of names or COCO json, where it holds none"
    add("--class-names", type=Path, metavar="JSON", help=text)
    text = "build parts from outside vitdet that the file names: it may run code of its author"
    add("--trust", action="store_true", help=text)


def _add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    text = "a run's .pth, a file of `vitdet strip`, a detector of another project, or a name"
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help=text)
    _add_file_arguments(parser)


def _add_threshold_argument(parser: argparse.ArgumentParser) -> None:
    text = "least score; left out: by class what the evaluation found (0.5 where there was none)"
    parser.add_argument("--threshold", type=float, metavar="SCORE", help=text)


def _add_predictor_arguments(parser: argparse.ArgumentParser) -> None:
    _add_weights_arguments(parser)
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


# --- a command each ------------------------------------------------------------------------------


def _train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    data = "your data (COCO json, Roboflow, YOLO, Pascal VOC), or its json or yaml"
    add("--data", type=Path, required=True, metavar="FOLDER", help=data)
    add("--format", choices=DATA_FORMATS, help="of the data; left out: found out")
    add("--images", type=Path, metavar="DIR", help="images, where they are not with the labels")
    what = "of the model (default: that of --weights; without, tiny on a CPU, else base)"
    add("--size", choices=SIZES, help=what)
    what = "to start from: a file of any known format, a folder of the hub, a name"
    add("--weights", type=Path, metavar="FILE", help=what)
    what = "what of the backbone learns: all of it, adapters (lora), nothing (head)"
    add("--tune", choices=TUNE, help=what)
    add("--epochs", type=float, metavar="N", help=f"rounds of the data (default {EPOCHS})")
    what = "more augmentation, for the kind of images (docs/data.md; default: scale, crop, flip)"
    add("--augment", choices=PRESETS, help=what)
    add("--batch", type=int, metavar="N", help="images a step; left out: what fits")
    empty = "train with a validation part without objects"
    add("--allow-empty", action="store_true", help=empty)
    aside = "put aside (default %(default)s)"
    add("--val-fraction", type=float, default=0.1, metavar="F", help=aside)
    add("--seed", type=int, default=0, help="of split and training (default 0)")
    out = Path("output/own")
    add("--out", type=Path, default=out, metavar="DIR", help="default %(default)s")
    add("--num-gpus", type=int, default=1, metavar="N", help="default 1")
    add("--resume", action="store_true", help="continue the run in --out")
    steps = "build all, take two real steps, print memory, time and length, keep nothing"
    add("--dry-run", action="store_true", help=steps)
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")


def _recipe(parser: argparse.ArgumentParser) -> None:
    # as detectron2's tools name them
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="recipe, .py or .yaml")
    start = "start from it: converted first where it is another project's, the recipe follows it"
    add("--weights", metavar="FILE", help=start)
    what = "what of the backbone learns: all of it, adapters (lora), nothing (head)"
    add("--tune", choices=TUNE, help=what)
    add("--resume", action="store_true", help="continue train.output_dir's run")
    trial = "build all, take two real steps, print memory, time and length, keep nothing"
    add("--dry-run", action="store_true", help=trial)
    add("--eval-only", action="store_true", help="evaluate, do not train")
    add("--print-groups", action="store_true", help="print each parameter's lr")
    processes = "processes on this machine (default 1)"
    add("--num-gpus", type=int, default=1, metavar="N", help=processes)
    add("--num-machines", type=int, default=1, metavar="N")
    add("--machine-rank", type=int, default=0, metavar="I", help="0 to N-1")
    address = "tcp://HOST:PORT of machine 0; auto finds a free port on one machine"
    add("--dist-url", default="auto", help=address)
    words = "changes, as train.seed=1"
    add("overrides", nargs="*", default=[], metavar="key=value", help=words)


def _data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=["check"], help="the only one so far")
    add("data", type=Path, help="folder of the data, or an annotation file")
    add("--format", choices=DATA_FORMATS, help="of the data; left out: found out")
    add("--images", type=Path, metavar="DIR", help="images, where they are not with the labels")
    add("--out", type=Path, metavar="HTML", help="write a page with pictures")
    add("--fix", type=Path, metavar="DIR", help="write a repaired copy into this new folder")
    add(
        "--boxes",
        choices=BOXES,
        default="ask",
        help="how boxes are written: x y width height, corners x1 y1 x2 y2, or fractions of the "
        "sides; left out: x y width height, unless they look otherwise",
    )
    what = "add training images to the page as this preset of a training augments them"
    add("--augmented", choices=PRESETS, metavar="PRESET", help=f"{what} (with --out)")


def _predict(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = 'images, folders of images, patterns ("shots/*.jpg"), videos'
    add("inputs", nargs="+", metavar="IMG", help=what)
    folder = "folder for the pictures (default %(default)s)"
    add("--out", type=Path, default=Path("predictions"), metavar="DIR", help=folder)
    _add_threshold_argument(parser)
    only = "only these, by name; may be given several times"
    add("--classes", action="append", default=[], metavar="A,B", help=only)
    faster = "leave out the masks, which are then not computed"
    add("--boxes-only", action="store_true", help=faster)
    both = "write boxes and masks, too: one .json an image, one .jsonl a video"
    add("--save-json", action="store_true", help=both)
    add("--no-pictures", action="store_true", help="draw nothing")
    auto = "auto: bf16 where the device has it (default)"
    add("--precision", choices=PRECISIONS, default="auto", help=auto)
    _add_predictor_arguments(parser)


def _val(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    data = "COCO json, or a folder as for `vitdet train`; left out: the recipe's test set"
    add("--data", type=Path, metavar="PATH", help=data)
    which = "of --data: train, val or test (default: val, else test, else all of it)"
    add("--part", choices=SPLITS, help=which)
    beside = "of --data, where they are not beside it"
    add("--images", type=Path, metavar="DIR", help=beside)
    folder = "folder for results.json, the predictions and log.txt (default %(default)s)"
    add("--out", type=Path, default=Path("val"), metavar="DIR", help=folder)
    add("--precision", choices=PRECISIONS, help="left out: what the recipe evaluates in")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")
    _add_predictor_arguments(parser)


def _strip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="FILE", help="a checkpoint")
    parser.add_argument("output", type=Path, metavar="OUT", help=".safetensors or .pth")
    _add_file_arguments(parser)
    changes = "changes to the recipe"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=changes)


def _weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", help="only names with all of these in them")


def _convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    flag: dict[str, Any] = {"action": "store_true"}
    json_file: dict[str, Any] = {"type": Path, "metavar": "JSON"}
    add("--source-model", type=Path, required=True, help="file or name to read")
    add("--output-model", type=Path, required=True, help=".pth or .safetensors")
    add("--config-file", type=Path, help="recipe to convert for; where names alone change, none")
    add("--report", type=Path, help="JSON file: what became of every key")
    add("--source-format", help="recognised when left out; docs/conversion.md has the names")
    _add_reading_arguments(parser)
    add("--backbone-only", **flag, help="leave out the file's pyramid and heads")
    add("--resize-patch-embed", **flag, help="resample the patch kernel (bicubic) to the recipe's")
    add("--fold-layer-scale", **flag, help="multiply LayerScale into the layers before it")
    add("--allow-inexact", **flag, help="leave out parts that the model or target has no place for")
    add("--target-classes", **json_file, help="carry the head over to these: COCO json, or names")
    add("--new-classes", **flag, help="go on where no class is in common: all rows start anew")
    add("--source-classes", **json_file, help="the file's classes, where it does not hold them")
    add("--class-table", **json_file, help="{new class: class of the file}; ignores case and _")
    add("--target-format", help="write another project's names (docs/conversion.md)")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")


def _add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    text = "key of the file that holds the state dict (ema_state)"
    parser.add_argument("--weights", metavar="KEY", help=text)
    text = "open a torch file that holds more than tensors: it may run code of its author"
    parser.add_argument("--trust", action="store_true", help=text)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="weights, a folder of the hub, or a name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_reading_arguments(parser)
    parser.add_argument("--no-recipes", action="store_true", help="try no recipes")


def _export(parser: argparse.ArgumentParser) -> None:
    _add_weights_arguments(parser)
    add = parser.add_argument
    add("--format", choices=["onnx"], default="onnx", help="onnx, the only one")
    add("--out", type=Path, required=True, metavar="FILE.onnx")
    part = "the whole detector, or backbone and pyramid alone (default detector)"
    add("--part", choices=PARTS, default="detector", help=part)
    sizes = parser.add_mutually_exclusive_group()
    one, any_size = "one size for all images", "images of any size (this is the default)"
    sizes.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=one)
    sizes.add_argument("--dynamic", action="store_true", help=any_size)
    masks = "in the image, as probabilities inside the boxes, or none (default pasted)"
    add("--masks", choices=MASKS, default="pasted", help=masks)
    add("--opset", type=int, choices=OPSETS, default=OPSETS[0], help="of ONNX (default 17)")
    images = "to compare on; left out: drawn ones"
    add("--images", type=Path, metavar="FOLDER", help=images)
    add("--num-images", type=int, default=5, metavar="N", help="(default 5)")
    add("overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe")


def _report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_folder", type=Path, help="train.output_dir of a run, evaluated, or a file of it")
    add("--out", type=Path, help="the page; left out: report.html in the folder")
    what = "what curves, errors and confusion are about: boxes or masks (default bbox)"
    add("--iou-type", choices=["bbox", "segm"], default="bbox", help=what)
    _add_threshold_argument(parser)
    add("--images", type=int, default=12, help="worst images shown (default 12)")
    what = "results in COCO's format; left out: those of the run"
    add("--predictions", type=Path, help=what)
    what = "build parts of the run's recipe from outside vitdet"
    add("--trust", action="store_true", help=what)


def _serve(parser: argparse.ArgumentParser) -> None:
    _add_weights_arguments(parser)
    _add_threshold_argument(parser)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    add("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    add("--port", type=int, default=8000, help="0 for any free one (default 8000)")
    add("--max-bytes", type=int, default=32 * 2**20, help="of an upload (default 32 MiB)")
    add("--max-pixels", type=int, default=50_000_000, help="of a picture (default 50 million)")
    text = "let other machines in: needed for a --host that is not this machine's own"
    add("--allow-network", action="store_true", help=text)
    text = "a name by which other machines call this one; may be given several times"
    add("--host-name", action="append", default=[], metavar="NAME", help=text)
    text = "below which a proxy asks, such as /detect"
    add("--root-path", default="", metavar="PATH", help=text)


ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "train": _train,
    "recipe": _recipe,
    "data": _data,
    "predict": _predict,
    "val": _val,
    "strip": _strip,
    "weights": _weights,
    "convert": _convert,
    "inspect": _inspect,
    "export": _export,
    "report": _report,
    "setup": lambda _: None,
    "serve": _serve,
}


def parse_convert(argv: Sequence[str]) -> argparse.Namespace:
    """Return converter.py's command line."""
    what = "Convert a checkpoint for a recipe, to other classes, or to another project's names."
    parser = argparse.ArgumentParser(description=what, allow_abbrev=False)
    _convert(parser)
    return parser.parse_intermixed_args(translated(parser, argv))


# --- what they mean ------------------------------------------------------------------------------


def check_paths(args: argparse.Namespace) -> None:
    """Look whether there is something at the paths of weights and data, before the slow imports.

    Raises:
        InputError: nothing there; names that are fetched have a colon, and are looked up later.
    """
    told = vars(args)
    for key in () if told.get("resume") else ("weights", "file", "source", "source_model"):
        path = told.get(key)  # a string is the key in a file
        if isinstance(path, Path) and ":" not in str(path) and not path.exists():
            text = "expected a file, got nothing there. Check the path."
            raise InputError(f"checkpoint {path}: {text}")
    data = told.get("data")
    if data is not None and not data.exists():
        from vitdet.data.formats import find_data

        find_data(data)  # says what may be meant


def file_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options about a weights file are to `Predictor.from_checkpoint`.

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


def load_predictor(args: argparse.Namespace, **options: Any) -> Predictor:
    """Return the predictor that --weights and the options beside it describe.

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
