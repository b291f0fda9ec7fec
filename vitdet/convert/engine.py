"""State dict in, state dict out, and an account of every key. Knows no model class."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vitdet.convert.formats import FORMATS
from vitdet.convert.names import Names, Source, find_names, nests, shapes_of, unnest
from vitdet.convert.rules import (
    Drop,
    Format,
    Inexact,
    Make,
    OtherThan,
    Refuse,
    Rename,
    Report,
    Shapes,
    UnaccountedError,
    by_rule,
)
from vitdet.convert.tensors import Grid, add_class_row, copy, fit, fold, split_distillation
from vitdet.utils.checks import InputError, check_word
from vitdet.utils.state_dicts import compare_shapes, compare_sizes, rows_of, some

# beside weights: indexes and counters
_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
# Parts that a source may lack as a whole. Those of a backbone start as the identity: detectron2
# initialises the tables with zeros, and the last norm of a propagation block too. A detector of
# boxes alone (EVA-02's for Objects365) starts one with masks.
_OPTIONAL = (
    *(r"blocks\.\d+\.attn\.rel_pos_[hw]$", r"blocks\.\d+\.residual\."),
    r"/roi_heads\.mask_head\.",
)
# A buffer that a model with federated loss computes from the data set.
_FED_LOSS = r"/roi_heads\.box_predictor\.(\d+\.)?fed_loss_cls_weights$"
# Parts of a detector that a format's settings may speak of, and what is in their names.
_PARTS = {
    "pyramid": "simfp_",
    "box_head": "roi_heads.box_head.",
    "mask_head": "roi_heads.mask_head.",
}
# What to set in a recipe when a part is in the file and not in the model, or the other way.
_ADVICE = (
    (r"\.(ls[12]\.gamma|gamma_[12])$", "layer_scale (or --fold-layer-scale)"),
    (r"\.rel_pos_[hw]$", "use_rel_pos"),
    (r"\.residual\.", "residual_block_indexes"),
    (r"\.qkv\.bias$", "qkv_bias"),
    (r"pos_embed$", "use_abs_pos"),
    (r"\.mlp\.(fc1|w\d+|ffn_ln)\.", "ffn_layer"),
    (r"cls_token$", "use_cls_token"),
    (r"reg_token$", "num_register_tokens"),
    (r"(^|\.)norm_pre\.", "pre_norm"),
    (r"(^|\.net\.|^net\.)norm\.", "final_norm"),
)
_CHECK = "Check --config-file and --source-format; --backbone-only leaves out pyramid and heads."
_COPY = Make("", (), copy)
Step = tuple[tuple[str | None, ...], Make]  # inner names of what a weight is made from, and how


def detect(content: Mapping[str, Any], weights: str | None = None) -> str:
    """Return the name of the format of a file's content; an InputError for none of `FORMATS`."""
    return _open(content, None, weights, "source")[1].name


