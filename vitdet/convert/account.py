"""The account of a conversion: every key of the file, every weight of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from vitdet.convert.places import Places, is_rename
from vitdet.convert.plan import Given, Step
from vitdet.convert.report import Report, UnaccountedError
from vitdet.convert.rules import Drop, Format, Inexact, OtherThan, Shapes
from vitdet.utils.state_dicts import some

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
_HEADS = re.compile("|".join(f".*{re.escape(part)}" for part in _PARTS.values()))
# What to set in a recipe when a part is in the file and not in the model, or the other way.
_ADVICE = (
    (
        r"\.(ls[12]\.gamma|gamma_[12])$",
        "Set layer_scale of the recipe's backbone to what the file has (or --fold-layer-scale).",
    ),
    (r"\.rel_pos_[hw]$", "Set use_rel_pos of the recipe's backbone to what the file has."),
    (r"\.residual\.", "Set residual_block_indexes of the recipe's backbone as in the file."),
    (r"\.qkv\.bias$", "Set qkv_bias of the recipe's backbone to what the file has."),
    (r"pos_embed$", "Set use_abs_pos of the recipe's backbone to what the file has."),
    (r"\.mlp\.(fc1|w\d+|ffn_ln)\.", "Set ffn_layer of the recipe's backbone to what the file has."),
    (r"cls_token$", "Set use_cls_token of the recipe's backbone to what the file has."),
    (r"reg_token$", "Set num_register_tokens of the recipe's backbone as in the file."),
    (r"(^|\.)norm_pre\.", "Set pre_norm of the recipe's backbone to what the file has."),
    (r"(^|\.net\.|^net\.)norm\.", "Set final_norm of the recipe's backbone as in the file."),
)


def account(
    given: Mapping[str, Given],
    steps: list[Step],
    places: Places,
    target: Shapes,
    report: Report,
    left_open: set[str],
) -> None:
    """Enter every key and every weight of the model into the report."""
    taken: set[str] = set()
    for step in steps:
        sources = [name for name in step.sources if name is not None]
        keys = [key for name in sources for key in given[name].keys]
        for key in keys:
            report.used.setdefault(key, step.name)
        if step.make is not None or len(keys) > 1:
            report.made[step.name] = keys
        taken.update(sources)
    for name, each in given.items():
        if name not in taken:
            _account_rest(name, each, places, report, given)
    _account_target(given, steps, places, target, report, left_open)


def _differs(name: str, given: Given, rule: Drop, every: Mapping[str, Given]) -> bool:
    """Whether a tensor is not the one that its rule says it repeats; on meta nothing differs."""
    twin = every.get(re.sub(rule.pattern, rule.same_as, name)) if rule.same_as else None
    if twin is None or given.tensor.is_meta:
        return False
    return not torch.equal(given.tensor, twin.tensor)


def _account_rest(
    name: str, given: Given, places: Places, report: Report, every: Mapping[str, Given]
) -> None:
    rule = given.rule
    if isinstance(rule, Inexact):
        report.inexact |= dict.fromkeys(given.keys, rule.why)
    elif isinstance(rule, Drop) and _differs(name, given, rule, every):
        report.inexact |= dict.fromkeys(given.keys, f"{rule.why}; these differ")
    elif isinstance(rule, Drop):
        report.dropped |= dict.fromkeys(given.keys, rule.why)
    elif re.match(_FED_LOSS, name):
        why = "buffer of the federated loss: the model has no such loss"
        report.dropped |= dict.fromkeys(given.keys, why)
    elif places.fmt.detector and places.target(name) is None:
        why = "pyramid or head: the model has no place for it"
        report.dropped |= dict.fromkeys(given.keys, why)
    else:
        report.unaccounted += given.keys


def _account_target(
    given: Mapping[str, Given],
    steps: list[Step],
    places: Places,
    target: Shapes,
    report: Report,
    left_open: set[str],
) -> None:
    filled = {step.name for step in steps}
    optional = (*_OPTIONAL, *places.fmt.optional)
    heads_given = any(
        name.startswith("/") and is_rename(each.rule) and places.target(name) is not None
        for name, each in given.items()
    )
    for name in target:
        if name in filled:
            continue
        inner = places.inner_of_target(name)
        groups = [pattern for pattern in optional if re.match(pattern, inner)]
        absent = any(not any(re.match(pattern, n) for n in given) for pattern in groups)
        head = inner.startswith("/") and (not heads_given or re.match(_FED_LOSS, inner))
        open_ = absent or head or name in left_open
        (report.initialised if open_ else report.missing).append(name)


def account_settings(fmt: Format, settings: Mapping[str, object], report: Report) -> None:
    """Enter what the format knows to be wrong with the model. Parts not filled are not asked."""
    outside = [name for name in (*report.used.values(), *report.made) if _HEADS.match(name)]
    for name, want in fmt.settings:
        part, dot, _ = name.rpartition(".")
        asked = not dot or any(_PARTS[part] in each for each in outside)
        if not asked or name not in settings or (dot and settings[name] == "none"):
            continue  # that a part has no norms is told by the names
        have = settings[name]
        if have == want.value if isinstance(want, OtherThan) else have != want:
            report.settings[name] = want, have


def stop_if_unaccounted(report: Report, source: str, *, allow_inexact: bool) -> None:
    """Raise UnaccountedError when something is left over that the user gave no leave for."""
    _stop_if_left_over(report, source)
    if allow_inexact or not (report.inexact or report.settings):
        return
    lost = [
        f"a place for {why} ({some([key for key, each in report.inexact.items() if each == why])})"
        for why in dict.fromkeys(report.inexact.values())
    ]
    lost += [f"{name}={want!r}, not {have!r}" for name, (want, have) in report.settings.items()]
    text = f"{source} as {report.source_format}: expected of the model: "
    text += f"{'; '.join(lost)}. Set that in the recipe, or --allow-inexact: numbers will differ."
    if report.source_format != "vitdet":
        text += " Weights that were trained here are --source-format vitdet."
    raise UnaccountedError(text, report)


def _stop_if_left_over(report: Report, source: str) -> None:
    unaccounted, missing = report.unaccounted, report.missing
    if not unaccounted and not missing:
        return
    parts = (
        (unaccounted, "keys have no place in the model"),
        (missing, "of its weights are not in the file"),
    )
    got = " and ".join(f"{len(names)} {what} ({some(names)})" for names, what in parts if names)
    first = (unaccounted or missing)[0]
    remedy = next(
        (advice for pattern, advice in _ADVICE if re.search(pattern, first)),
        "Check --config-file and --source-format; --backbone-only leaves out pyramid and heads.",
    )
    text = f"{source} as {report.source_format}: expected an account of every key, got: {got}."
    raise UnaccountedError(f"{text} {remedy}", report)
