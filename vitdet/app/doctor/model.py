"""Checks of the model: can it be built, do sizes fit, do the weights fit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from vitdet import checkpoint
from vitdet.app.doctor.finding import FAULT, OK, WARNING, Finding
from vitdet.app.doctor.patient import Patient
from vitdet.config import backbone_settings, build_model, set_num_classes
from vitdet.engine.weights import load_weights


def model(patient: Patient) -> Iterator[Finding]:
    """Build it, for the classes of the data."""
    cfg = patient.cfg.copy()
    if patient.train is not None:
        set_num_classes(cfg, len(patient.train.class_names))
    patient.model = build_model(cfg.model, device="meta")
    count = sum(value.numel() for value in patient.model.parameters())
    yield Finding(OK, "model", f"{type(patient.model).__name__}, {count / 1e6:.2f} M parameters")


def sizes(patient: Patient) -> Iterator[Finding]:
    """Images against the square that they are padded to, windows against the grid."""
    if patient.model is None:
        return
    backbone: Any = getattr(patient.model, "backbone", None)
    constraints = getattr(backbone, "padding_constraints", {})
    square = constraints.get("square_size", 0)
    for half in ("train", "test"):
        largest = _largest(patient.cfg.dataloader[half].get("mapper"))
        if square and largest is not None and largest > square:
            text = f"{half} images are up to {largest} pixels, the model pads to {square}"
            remedy = f"Set model.backbone.square_pad={largest}, or resize to less."
            yield Finding(FAULT, "sizes", text, remedy)
    coarsest = getattr(backbone, "size_divisibility", 0)
    if square and coarsest and square % coarsest:
        text = f"a square of {square} pixels is no multiple of {coarsest}"
        remedy = "Set model.backbone.square_pad to one."
        yield Finding(FAULT, "sizes", text, remedy)
    yield from _windows(backbone_settings(patient.cfg.model), square)


def _windows(net: dict[str, Any], square: int) -> Iterator[Finding]:
    patch, window = net.get("patch_size"), net.get("window_size")
    if not isinstance(patch, int) or not isinstance(window, int):
        return
    side = square or net.get("img_size", 0)
    grid = -(-side // patch)
    text = f"{side} pixels, patches of {patch}, {grid} x {grid} tokens"
    if side % patch:
        yield Finding(WARNING, "sizes", text, f"A multiple of {patch} pixels wastes nothing.")
        return
    if window and grid % window:
        padded = -(-grid // window) * window
        text += f"; windows of {window} pad them to {padded} x {padded}"
        text += f", {100 * (padded**2 / grid**2 - 1):.0f} % more"
    if square and net.get("img_size") not in (None, square):
        yield Finding(
            WARNING,
            "sizes",
            f"the model is made for {net['img_size']} pixels and gets {square}",
            "Positions are resized in every pass; set model.backbone.net.img_size too.",
        )
    far = ("global_block_indexes", "residual_block_indexes", "shifted_block_indexes")
    if window and not any(net.get(key) for key in far):
        remedy = "Give it model.backbone.net.global_block_indexes."
        yield Finding(WARNING, "sizes", f"{text}; no block looks beyond its window", remedy)
    else:
        yield Finding(OK, "sizes", text)


def _largest(mapper: DictConfig | None) -> int | None:
    """Return the longest side in pixels that the augmentations give, None if they do not tell."""
    node = None if mapper is None else mapper.get("augmentations")
    if not isinstance(node, DictConfig):
        return None
    for keys in (("max_size",), ("height", "width"), ("size",)):
        values = [node.get(key) for key in keys]
        if all(isinstance(value, int) for value in values):
            return max(values)
        if keys == ("size",) and isinstance(values[0], ListConfig):
            return max(values[0])
    return None


def weights(patient: Patient) -> Iterator[Finding]:
    """The file that the training starts from, against the model."""
    name = patient.cfg.train.init_checkpoint
    if not name:
        text = "none: the training starts from random weights"
        remedy = "train.init_checkpoint=FILE, made by converter.py; docs/conversion.md has the way."
        yield Finding(WARNING, "weights", text, remedy)
        return
    if not Path(name).is_file():
        remedy = "Make it with converter.py; docs/recipes.md says from which file."
        yield Finding(FAULT, "weights", f"{name} is not there", remedy)
        return
    if patient.model is None:
        return
    content = checkpoint.read(name)
    state, initialised = checkpoint.weights_of(content, source=name)
    shapes = {key: torch.empty_like(value, device="meta") for key, value in state.items()}
    about = content.get("vitdet", {})
    data = patient.train or patient.test
    names = about.get("class_names", ()) if data is None else data.class_names
    load_weights(patient.model, {"model": shapes, "vitdet": about}, name, names)
    text = f"{name}: all {len(shapes)} names and shapes fit"
    if initialised:
        text += f"; {len(initialised)} entries ({initialised[0]}, ...) are left to initialisation"
    yield Finding(OK, "weights", text)