def convert(
    content: Mapping[str, Any],
    target: Shapes | None,
    *,
    source_format: str | None = None,
    weights: str | None = None,
    backbone_only: bool = False,
    resize_patch_embed: bool = False,
    fold_layer_scale: bool = False,
    allow_inexact: bool = False,
    settings: Mapping[str, Any] | None = None,
    source: str = "source",
) -> tuple[dict[str, torch.Tensor], Report]:
    """Return the weights of a file in the names and shapes of a model.

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict.
        target: {name: shape} of a detector, a pyramid, or a backbone. None: give the weights our
            names and nothing else, for `export`; a format that computes weights needs a model.
        source_format: a name in `FORMATS`; None to recognise it.
        weights: the key of the file that holds the state dict ("ema_state"); None to find it.
        backbone_only: leave out the source's pyramid and heads, if it has them.
        resize_patch_embed: allow the patch kernel to be resampled to another patch size.
        fold_layer_scale: multiply LayerScale into the layers before it, for a model without.
        allow_inexact: go on where the model lacks a part of the source's network.
        settings: arguments of the model's backbone: those that the format knows must agree.
        source: the file's name, for messages.

    Returns:
        (state dict, account). The state dict holds every target name but `account.initialised`.

    Raises:
        UnaccountedError: a key no rule covers, or a name that should have been filled.
        InputError: unknown format, other sizes, parts that the model has no place for.
    """
    settings = settings or {}
    state_dict, fmt, report = _open(content, source_format, weights, source)
    names = find_names(fmt, shapes_of(state_dict), target, source)
    given = _name_keys(state_dict, names, source)
    if target is None:
        return _renamed(given, names, report, source), report
    if backbone_only:
        _leave_outside(given, report)
    if fold_layer_scale:
        report.notes += fold(given, names, target, source)
    report.notes += split_distillation(given, source)
    report.notes += add_class_row(given, names, target, source)
    of_file = {names.in_model(name): tuple(each.tensor.shape) for name, each in given.items()}
    sizes = {name: shape for name, shape in of_file.items() if name is not None}
    compare_sizes(sizes, target, source=source)
    steps = _plan(given, names, target, report)
    _account_file(given, steps, names, report)
    _account_model(given, steps, names, target, _left_open(content, source), report)
    _account_settings(fmt, settings, report)
    _stop_if_unaccounted(report, source, allow_inexact=allow_inexact)
    grid, result = _grid(settings), {}
    for name, step in steps.items():
        tensor, notes = _make(step, given, target[name], report, source), []
        inner, before = names.of_model(name), tensor.shape
        if not inner.startswith("/"):
            how = {"resize_kernel": resize_patch_embed, "grid": grid, "source": source}
            tensor, notes = fit(inner, tensor, target[name], **how)
        if step[0] == (inner,) and given[inner].tensor.numel() != tensor.numel():
            # a rule may resize too; a view of the same numbers is no resize
            before = given[inner].tensor.shape
        if tensor.shape != before:
            report.resized[name] = tuple(before), tuple(tensor.shape)
        report.notes += notes
        result[name] = tensor
    remedy = "Use the recipe that the file was made for."
    compare_shapes(shapes_of(result), target, source=source, remedy=remedy)
    return result, report


# --- reading a file ------------------------------------------------------------------------------


def _open(
    content: Mapping[str, Any], source_format: str | None, weights: str | None, source: str
) -> tuple[dict[str, torch.Tensor], Format, Report]:
    """Return a file's state dict, its format, and an account that notes what lies beside it."""
    state_dict, nest = unnest(content, source, weights)
    if source_format is not None:
        check_word("--source-format", source_format, FORMATS)
        fmt = FORMATS[source_format]
    else:
        marks = (f"/{nest}", *(["/vitdet"] if "vitdet" in content else []))
        found = (fmt for fmt in FORMATS.values() if fmt.fits((*state_dict, *marks)))
        fmt = next(found, None)
    if fmt is None:
        raise InputError(
            f"{source}: format: expected one of {', '.join(FORMATS)}, got keys such as "
            f"{some(state_dict)}. Name it with --source-format."
        )
    report = Report(fmt.name, nest, notes=list(fmt.notes))
    others = [key for key in nests(content) if key != nest] if nest else []
    if others:
        how = "--weights takes another"
        report.notes.append(f"weights taken from {nest!r}; {how}: {', '.join(others)}")
    rest = sorted({str(key) for key in content} - {nest, "vitdet", *others}) if nest else []
    if rest:
        report.notes.append(f"left out beside the weights: {some(rest)}")
    return state_dict, fmt, report


def _name_keys(
    state_dict: Mapping[str, torch.Tensor], names: Names, source: str
) -> dict[str, Source]:
    """Return {inner name: what the file gives for it}."""
    given: dict[str, Source] = {}
    for key, value in state_dict.items():
        name, rule = names.of_file(key)
        if isinstance(rule, Refuse):
            raise InputError(
                f"{source}: {key} as {names.fmt.name}: expected parts that our models have, got "
                f"{rule.why}. Our models have no such part, so these weights cannot be used."
            )
        if name in given:
            raise _two_keys(name, f"{given[name].keys[0]} and {key}", source)
        given[name] = Source((key,), value, rule)
    return given


