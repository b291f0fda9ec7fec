"""`vitdet convert`, and converter.py: a checkpoint for a recipe, other classes, or another project.

Exit status: 0 written, 1 some keys are unaccounted for (nothing is written but the report),
2 an input is wrong. docs/conversion.md lists the formats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitdet import checkpoint
from vitdet.convert import FORMATS, TARGETS, Report, UnaccountedError, chain, convert
from vitdet.convert import classes as heads
from vitdet.convert.direct import rename
from vitdet.convert.nesting import unnest
from vitdet.convert.out import export, nest
from vitdet.utils.checks import InputError, fail, printable
from vitdet.utils.files import replacing
from vitdet.utils.state_dicts import some

if TYPE_CHECKING:
    from omegaconf import DictConfig

_WHAT = "Convert a checkpoint for a recipe, to other classes, or to another project's names."

Weights = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line; underscores in option names are read as dashes."""
    parser = argparse.ArgumentParser(description=_WHAT)
    add_arguments(parser)
    # underscores are accepted: --source_model
    dashed = [_dashed(word) if word.startswith("--") else word for word in argv]
    return parser.parse_intermixed_args(dashed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--source-model", type=Path, required=True, help="file to read")
    parser.add_argument("--output-model", type=Path, required=True, help=".pth or .safetensors")
    parser.add_argument(
        "--config-file",
        type=Path,
        help="recipe to convert for; not needed with --target-format where names alone change",
    )
    parser.add_argument("--report", type=Path, help="JSON file: what became of every key")
    _add_source(parser)
    _add_allowances(parser)
    _add_classes(parser)
    _add_target(parser)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe"
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    formats = "; ".join(f"{fmt.name}: {fmt.what}" for fmt in FORMATS.values())
    parser.add_argument("--source-format", help=f"recognised when left out ({formats})")
    add_reading_arguments(parser)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a file of any project is read."""
    parser.add_argument(
        "--weights", metavar="KEY", help="key of the file that holds the state dict (ema_state)"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="open a torch file that holds more than tensors: it may run code of its author",
    )


def _add_allowances(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone-only", action="store_true", help="leave out the file's pyramid and heads"
    )
    parser.add_argument(
        "--resize-patch-embed",
        action="store_true",
        help="allow the patch kernel to be resampled (bicubic) to the recipe's patch size",
    )
    parser.add_argument(
        "--fold-layer-scale",
        action="store_true",
        help="multiply LayerScale into the layers before it, for a recipe without it",
    )
    parser.add_argument(
        "--allow-inexact",
        action="store_true",
        help="leave out parts of the file's network that the model or target has no place for",
    )


def _add_classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target-classes",
        type=Path,
        metavar="JSON",
        help="carry the class head over to these classes: COCO annotations, or a list of names",
    )
    parser.add_argument(
        "--new-classes",
        action="store_true",
        help="go on where no class is in common: the rows of all classes start anew",
    )
    parser.add_argument(
        "--source-classes",
        type=Path,
        metavar="JSON",
        help="the file's classes; not needed for checkpoints of ours, which hold their names",
    )
    parser.add_argument(
        "--class-table",
        type=Path,
        metavar="JSON",
        help="{new class: class of the file} for other spellings; also ignores case and _",
    )


def _add_target(parser: argparse.ArgumentParser) -> None:
    targets = "; ".join(f"{target.name}: {target.what}" for target in TARGETS.values())
    parser.add_argument("--target-format", help=f"write another project's names ({targets})")
    parser.add_argument(
        "--target-prefix",
        default="",
        metavar="TEXT",
        help="put before every written name (image_encoder. for a whole SAM)",
    )


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _check_arguments(args: argparse.Namespace) -> None:
    def needs(option: str, given: object, other: str) -> None:
        if given:
            fail(option, expected=f"{other} beside it", got="none", remedy=f"Add {other}.")

    if not args.config_file:
        if not args.target_format:
            remedy = "Give the recipe that the weights are for (configs/)."
            fail("--config-file", expected="a recipe", got="none", remedy=remedy)
        needs("--target-classes", args.target_classes, "--config-file")
        needs("--fold-layer-scale", args.fold_layer_scale, "--config-file")
        needs("--resize-patch-embed", args.resize_patch_embed, "--config-file")
        needs("key=value", args.overrides, "--config-file")
    if not args.target_classes:
        needs("--source-classes", args.source_classes, "--target-classes")
        needs("--class-table", args.class_table, "--target-classes")
        needs("--new-classes", args.new_classes, "--target-classes")
    if not args.target_format:
        needs("--target-prefix", args.target_prefix, "--target-format")


def _check_paths(args: argparse.Namespace) -> None:
    checkpoint.check_writable(args.output_model)
    if args.report and not args.report.parent.is_dir():
        remedy = f"Create it first: mkdir -p {args.report.parent}"
        fail(f"folder of {args.report}", expected="an existing folder", got="none", remedy=remedy)
    names = ("source_model", "config_file", "source_classes", "target_classes", "class_table")
    inputs = {path.resolve() for name in names if (path := getattr(args, name))}
    outputs = [path.resolve() for path in (args.output_model, args.report) if path]
    for path in outputs:
        if path in inputs or outputs.count(path) > 1:
            remedy = "Choose another name."
            fail(f"output {path}", expected="a file of its own", got="an input", remedy=remedy)


def _write_report(args: argparse.Namespace, report: Report) -> None:
    if args.report:
        names = ("source_model", "output_model", "config_file", "overrides")
        record = {name: str(getattr(args, name)) for name in names} | report.as_dict()
        with replacing(args.report) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")


def _for_recipe(args: argparse.Namespace, content: Mapping[str, Any]) -> tuple[Weights, Report]:
    """Convert the file for the recipe's model, and its head for other classes if asked."""
    from vitdet.config import load_config, model_settings  # detectron2 takes seconds to import

    cfg = load_config(args.config_file, args.overrides, trust=args.trust)
    source, lists = str(args.source_model), None
    if args.target_classes:
        lists = _class_lists(args, content)
        model, count = _model_with_classes(cfg)
        target = _shapes(model)
        of_file = heads.with_classes(target, count, len(lists.source))
        target = heads.with_classes(target, count, len(lists.target))
    else:
        model = _model(cfg)
        of_file = target = _shapes(model)
    weights, report = convert(
        content,
        of_file,
        source_format=args.source_format,
        weights=args.weights,
        backbone_only=args.backbone_only,
        resize_patch_embed=args.resize_patch_embed,
        fold_layer_scale=args.fold_layer_scale,
        allow_inexact=args.allow_inexact,
        settings=model_settings(cfg.model, model),
        source=source,
    )
    if lists is not None:
        carried = heads.carry(weights, target, lists, report.initialised)
        weights, report.initialised = carried.weights, carried.initialised
        report.classes = lists.as_dict()
    return weights, report


def _model(cfg: DictConfig) -> nn.Module:
    from vitdet.config import build_model

    return build_model(cfg.model, device="meta")


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _model_with_classes(cfg: DictConfig) -> tuple[nn.Module, int]:
    """Return the model and its number of classes, which is two or more.

    With one class a regressor of four rows could be that class's or everyone's.
    """
    from vitdet.config import set_num_classes

    node = cfg.model.roi_heads if "roi_heads" in cfg.model else cfg.model
    if "num_classes" not in node:
        remedy = "Use the recipe of a detector."
        fail("--target-classes", expected="a recipe with classes", got="none", remedy=remedy)
    count = max(2, int(node.num_classes))
    set_num_classes(cfg, count)
    return _model(cfg), count


def _class_lists(args: argparse.Namespace, content: Mapping[str, Any]) -> heads.ClassMap:
    about = content.get("vitdet")
    theirs = about.get("class_names") if isinstance(about, Mapping) else None
    if args.source_classes:
        source = heads.read_names(args.source_classes)
    elif isinstance(theirs, list) and theirs and all(isinstance(name, str) for name in theirs):
        source = theirs
    else:
        remedy = "Add --source-classes with the json that it was trained on."
        got = "none in the file"
        fail("--target-classes", expected="the file's class names", got=got, remedy=remedy)
    state_dict, _ = unnest(content, str(args.source_model), args.weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    heads.check_count(shapes, source, str(args.source_model))
    table = heads.read_table(args.class_table) if args.class_table else None
    target = heads.read_names(args.target_classes)
    found = heads.match(source, target, table)
    if not found and not args.new_classes:
        raise InputError(
            f"class lists: expected a class in common, got {some(source)} and {some(target)}. "
            "Check the two lists; --class-table pairs names that are spelt differently, "
            "--new-classes starts the rows of all classes anew."
        )
    return found


def _into(
    args: argparse.Namespace, weights: Weights, constants: Mapping[str, str], first: Report
) -> tuple[Weights, Report]:
    """Give the weights the names of the target format; the account is of both steps."""
    try:
        written, second = export(
            weights,
            args.target_format,
            initialised=first.initialised,
            backbone_only=args.backbone_only,
            allow_inexact=args.allow_inexact,
            prefix=args.target_prefix,
            constants=constants,
            source=str(args.source_model),
        )
    except UnaccountedError as error:
        raise UnaccountedError(str(error), chain(first, error.report)) from error
    return written, chain(first, second)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0, or 1 when some keys are unaccounted for.

    Raises:
        InputError: an input is wrong.
    """
    try:
        convert_file(args)
    except UnaccountedError as error:
        _write_report(args, error.report)
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def convert_file(args: argparse.Namespace) -> None:
    """Convert.

    Raises:
        InputError: an input is wrong; as UnaccountedError, some keys are unaccounted for.
    """
    _check_arguments(args)
    _check_paths(args)
    content = checkpoint.read(args.source_model, trust=args.trust)
    constants: Mapping[str, str] = {}
    if args.config_file:
        weights, report = _for_recipe(args, content)
    else:
        weights, constants, report = rename(
            content,
            source_format=args.source_format,
            weights=args.weights,
            source=str(args.source_model),
        )
    if args.target_format:
        weights, report = _into(args, weights, constants, report)
        flat = args.output_model.suffix == ".safetensors"
        checkpoint.write(args.output_model, nest(weights, args.target_format, flat=flat))
    else:
        checkpoint.write(args.output_model, {"model": weights, "vitdet": _about(args, report)})
    _write_report(args, report)
    print(printable(report.summary()))
    print(f"wrote        {args.output_model}: {len(weights)} tensors")


def _about(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    about: dict[str, Any] = {"format": 1, "source_format": report.source_format}
    about["initialised"] = report.initialised
    if args.target_classes:
        classes = heads.read_classes(args.target_classes)
        about |= {"class_names": list(classes.values()), "class_ids": list(classes)}
    return about
