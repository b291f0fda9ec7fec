"""State dict in, state dict out, and an account of every key. Knows no model class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from vitdet.convert.account import account, account_settings, stop_if_unaccounted
from vitdet.convert.class_rows import settle
from vitdet.convert.fit import fit
from vitdet.convert.formats import FORMATS
from vitdet.convert.layer_scale import fold
from vitdet.convert.nesting import nests, unnest
from vitdet.convert.places import Places, find_places
from vitdet.convert.plan import Given, Step, plan
from vitdet.convert.report import Report, UnaccountedError
from vitdet.convert.rules import File, Format, Refuse, Shapes
from vitdet.utils.checks import fail, nearest
from vitdet.utils.state_dicts import compare_shapes, compare_sizes, rows_of, some

__all__ = ["FORMATS", "Report", "UnaccountedError", "convert", "detect"]

# beside weights: indexes and counters
_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def detect(content: Mapping[str, Any], weights: str | None = None) -> str:
    """Return the name of the format of a file's content.

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict.
        weights: the key that holds the state dict, None to find it.

    Raises:
        InputError: none of `FORMATS` fits.
    """
    state_dict, nested_under = unnest(content, "source", weights)
    return _detect(content, state_dict, nested_under, "source").name


def convert(
    content: Mapping[str, Any],
    target: Shapes,
    *,
    source_format: str | None = None,
    weights: str | None = None,
    backbone_only: bool = False,
    resize_patch_embed: bool = False,
    fold_layer_scale: bool = False,
    allow_inexact: bool = False,
    settings: Mapping[str, object] | None = None,
    source: str = "source",
) -> tuple[dict[str, torch.Tensor], Report]:
    """Turn the content of a file into a state dict for a model.

    Gradients flow through it: weights that require one give a state dict that does.

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict.
        target: {name: shape} of the model: a whole detector, a pyramid, or a backbone alone.
        source_format: a name in `FORMATS`; None to recognise it.
        weights: the key of the file that holds the state dict ("ema_state"); None to find it.
        backbone_only: leave out the source's pyramid and heads, if it has them.
        resize_patch_embed: allow the patch kernel to be resampled to another patch size.
        fold_layer_scale: multiply LayerScale into the layers before it, exactly, for a model
            that has none.
        allow_inexact: go on where the model lacks a part of the source's network; the account
            lists what was left out.
        settings: arguments of the model's backbone, as far as they are known: those that the
            format knows better must agree.
        source: the file's name, for messages.

    Returns:
        (state dict, account). The state dict holds every target name but `account.initialised`.

    Raises:
        UnaccountedError: a key no rule covers, or a name that should have been filled.
        InputError: unknown format, another size, another number of classes, parts that the model
            has no place for.
    """
    state_dict, fmt, report = open_up(content, source_format, weights, source)
    given_shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    places = find_places(fmt, given_shapes, target, source)

    given = _name_keys(state_dict, places, report, source)
    if backbone_only:
        _leave_outside(given, report)
    if fold_layer_scale:
        fold(given, places, target, report, source)
    settle(given, places, target, report, source)
    _compare_sizes(given, places, target, source)
    steps = plan(given, places, target)
    left_open = _left_open(content, source)
    account(given, steps, places, target, report, set(left_open))
    # single rows of a class head that its file leaves open stay open
    rows = ((entry, rows_of(entry)) for entry in left_open)
    report.initialised += [entry for entry, found in rows if found and found[0] in report.used]
    account_settings(fmt, settings or {}, report)
    stop_if_unaccounted(report, source, allow_inexact=allow_inexact)
    grid = _grid(settings or {})
    result = _carry_out(
        steps, given, target, report, source, resize_patch_embed=resize_patch_embed, grid=grid
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in result.items()}
    remedy = "Use the recipe that the file was made for."
    compare_shapes(shapes, target, source=source, remedy=remedy)
    return result, report


def open_up(
    content: Mapping[str, Any], source_format: str | None, weights: str | None, source: str
) -> tuple[dict[str, torch.Tensor], Format, Report]:
    """Return a file's state dict, its format, and an account that notes what lies beside it.

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict.
        source_format: a name in `FORMATS`; None to recognise it.
        weights: the key of the file that holds the state dict; None to find it.
        source: the file's name, for messages.

    Raises:
        InputError: unknown format, no state dict.
    """
    state_dict, nested_under = unnest(content, source, weights)
    fmt = _format(source_format, content, state_dict, nested_under, source)
    report = Report(fmt.name, nested_under)
    report.notes += fmt.notes
    _note_the_rest(content, report)
    return state_dict, fmt, report


def _format(
    name: str | None,
    content: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    nest: str,
    source: str,
) -> Format:
    if name is None:
        return _detect(content, state_dict, nest, source)
    if name not in FORMATS:
        _unknown_format(name)
    return FORMATS[name]


def _detect(
    content: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], nest: str, source: str
) -> Format:
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    file = File(frozenset(map(str, content)), nest, shapes)
    found = [fmt for fmt in FORMATS.values() if fmt.recognise(file)]
    if not found:
        got = f"keys such as {some(shapes)}"
        remedy = "Name it with --source-format."
        fail(f"{source}: format", expected=f"one of {_known()}", got=got, remedy=remedy)
    return found[0]


def _unknown_format(name: str) -> NoReturn:
    close = nearest(name, FORMATS)
    remedy = f"Did you mean {close}?" if close else "Leave it out to have it recognised."
    fail("--source-format", expected=f"one of {_known()}", got=name, remedy=remedy)


def _known() -> str:
    return ", ".join(FORMATS)


def _note_the_rest(content: Mapping[str, Any], report: Report) -> None:
    nest = report.nested_under
    others = [key for key in nests(content) if key != nest] if nest else []
    if others:
        how = "--weights takes another"
        report.notes.append(f"weights taken from {nest!r}; {how}: {', '.join(others)}")
    rest = sorted({str(key) for key in content} - {nest, "vitdet", *others}) if nest else []
    if rest:
        report.notes.append(f"left out beside the weights: {some(rest)}")


def _name_keys(
    state_dict: Mapping[str, torch.Tensor], places: Places, report: Report, source: str
) -> dict[str, Given]:
    """Return {inner name: what the file gives for it}."""
    given: dict[str, Given] = {}
    for key, value in state_dict.items():
        name, rule = places.inner(key)
        if isinstance(rule, Refuse):
            what = f"{source}: {key} as {report.source_format}"
            remedy = "Our models have no such part, so these weights cannot be used."
            fail(what, expected="parts that our models have", got=rule.why, remedy=remedy)
        if name in given:
            got = f"{given[name].keys[0]} and {key}"
            remedy = "Check --source-format."
            fail(f"{source}: weights for {name}", expected="one key", got=got, remedy=remedy)
        given[name] = Given((key,), value, rule)
    return given


def _leave_outside(given: dict[str, Given], report: Report) -> None:
    for name in [name for name in given if name.startswith("/")]:
        rule = given[name].rule
        why = getattr(rule, "why", "outside the backbone (--backbone-only)")
        report.dropped |= dict.fromkeys(given.pop(name).keys, why)


def _grid(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (H, W) of a model's absolute positions, None where they are a square."""
    size = settings.get("pretrain_img_size", settings.get("img_size"))
    if not isinstance(size, Sequence) or "patch_size" not in settings:
        return None
    height, width = size
    return height // settings["patch_size"], width // settings["patch_size"]


