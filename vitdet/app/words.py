"""Options as other projects call them: read as ours, or told in one line what does it here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vitdet.utils.checks import nearest

# The first that the command has: an option, or a change to the recipe where it takes some.
ALIASES = {
    "--conf": ("--threshold",),
    "--model": ("--weights", "--source-model"),
    "-o": ("--out", "--output-model"),
    "--batch-size": ("--batch", "dataloader.train.total_batch_size="),
    "--batch": ("--batch-size", "dataloader.train.total_batch_size="),
    "--lr": ("optimizer.lr=",),
    "--device": ("train.device=",),
}
# What has no option of its own.
TEXTS = {
    "--source": "images stand without an option: vitdet predict IMG ... --weights FILE",
    "--iou": "the IoU of NMS is the recipe's, model.roi_heads.box_predictor.test_nms_thresh",
    "--imgsz": "the size of images is the recipe's; vitdet predict cuts large ones by --slices",
    "--save-txt": "--save-json writes boxes and masks as JSON",
    "--half": "--precision fp16 or bf16",
    "--patience": "train.patience=N stops after N evaluations without a better one",
}


def translated(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return a command's words by our names; what is no option of it ends with a line of help."""
    ours = parser._option_string_actions
    changes = any(action.dest == "overrides" for action in parser._actions)
    done: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == "--":
            return [*done, word, *rest]
        if name in ours or not word.startswith("-") or word[1:2].isdigit() or word in ("-", ""):
            done.append(word)
            continue
        known = [*ours, *(each for each in ALIASES.get(name, ()) if changes and "=" in each)]
        alias = next((each for each in ALIASES.get(name, ()) if each in known), None)
        if alias is None:
            meant = nearest(name, ours)
            hint = TEXTS.get(name) or (f"did you mean {meant}?" if meant else "see --help")
            parser.error(f"unrecognized arguments: {name} ({hint})")
        if "=" in alias:
            done.append(alias + (value if equals else next(rest, "")))
        else:
            done.append(f"{alias}{equals}{value}")
    return done
