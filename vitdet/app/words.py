"""Options as other projects call them: read as ours, or told in one line what does it here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from vitdet.utils.checks import nearest

_Value = TypeVar("_Value")

_BATCH = "dataloader.train.total_batch_size="
# Names of one thing, and what it is called here. The first that the command has is taken: an
# option, a change to the recipe where it takes some ("key="), or images, which have no option ("").
ALIASES = {
    "--conf --confidence --score --thresh --score-threshold": ("--threshold",),
    "--model --checkpoint --ckpt -w": ("--source-model", "--weights"),
    "-o --output --output-dir --save-dir": ("--out", "--output-model", "train.output_dir="),
    "--config --cfg -c": ("--config-file",),
    "--batch-size --batch -b": ("--batch", "--batch-size", _BATCH),
    "--lr --lr0 --learning-rate": ("optimizer.lr=",),
    "--workers --num-workers": ("dataloader.train.num_workers=",),
    "--gpus --nproc-per-node": ("--num-gpus",),
    "--device": ("train.device=",),
    "--seed": ("train.seed=",),
    "--source --input": ("",),
}
# What has no option of its own.
TEXTS = {
    "--source --input": "give the images without an option: vitdet predict IMG ... --weights FILE",
    "--iou --nms": "the IoU of NMS is the recipe's, "
    "model.roi_heads.box_predictor.test_nms_thresh: vitdet val takes it as key=value",
    "--max-det": "the number of detections is the recipe's, "
    "model.roi_heads.box_predictor.test_topk_per_image: vitdet val takes it as key=value",
    "--imgsz --image-size --img-size": "the size of images is the recipe's; "
    "vitdet predict cuts large ones by --slices",
    "--save-txt --save-conf": "--save-json writes boxes, scores and masks as JSON",
    "--half --fp16 --amp": "--precision fp16 or bf16; a training takes train.precision=bf16",
    "--patience": "train.patience=N stops after N evaluations without a better one",
    "--name --project": "--out DIR is the folder of the results",
    "--show --view-img": "--out DIR is the folder of the pictures; vitdet serve shows them",
    "--device": "leave it out: this command computes on the CPU",
    "--config-file --config": "vitdet recipe --config-file FILE trains and evaluates a recipe",
}


def of(table: Mapping[str, _Value], name: str) -> _Value | None:
    """Return the value of the row that has this name among its names."""
    return next((value for names, value in table.items() if name in names.split()), None)


def translated(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return a command's words by our names; what is no option of it ends with a line of help.

    A "_" in an option's name is read as "-", a "~" that begins a path as the user's folder, and
    name=value as --name value where the command takes no changes to a recipe.
    """
    ours = parser._option_string_actions
    taken = {action.dest for action in parser._actions}
    done: list[str] = []
    rest = (_home(word) for word in words)
    for word in rest:
        if word == "--":
            return [*done, word, *rest]
        name, equals, value = word.partition("=")
        if not word.startswith("-") and equals and "overrides" not in taken:
            option = f"--{name.replace('_', '-')}"
            known = option in ours or of(ALIASES, option) or of(TEXTS, option)
            name = option if known and not Path(word).exists() else name
        if not name.startswith("-") or name[1:2].isdigit() or name == "-":
            done.append(word)
            continue
        name = name.replace("_", "-")
        alias = name if name in ours else _alias(name, ours, taken)
        if alias is None:
            meant = nearest(name, ours)
            hint = of(TEXTS, name) or (f"did you mean {meant}?" if meant else "see --help")
            parser.error(f"unrecognized arguments: {name} ({hint})")
        if alias == "" or alias.endswith("="):
            done.append(alias + (value if equals else next(rest, "")))
        else:
            done.append(f"{alias}{equals}{value}")
    return done


def _alias(name: str, ours: Mapping[str, object], taken: set[str]) -> str | None:
    """Return the first of our words for a name that a command has."""
    for word in of(ALIASES, name) or ():
        place = "inputs" if word == "" else "overrides" if word.endswith("=") else None
        if word in ours or place in taken:
            return word
    return None


def _home(word: str) -> str:
    """Replace a "~" at the start of a path, or of that in name=path."""
    start = re.match(r"[\w.-]*=(?=~)", word)
    head = start[0] if start else ""
    path = word[len(head) :]
    return head + (str(Path(path).expanduser()) if path[:2] in ("~", "~/") else path)