def _left_open(content: Mapping[str, Any], source: str) -> list[str]:
    """Return what a file of ours leaves to the model's own initialisation."""
    about = content.get("vitdet")
    names = about.get("initialised", []) if isinstance(about, Mapping) else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        remedy = "Convert the file again from its source."
        got = type(names).__name__ if not isinstance(names, list) else "other things"
        fail(f"{source}: initialised", expected="a list of names", got=got, remedy=remedy)
    return names


def _compare_sizes(given: Mapping[str, Given], places: Places, target: Shapes, source: str) -> None:
    named = ((places.target(name), each) for name, each in given.items())
    shapes = {name: tuple(each.tensor.shape) for name, each in named if name is not None}
    compare_sizes(shapes, target, source=source)


def _carry_out(
    steps: list[Step],
    given: Mapping[str, Given],
    target: Shapes,
    report: Report,
    source: str,
    *,
    resize_patch_embed: bool,
    grid: tuple[int, int] | None,
) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for step in steps:
        shape = tuple(target[step.name])
        parts = [None if name is None else given[name] for name in step.sources]
        for part in parts:
            if part is not None:
                check_finite(part, source)
        tensor = step.compute([None if part is None else part.tensor for part in parts], shape)
        if step.make is not None and step.make.note and step.make.note not in report.notes:
            report.notes.append(step.make.note)
        fitted, notes = tensor, []
        if not step.inner.startswith("/"):
            allowed = resize_patch_embed
            fitted, notes = fit(
                step.inner, tensor, shape, resize_patch_embed=allowed, source=source, grid=grid
            )
        before = tensor.shape
        if step.sources == (step.inner,) and (part := parts[0]) is not None:
            # a rule may resize too; a view of the same numbers is no resize
            before = part.tensor.shape if part.tensor.numel() != fitted.numel() else before
        if fitted.shape != before:
            report.resized[step.name] = tuple(before), tuple(fitted.shape)
        report.notes += notes
        result[step.name] = fitted
    return result


def check_finite(given: Given, source: str) -> None:
    """Raise InputError when a weight is inf or nan, or of a type that is no weight's."""
    tensor = given.tensor
    if tensor.dtype not in _DTYPES:
        remedy = "Save the weights as float32."
        what, got = f"{source}: {given.keys[0]}", str(tensor.dtype).removeprefix("torch.")
        fail(what, expected="float64, float32, bfloat16 or float16", got=got, remedy=remedy)
    if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
        remedy = "The file is damaged or its training diverged."
        what = f"{source}: {given.keys[0]}"
        fail(what, expected="finite numbers", got="inf or nan", remedy=remedy)