def _two_keys(name: str, got: str, source: str) -> InputError:
    text = f"{source}: weights for {name}: expected one key, got {got}. Check --source-format."
    return InputError(text)


def _leave_outside(given: dict[str, Source], report: Report) -> None:
    for name in [name for name in given if name.startswith("/")]:
        why = getattr(given[name].rule, "why", "outside the backbone (--backbone-only)")
        report.dropped |= dict.fromkeys(given.pop(name).keys, why)


def _left_open(content: Mapping[str, Any], source: str) -> list[str]:
    """Return what a file of ours leaves to the model's own initialisation."""
    about = content.get("vitdet")
    names = about.get("initialised", []) if isinstance(about, Mapping) else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{source}: initialised: expected a list of names. Convert it again.")
    return names


def _check_weight(given: Source, source: str) -> None:
    """Raise InputError when a weight is inf or nan, or of a type that is no weight's."""
    tensor, what = given.tensor, f"{source}: {given.keys[0]}"
    if tensor.dtype not in _DTYPES:
        got = f"got {str(tensor.dtype).removeprefix('torch.')}. Save the weights as float32."
        raise InputError(f"{what}: expected float64, float32, bfloat16 or float16, {got}")
    if not tensor.is_meta and not torch.isfinite(tensor).all():
        raise InputError(f"{what}: expected finite numbers, got inf or nan. It is damaged.")


def _renamed(
    given: Mapping[str, Source], names: Names, report: Report, source: str
) -> dict[str, torch.Tensor]:
    """Return the weights under our names; enter what the format allows to leave out."""
    if names.fmt.makes:
        raise InputError(
            f"{source} without a recipe: expected a format that only renames, got {names.fmt.name},"
            " whose weights have to be fitted to one. Add --config-file with a recipe of its size."
        )
    result: dict[str, torch.Tensor] = {}
    for inner, each in given.items():
        name = names.in_model(inner) or inner.removeprefix("/")
        if name in result:
            raise _two_keys(name, "two", source)
        _check_weight(each, source)
        result[name] = each.tensor
        report.used[each.keys[0]] = name
        if isinstance(each.rule, Drop):
            report.constants[name] = each.rule.why
    return result


# --- filling a model -----------------------------------------------------------------------------


def _plan(
    given: Mapping[str, Source], names: Names, target: Shapes, report: Report
) -> dict[str, Step]:
    """Return how each weight is filled that the file can fill; enter the keys that it takes."""
    steps: dict[str, Step] = {}
    for name in target:
        inner = names.of_model(name)
        made = ((make.find(inner, given), make) for make in names.fmt.makes)
        sources, make = next((step for step in made if step[0]), ((inner,), _COPY))
        if make is _COPY and inner not in given:
            continue
        steps[name] = sources, make
        keys = [key for source in sources if source is not None for key in given[source].keys]
        for key in keys:
            report.used.setdefault(key, name)
        if make is not _COPY or len(keys) > 1:
            report.made[name] = keys
    return steps


def _make(
    step: Step, given: Mapping[str, Source], shape: tuple[int, ...], report: Report, source: str
) -> torch.Tensor:
    sources, make = step
    for name in filter(None, sources):
        _check_weight(given[name], source)
    if make.note and make.note not in report.notes:
        report.notes.append(make.note)
    return make.function(shape, *(None if name is None else given[name].tensor for name in sources))


def _grid(settings: Mapping[str, Any]) -> Grid:
    """Return the (H, W) of a model's absolute positions, None where they are a square."""
    size = settings.get("pretrain_img_size") or settings.get("img_size")
    if not isinstance(size, Sequence) or "patch_size" not in settings:
        return None
    height, width = size
    return height // settings["patch_size"], width // settings["patch_size"]


# --- the account ---------------------------------------------------------------------------------


