"""`vitdet convert`, and converter.py: a checkpoint for a recipe, other classes, or another project.

Exit status: 0 written, 1 some keys are unaccounted for (nothing is written but the report),
2 an input is wrong. docs/conversion.md lists the formats.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from vitdet import checkpoint
from vitdet.app import follow
from vitdet.convert import TARGETS, Report, UnaccountedError, convert, export
from vitdet.convert import classes as heads
from vitdet.convert.describe import about_of
from vitdet.convert.names import shapes_of
from vitdet.utils import thresholds
from vitdet.utils.checks import InputError, printable
from vitdet.utils.files import write_text
from vitdet.utils.state_dicts import some
from vitdet.weights import Weights
from vitdet.weights import read as read_weights

# an option, and those that mean nothing without it
_NEEDED = {
    "config_file": ("target_classes", "fold_layer_scale", "resize_patch_embed", "overrides"),
    "target_classes": ("source_classes", "class_table", "new_classes"),
}


def run(args: argparse.Namespace) -> int:
    """Convert; return 0, or 1 when some keys are unaccounted for."""
    try:
        for line in convert_file(args):
            print(line)
    except UnaccountedError as error:
        _write_report(args, error.report)
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def convert_file(args: argparse.Namespace) -> list[str]:
    """Convert; an input that is wrong is an InputError, unaccounted keys an UnaccountedError.

    Into `args.overrides` come first those by which the recipe follows the file. Returns the line
    that trains with the output, none where nothing does.
    """
    _check_options(args)
    _check_paths(args)
    found = read_weights(args.source_model, trust=args.trust)
    source = {"weights": args.weights, "source_format": args.source_format}
    source["source"] = str(args.source_model)
    cfg = _recipe(args, found, source) if args.config_file else None
    if cfg is not None:
        weights, report = _for_recipe(args, cfg, found.content, source)
    else:
        weights, report = convert(found.content, None, **source)
    written: dict[str, Any] = {"model": weights, "vitdet": _about(args, report)}
    if not args.target_classes:
        which = "ema" if str(args.weights).startswith("ema") else "model"
        kept = thresholds.chosen(None, about_of(found.content), which, source["source"])
        written["vitdet"] |= kept.note()
    if args.target_format:
        how = {"backbone_only": args.backbone_only, "allow_inexact": args.allow_inexact}
        how |= {"after": report, "source": source["source"]}
        weights, report = export(weights, args.target_format, **how)
        # safetensors have no nesting: `write` takes them from "model"
        nested = TARGETS[args.target_format].nested or args.output_model.suffix == ".safetensors"
        written = {"model": weights} if nested else weights
    checkpoint.write(args.output_model, written)
    _write_report(args, report)
    print(printable(report.summary()))
    print(f"wrote        {args.output_model}: {len(weights)} tensors")
    if cfg is None or "train" not in cfg or args.target_format:
        return []
    start = follow.setting("train.init_checkpoint", args.output_model)
    words = ["--config-file", str(args.config_file), start, *args.overrides]
    return [printable(f"train        vitdet recipe {shlex.join(words)}")]


def _check_options(args: argparse.Namespace) -> None:
    if not args.config_file and not args.target_format:
        text = "expected a recipe, got none. Give the recipe that the weights are for (configs/)."
        raise InputError(f"--config-file: {text}")
    for needed, names in _NEEDED.items():
        lone = [name for name in names if getattr(args, name) and not getattr(args, needed)]
        if lone:
            option, other = (f"--{word.replace('_', '-')}" for word in (lone[0], needed))
            option = "key=value" if lone[0] == "overrides" else option
            raise InputError(f"{option}: expected {other} beside it, got none. Add {other}.")


def _check_paths(args: argparse.Namespace) -> None:
    checkpoint.check_writable(args.output_model)
    if args.report and not args.report.parent.is_dir():
        raise InputError(f"folder of {args.report}: expected a folder, got none. Create it first.")
    names = ("source_model", "config_file", "source_classes", "target_classes", "class_table")
    inputs = {path.resolve() for name in names if (path := getattr(args, name))}
    outputs = [path.resolve() for path in (args.output_model, args.report) if path]
    for path in outputs:
        if path in inputs or outputs.count(path) > 1:
            text = "expected a file of its own, got an input. Choose another name."
            raise InputError(f"output {path}: {text}")


def _recipe(args: argparse.Namespace, found: Weights, source: Mapping[str, Any]) -> DictConfig:
    """Return the recipe, whose backbone follows the file of a foundation model."""
    from vitdet import config  # detectron2 takes seconds to import

    cfg = config.load_config(args.config_file, args.overrides, trust=args.trust)
    typed = [*args.overrides, *([f"{follow.NET}.layer_scale"] if args.fold_layer_scale else [])]
    lines = follow.changes(cfg, found, typed, **source)
    args.resize_patch_embed |= lines is not None
    if not lines:
        return cfg
    print(*(printable(f"follows      {line}") for line in lines), sep="\n")
    args.overrides[:0] = lines
    return config.load_config(args.config_file, args.overrides, trust=args.trust)


def _for_recipe(
    args: argparse.Namespace,
    cfg: DictConfig,
    content: Mapping[str, Any],
    source: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], Report]:
    """Convert the file for the recipe's model, and its head for other classes if asked."""
    from vitdet import config

    lists, count = None, 0
    if args.target_classes:
        lists = _class_lists(args, content)
        node = cfg.model.roi_heads if "roi_heads" in cfg.model else cfg.model
        if "num_classes" not in node:
            text = "expected a recipe with classes, got none. Use the recipe of a detector."
            raise InputError(f"--target-classes: {text}")
        # of two or more: with one, a regressor of four rows could be that class's or everyone's
        count = max(2, int(node.num_classes))
        config.set_num_classes(cfg, count)
    model = config.build_model(cfg.model, device="meta")
    target = shapes_of(model.state_dict())
    weights, report = convert(
        content,
        heads.with_classes(target, count, len(lists.source)) if lists is not None else target,
        backbone_only=args.backbone_only,
        resize_patch_embed=args.resize_patch_embed,
        fold_layer_scale=args.fold_layer_scale,
        allow_inexact=args.allow_inexact,
        settings=config.model_settings(cfg.model, model),
        **source,
    )
    if lists is not None:
        target = heads.with_classes(target, count, len(lists.target))
        weights, report.initialised = heads.carry(weights, target, lists, report.initialised)
        report.classes = lists.as_dict()
    return weights, report


