"""`vitdet train --data FOLDER`: a detector for your own images, from one command.

Finds the data, puts a validation part aside where there is none, chooses a recipe of configs/own
for the size, and starts what train_net.py starts. Everything that was chosen is printed, with the
train_net.py command that does the same.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from vitdet import checkpoint
from vitdet.app import convert
from vitdet.config import load_config
from vitdet.data.formats import FORMATS
from vitdet.data.prepare import Prepared, prepare_data
from vitdet.engine.dry_run import DoesNotFitError
from vitdet.engine.launch import launch
from vitdet.engine.run import alone_in, train
from vitdet.utils.checks import InputError, fail

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "own"
SIZES = {
    "tiny": "eva02_tiny",
    "small": "vitdet_s",
    "base": "vitdet_b",
    "large": "vitdet_l",
}
_EPOCHS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="your data (COCO json, Roboflow, YOLO, Pascal VOC), or its json or yaml",
    )
    parser.add_argument("--format", choices=list(FORMATS), help="of the data; left out: found out")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="images, where they are not with the labels"
    )
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        default="tiny" if not torch.cuda.is_available() else "base",
        help="of the model: tiny on a CPU, else base (default %(default)s)",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="to start from, of any known format"
    )
    parser.add_argument(
        "--epochs", type=float, metavar="N", help=f"rounds of the data (default {_EPOCHS})"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="images a step; left out: what fits")
    parser.add_argument(
        "--allow-empty", action="store_true", help="train with a validation part without objects"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="F", help="put aside (default 0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of split and training (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("output/own"), metavar="DIR", help="default output/own"
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build all, take two real steps, print memory, time and length, keep nothing",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the data and train; return 0.

    Raises:
        InputError: data, weights or an option that a user can repair.
    """
    _check(args)
    if not args.dry_run:
        _run(args, args.out)
        return 0
    with TemporaryDirectory() as folder:
        _run(args, Path(folder))
    return 0


def _run(args: argparse.Namespace, place: Path) -> None:
    """Write data and weights to start from into `place`, and train."""
    with alone_in(place):  # another run's data are not to be written over
        data = prepare_data(
            args.data,
            place / "data",
            form=args.format,
            images=args.images,
            val_fraction=args.val_fraction,
            seed=args.seed,
            resume=args.resume,
            allow_changed="train.allow_changed_data=true" in map(str.lower, args.overrides),
            allow_empty=args.allow_empty,
        )
    print(*(f"data         {note}" for note in data.notes), sep="\n", flush=True)
    recipe = recipe_of(args.size, masks=data.masks)
    overrides = [*_choices(args, recipe, data), *args.overrides]
    if args.weights and not args.resume:
        overrides.insert(0, _setting("train.init_checkpoint", _start(args, place, recipe, data)))
    overrides = fitting(args, recipe, overrides)
    _tell(args, place, recipe, overrides, data)
    launch(_train, args.num_gpus, args=(str(recipe), overrides, args.resume, args.dry_run))


def recipe_of(size: str, *, masks: bool) -> Path:
    """Return the recipe of a size, with or without masks.

    Raises:
        InputError: the recipes are not there.
    """
    path = CONFIGS / f"{'mask' if masks else 'faster'}_rcnn_{SIZES[size]}.py"
    if not path.is_file():
        fail(
            "recipes of vitdet train",
            expected=f"the file {path}",
            got="nothing at this path",
            remedy="They are part of the project's checkout: install vitdet from it by "
            "`pip install --editable .` (or `python .ci/bootstrap.py --here`).",
        )
    return path