def _account_file(
    given: Mapping[str, Source], steps: Mapping[str, Step], names: Names, report: Report
) -> None:
    """Enter what becomes of the keys that no weight of the model takes."""
    taken = {name for sources, _ in steps.values() for name in sources}
    for name, each in given.items():
        if name in taken:
            continue
        rule, entries = each.rule, report.dropped
        if isinstance(rule, Inexact):
            why, entries = rule.why, report.inexact
        elif isinstance(rule, Drop) and _differs(name, each, rule, given):
            why, entries = f"{rule.why}; these differ", report.inexact
        elif isinstance(rule, Drop):
            why = rule.why
        elif re.match(_FED_LOSS, name):
            why = "buffer of the federated loss: the model has no such loss"
        elif names.fmt.detector and names.in_model(name) is None:
            why = "pyramid or head: the model has no place for it"
        else:
            report.unaccounted += each.keys
            continue
        entries |= dict.fromkeys(each.keys, why)


def _differs(name: str, given: Source, rule: Drop, every: Mapping[str, Source]) -> bool:
    """Whether a tensor is not the one that its rule says it repeats; on meta nothing differs."""
    twin = every.get(re.sub(rule.pattern, rule.same_as, name)) if rule.same_as else None
    same = twin is None or given.tensor.is_meta or torch.equal(given.tensor, twin.tensor)
    return not same


def _account_model(
    given: Mapping[str, Source],
    steps: Mapping[str, Step],
    names: Names,
    target: Shapes,
    left_open: list[str],
    report: Report,
) -> None:
    """Enter every weight of the model that nothing fills."""
    optional = map(re.compile, (*_OPTIONAL, *names.fmt.optional))
    absent = [pattern for pattern in optional if not any(map(pattern.match, given))]
    heads_given = any(
        name.startswith("/")
        and (each.rule is None or isinstance(each.rule, Rename))
        and names.in_model(name) is not None
        for name, each in given.items()
    )
    for name in (name for name in target if name not in steps):
        inner = names.of_model(name)
        head = inner.startswith("/") and (not heads_given or re.match(_FED_LOSS, inner))
        open_ = head or name in left_open or any(each.match(inner) for each in absent)
        (report.initialised if open_ else report.missing).append(name)
    # single rows of a class head that its file leaves open stay open
    for entry in left_open:
        if (found := rows_of(entry)) and found[0] in report.used:
            report.initialised.append(entry)


def _account_settings(fmt: Format, settings: Mapping[str, object], report: Report) -> None:
    """Enter what the format knows to be wrong with the model. Parts not filled are not asked."""
    filled = (*report.used.values(), *report.made)
    for name, want in fmt.settings:
        part, dot, _ = name.rpartition(".")
        asked = not dot or any(_PARTS[part] in each for each in filled)
        if not asked or name not in settings or (dot and settings[name] == "none"):
            continue  # that a part has no norms is told by the names
        have = settings[name]
        if have == want.value if isinstance(want, OtherThan) else have != want:
            report.settings[name] = want, have


def _stop_if_unaccounted(report: Report, source: str, *, allow_inexact: bool) -> None:
    """Raise UnaccountedError when something is left over that the user gave no leave for."""
    text = f"{source} as {report.source_format}: expected "
    if report.unaccounted or report.missing:
        parts = (
            (report.unaccounted, "keys have no place in the model"),
            (report.missing, "of its weights are not in the file"),
        )
        got = " and ".join(f"{len(each)} {what} ({some(each)})" for each, what in parts if each)
        first = (report.unaccounted or report.missing)[0]
        word = next((word for pattern, word in _ADVICE if re.search(pattern, first)), None)
        advice = f"The recipe's backbone is not the file's: set its {word}." if word else _CHECK
        raise UnaccountedError(f"{text}an account of every key, got: {got}. {advice}", report)
    if allow_inexact or not (report.inexact or report.settings):
        return
    lost = [f"a place for {why} ({some(keys)})" for why, keys in by_rule(report.inexact).items()]
    lost += [f"{name}={want!r}, not {have!r}" for name, (want, have) in report.settings.items()]
    text += f"of the model: {'; '.join(lost)}. Set that in the recipe if it has such a setting, or "
    text += "--allow-inexact: numbers will differ."
    if report.settings and report.source_format != "vitdet":
        text += " Weights that were trained here are --source-format vitdet."
    raise UnaccountedError(text, report)