def _class_lists(args: argparse.Namespace, content: Mapping[str, Any]) -> heads.ClassMap:
    about = content.get("vitdet")
    source = about.get("class_names") if isinstance(about, Mapping) else None
    if args.source_classes:
        source = list(heads.read_classes(args.source_classes).values())
    elif not isinstance(source, list) or not source or not all(isinstance(n, str) for n in source):
        raise InputError(
            "--target-classes: expected the file's class names, got none in the file. "
            "Add --source-classes with the json that it was trained on."
        )
    table = heads.read_table(args.class_table) if args.class_table else None
    target = list(heads.read_classes(args.target_classes).values())
    found = heads.match(source, target, table)
    if set(found.rows) == {None} and not args.new_classes:
        raise InputError(
            f"class lists: expected a class in common, got {some(source)} and {some(target)}. "
            "Check the two lists; --class-table pairs names that are spelt differently, "
            "--new-classes starts the rows of all classes anew."
        )
    return found


def _about(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    about: dict[str, Any] = {"format": 1, "source_format": report.source_format}
    about["initialised"] = report.initialised
    about["recipe_overrides"] = follow.of_model(args.overrides)
    if args.target_classes:
        classes = heads.read_classes(args.target_classes)
        about |= {"class_names": list(classes.values()), "class_ids": list(classes)}
    return about


def _write_report(args: argparse.Namespace, report: Report) -> None:
    if args.report:
        names = ("source_model", "output_model", "config_file", "overrides")
        record = {name: str(getattr(args, name)) for name in names} | report.as_dict()
        write_text(args.report, json.dumps(record, indent=1) + "\n")