def _check(args: argparse.Namespace) -> None:
    if "LOCAL_RANK" in os.environ:
        remedy = (
            "Start it on one machine: it prints the train_net.py command that torchrun can run."
        )
        fail("vitdet train", expected="to start the processes", got="torchrun", remedy=remedy)
    for name in ("epochs", "batch"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            fail(f"--{name}", expected="more than 0", got=value, remedy="Leave it out to choose.")
    again = not args.resume and not args.dry_run  # refused before data are written
    if again and (args.out / "last_checkpoint").exists():
        raise InputError(
            f"--out {args.out}: expected a folder without a run, got one that holds checkpoints. "
            "Add --resume to continue that run, or choose another --out."
        )
    if args.num_gpus < 1:
        fail("--num-gpus", expected="1 or more", got=args.num_gpus, remedy="1 is also for a CPU.")


def _choices(args: argparse.Namespace, recipe: Path, data: Prepared) -> list[str]:
    """Return the changes to the recipe that data and options ask for."""
    cfg = load_config(recipe, args.overrides)
    usual, lr = cfg.dataloader.train.total_batch_size, cfg.optimizer.lr
    given = {override.partition("=")[0] for override in args.overrides}
    batch = args.batch or usual_batch(usual, args.num_gpus, data.num_images)
    if batch % args.num_gpus:
        expected = f"a multiple of the {args.num_gpus} processes"
        fail("--batch", expected=expected, got=batch, remedy="Change one of the two.")
    found = {
        "dataloader.train.dataset.json": data.train[0],
        "dataloader.train.dataset.images": data.train[1],
        "dataloader.test.dataset.json": data.val[0],
        "dataloader.test.dataset.images": data.val[1],
        "train.output_dir": str(args.out.absolute()),
        "train.seed": args.seed,
        "train.epochs": args.epochs or _EPOCHS,
    }
    if "train.num_images" in given:
        if args.epochs is not None:
            got = f"--epochs {args.epochs:g} and train.num_images"
            fail("length", expected="one of two words", got=got, remedy="Leave one of them out.")
        found.pop("train.epochs")
    if batch != usual:
        found |= _batch(batch, lr * batch / usual)
    return [_setting(key, value) for key, value in found.items() if key not in given]


def _batch(batch: int, lr: float) -> dict[str, Any]:
    return {
        "dataloader.train.total_batch_size": batch,
        "train.reference_batch": batch,
        "optimizer.lr": float(f"{lr:.4g}"),
    }


def usual_batch(usual: int, num_gpus: int, num_images: int) -> int:
    """Return images a step: the recipe's, halved while there are fewer images."""
    batch = usual
    while batch > max(num_images, num_gpus) and batch % 2 == 0 and (batch // 2) % num_gpus == 0:
        batch //= 2
    return batch


def fitting(args: argparse.Namespace, recipe: Path, overrides: list[str]) -> list[str]:
    """Return the overrides with a batch that fits on a GPU, found by real steps of one process.

    Raises:
        DoesNotFitError: not even one image fits.
    """
    cfg = load_config(recipe, overrides)
    given = {override.partition("=")[0] for override in args.overrides}
    key, device = "dataloader.train.total_batch_size", cfg.train.device
    if args.batch or key in given or device == "cpu" or not torch.cuda.is_available():
        return overrides
    first = share = cfg.dataloader.train.total_batch_size // args.num_gpus
    chosen: list[str] = []
    while True:
        try:
            words = [*overrides, *chosen, f"{key}={share}"]
            _train(str(recipe), words, args.resume, dry_run=True)
        except DoesNotFitError as error:
            if share == 1:
                raise
            print(f"batch        {error}", flush=True)
        else:
            return [*overrides, *chosen]
        gc.collect()  # what the step has left
        torch.cuda.empty_cache()
        share //= 2
        found = _batch(share * args.num_gpus, cfg.optimizer.lr * share / first)
        chosen = [_setting(key, value) for key, value in found.items() if key not in given]


def _setting(key: str, value: Any) -> str:
    """Return key=value; text that YAML would read as something else is put in quotes.

    Not what it reads as a number: a recipe's text stays text then.
    """
    text = str(value)
    if not isinstance(value, str):
        return f"{key}={text}"
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:
        read = None
    as_it_is = read == value or isinstance(read, bool | int | float)
    return f"{key}={text if as_it_is else _in_quotes(text)}"


def _in_quotes(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _start(args: argparse.Namespace, place: Path, recipe: Path, data: Prepared) -> str:
    """Return the file to start from: the one given where it fits, else one converted from it.

    A file of ours with the same classes, or written by the converter, is taken as it is. Of a
    detector of ours with other classes the rows of those that both have are carried over, and
    everything that belongs to no class. Of any other file the backbone is taken.
    """
    about = checkpoint.read(args.weights).get("vitdet")
    names = about.get("class_names") if isinstance(about, dict) else None
    if isinstance(about, dict) and (names is None or tuple(names) == data.class_names):
        return str(args.weights)
    place.mkdir(parents=True, exist_ok=True)
    output = place / "start.pth"
    how = ["--target-classes", data.train[0], "--new-classes"] if names else ["--backbone-only"]
    files = ["--source-model", str(args.weights), "--output-model", str(output)]
    words = [*files, "--config-file", str(recipe), *how, *args.overrides]
    try:
        convert.convert_file(convert.parse(words))
    except InputError as error:
        why = str(error).removeprefix(f"{args.weights}: ")
        text = (
            f"--weights {args.weights}: it does not fit {recipe.name} (--size {args.size}): {why}"
        )
        if "--" in why:
            text += " These options are those of `vitdet convert`, whose output --weights takes."
        raise InputError(text) from error
    return str(output)


def _tell(
    args: argparse.Namespace, place: Path, recipe: Path, overrides: Sequence[str], data: Prepared
) -> None:
    cfg = load_config(recipe, overrides)
    batch, epochs = cfg.dataloader.train.total_batch_size, cfg.train.get("epochs")
    length = f"{cfg.train.num_images} images"
    if epochs:
        length = f"{epochs:g} x {data.num_images} = {round(epochs * data.num_images)} images"
    what = "boxes and masks" if data.masks else "boxes"
    start = cfg.train.init_checkpoint or "random weights (--weights FILE starts from others)"
    words = ["python", "train_net.py", "--config-file", str(recipe)]
    words += ["--num-gpus", str(args.num_gpus)] if args.num_gpus > 1 else []
    words += ["--resume"] if args.resume else []
    lines = [
        f"recipe       {recipe.relative_to(CONFIGS.parents[1])} ({args.size}): {what}",
        f"start        {start}",
        f"length       {length}, {batch} a step, learning rate {cfg.optimizer.lr:g}",
        f"results      {cfg.train.output_dir}",
        f"the same     {shlex.join([*words, *overrides])}",
    ]
    # of a dry run: where the files will be
    print(*(line.replace(str(place), str(args.out)) for line in lines), sep="\n", flush=True)


def _train(recipe: str, overrides: Sequence[str], resume: bool, dry_run: bool) -> None:
    """Run in each process."""
    train(load_config(recipe, list(overrides)), resume=resume, dry_run=dry_run)
