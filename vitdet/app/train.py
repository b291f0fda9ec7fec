"""`vitdet train --data FOLDER`: a detector for your own images, from one command.

Everything that is chosen is printed, with the `vitdet recipe` command that does the same.
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
from omegaconf import DictConfig, OmegaConf

from vitdet import weights
from vitdet.app import follow
from vitdet.app.options import EPOCHS
from vitdet.app.start import converted
from vitdet.config import CONFIGS, load_config
from vitdet.convert.describe import describe
from vitdet.data.prepare import Prepared, prepare_data
from vitdet.engine.checkpoints import LAST
from vitdet.engine.dry_run import DoesNotFitError
from vitdet.engine.launch import launch
from vitdet.engine.run import alone_in, train
from vitdet.utils.checks import InputError, before_first_step

OWN = CONFIGS / "own"
SIZES = {
    "tiny": "eva02_tiny",
    "light": "vitdet_s_light",
    "small": "vitdet_s",
    "base": "vitdet_b",
    "large": "vitdet_l",
}
_PRESET = "dataloader.train.mapper.preset"
_BATCH = "dataloader.train.total_batch_size"


def run(args: argparse.Namespace) -> int:
    """Prepare the data and train; return 0.

    Raises:
        InputError: data, weights or an option that a user can repair.
    """
    _check(args)
    follow.begun(args, args.out)  # where the run begins anew, --weights becomes that of its record
    if args.weights and not _goes_on(args):
        args.weights = weights.locate(args.weights)
    if not args.dry_run:
        _run(args, args.out)
        return 0
    with TemporaryDirectory() as folder:
        _run(args, Path(folder))
    return 0


def _run(args: argparse.Namespace, place: Path) -> None:
    """Write data and weights to start from into `place`, and train."""
    with before_first_step(), alone_in(place):  # another run's data are not to be written over
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
        args.overrides[:0] = _following(args, place)
    recipe = recipe_of(args.size, masks=data.masks)
    cfg = load_config(recipe, args.overrides)
    changes = _choices(args, cfg, data)
    if args.weights and not _goes_on(args):
        changes["train.init_checkpoint"] = _start(args, place, recipe, data)
    if not args.batch and _BATCH not in _keys(args) and cfg.train.device != "cpu":
        changes |= _that_fits(args, cfg, recipe, changes)
    overrides = _overrides(args, changes)
    _print_choices(args, place, recipe, overrides, data)
    launch(_train, args.num_gpus, args=(str(recipe), overrides, args.resume, args.dry_run))


def _goes_on(args: argparse.Namespace) -> bool:
    return args.resume and (args.out / LAST).exists()


def _following(args: argparse.Namespace, place: Path) -> list[str]:
    """Set the size, and return the changes by which the recipe's backbone is that of the weights.

    A run that is resumed has both from its first start.
    """
    usual, small = ("base", "small") if torch.cuda.is_available() else ("tiny", "light")
    if record := follow.begun(args, args.out):
        args.size = record.get("size") or args.size or usual
        return [*record["overrides"], *_tuned(args)]
    found = weights.read(args.weights) if args.weights else weights.Weights({})
    source, net, model, fitting = f"--weights {args.weights}", {}, None, usual
    if args.weights:
        net = follow.net_settings(found.content, found.config, alone=False, source=source)
        model = follow.model_of_run(found.content, source=source)
        if width := describe(found.content, source=source)["backbone"].get("embed_dim"):
            fitting = small if width <= 384 else "base" if width <= 768 else "large"
            fitting = "tiny" if width < 384 and not net else fitting  # a detector of this size
        if model is not None:
            recipes = {size: load_config(recipe_of(size, masks=True)) for size in SIZES}
            fitting = follow.nearest_recipe(model, recipes)
    args.size = args.size or fitting
    if net and args.size == "tiny":
        sizes = "light, small, base or large for the weights of a foundation model"
        raise InputError(f"--size: expected {sizes}, got tiny. Leave it out: {fitting} is theirs.")
    lines = follow.remembered(found.content, source=source)
    typed = [word for word in args.overrides if word.startswith(follow.NET)]
    cfg = load_config(recipe_of(args.size, masks=False), typed)
    if net:
        lines = follow.changes(cfg, found, typed, source=source, alone=False) or []
    elif model is not None:
        lines = follow.different(cfg, model, typed)
    lines += _tuned(args)
    if args.weights:
        start = {"size": args.size, "overrides": lines, "weights": str(args.weights.absolute())}
        follow.keep(place, start)
    elif not args.resume:  # another's, which ended before its first checkpoint
        (place / follow.RECORD).unlink(missing_ok=True)
    return lines


def _tuned(args: argparse.Namespace) -> list[str]:
    if args.tune is None:
        return []
    cfg = load_config(recipe_of(args.size, masks=False))
    return follow.tuned(cfg, args.tune, args.overrides)


def recipe_of(size: str, *, masks: bool) -> Path:
    """Return the recipe of a size, with or without masks."""
    return OWN / f"{'mask' if masks else 'faster'}_rcnn_{SIZES[size]}.py"


def _check(args: argparse.Namespace) -> None:
    if "LOCAL_RANK" in os.environ:
        raise InputError(
            "vitdet train: expected to start the processes itself, got torchrun. Start it on one "
            "machine: it prints the `vitdet recipe` command, which torchrun --no-python can run."
        )
    for name in ("epochs", "batch", "num_gpus"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name.replace('_', '-')}: expected more than 0, got {value}.")
    if args.batch and _BATCH in _keys(args):
        got = f"--batch {args.batch} and {_BATCH}. Leave one of them out."
        raise InputError(f"images a step: expected one word, got {got}")
    again = not args.resume and not args.dry_run  # refused before data are written
    if again and (args.out / "last_checkpoint").exists():
        raise InputError(
            f"--out {args.out}: expected a folder without a run, got one that holds checkpoints. "
            "Add --resume to continue that run, or choose another --out."
        )


# --- the changes to the recipe --------------------------------------------------------------------


def _choices(args: argparse.Namespace, cfg: DictConfig, data: Prepared) -> dict[str, Any]:
    """Return the changes to the recipe that data and options ask for."""
    usual = cfg.dataloader.train.total_batch_size
    batch = args.batch or usual
    free = not args.batch and _BATCH not in _keys(args)
    while free and batch > max(data.num_images, args.num_gpus):
        if batch % (2 * args.num_gpus):
            break
        batch //= 2
    if batch % args.num_gpus:
        raise InputError(f"--batch: expected a multiple of {args.num_gpus} processes, got {batch}.")
    found = {
        "dataloader.train.dataset.json": data.train[0],
        "dataloader.train.dataset.images": data.train[1],
        "dataloader.test.dataset.json": data.val[0],
        "dataloader.test.dataset.images": data.val[1],
        "train.output_dir": str(args.out.absolute()),
        "train.seed": args.seed,
    }
    began = args.out / "config.yaml"
    if args.resume and began.is_file():
        before = OmegaConf.load(began)
        args.augment = args.augment or OmegaConf.select(before, _PRESET)
        found["train.init_checkpoint"] = OmegaConf.select(before, "train.init_checkpoint") or ""
    if args.augment:
        found[_PRESET] = args.augment
    if "train.num_images" not in _keys(args):
        found["train.epochs"] = args.epochs or EPOCHS
    elif args.epochs is not None:
        got = f"--epochs {args.epochs:g} and train.num_images. Leave one of them out."
        raise InputError(f"length of the training: expected one word, got {got}")
    return found if batch == usual else found | _of_batch(batch, cfg.optimizer.lr * batch / usual)


def _of_batch(batch: int, lr: float) -> dict[str, Any]:
    return {_BATCH: batch, "train.reference_batch": batch, "optimizer.lr": float(f"{lr:.4g}")}


def _that_fits(
    args: argparse.Namespace, cfg: DictConfig, recipe: Path, changes: dict[str, Any]
) -> dict[str, Any]:
    """Return the changes for a batch that fits on a GPU, found by real steps of one process.

    Raises:
        DoesNotFitError: not even one image fits.
    """
    usual = cfg.dataloader.train.total_batch_size
    batch = changes.get(_BATCH, usual)
    found: dict[str, Any] = {}
    while torch.cuda.is_available():
        share = batch // args.num_gpus
        try:
            words = _overrides(args, changes | found | {_BATCH: share})
            _train(str(recipe), words, args.resume, dry_run=True)
            break
        except DoesNotFitError as error:
            if share == 1:
                raise
            print(f"batch        {error}", flush=True)
        finally:
            gc.collect()  # what the step has left
            torch.cuda.empty_cache()
        batch = share // 2 * args.num_gpus
        found = _of_batch(batch, cfg.optimizer.lr * batch / usual)
    return found


def _overrides(args: argparse.Namespace, changes: dict[str, Any]) -> list[str]:
    """Return key=value for each change that the user's own do not name, and the user's own."""
    ours = [follow.setting(key, value) for key, value in changes.items() if key not in _keys(args)]
    return [*ours, *args.overrides]


def _keys(args: argparse.Namespace) -> set[str]:
    return {override.partition("=")[0] for override in args.overrides}


def _start(args: argparse.Namespace, place: Path, recipe: Path, data: Prepared) -> str:
    """Return the file to start from: the one given where it fits, else one converted from it.

    A file of ours with the same classes, or written by the converter, is taken as it is. Of a
    detector of ours with other classes the rows of those that both have are carried over, and
    everything that belongs to no class. Of any other file the backbone is taken.
    """
    about = weights.read(args.weights).content.get("vitdet")
    names = about.get("class_names") if isinstance(about, dict) else None
    if isinstance(about, dict) and (names is None or tuple(names) == data.class_names):
        return str(args.weights)
    how = ["--backbone-only", "--resize-patch-embed"]
    if names:
        how = ["--target-classes", data.train[0], "--new-classes"]
    fits = f"it does not fit {recipe.name} (--size {args.size})"
    return converted(args.weights, place, recipe, [*how, *args.overrides], fits)[0]


def _print_choices(
    args: argparse.Namespace, place: Path, recipe: Path, overrides: Sequence[str], data: Prepared
) -> None:
    cfg = load_config(recipe, overrides)
    batch, epochs = cfg.dataloader.train.total_batch_size, cfg.train.get("epochs")
    length = f"{cfg.train.num_images} images"
    if epochs:
        length = f"{epochs:g} x {data.num_images} = {round(epochs * data.num_images)} images"
    what = "boxes and masks" if data.masks else "boxes"
    start = cfg.train.init_checkpoint or "random weights (--weights FILE starts from others)"
    words = ["vitdet", "recipe", "--config-file", str(recipe)]
    words += ["--num-gpus", str(args.num_gpus)] if args.num_gpus > 1 else []
    words += ["--resume"] if args.resume else []
    tune = f", train.tune={cfg.train.tune}" * (cfg.train.tune != "all")
    lines = [
        f"recipe       {recipe.relative_to(CONFIGS.parent)} ({args.size}): {what}",
        f"start        {start}",
        f"length       {length}, {batch} a step, learning rate {cfg.optimizer.lr:g}{tune}",
        f"results      {cfg.train.output_dir}",
        f"the same     {shlex.join([*words, *overrides])}",
    ]
    # of a dry run: where the files will be
    print(*(line.replace(str(place), str(args.out)) for line in lines), sep="\n", flush=True)


def _train(recipe: str, overrides: Sequence[str], resume: bool, dry_run: bool) -> None:
    """Run in each process."""
    train(load_config(recipe, list(overrides)), resume=resume, dry_run=dry_run)
