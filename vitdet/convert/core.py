"""State dict in, state dict out, and an account of every key. Knows no model class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from vitdet.convert import detectron2_zoo, hf_vitdet, mae, own, sam, timm_vit
from vitdet.convert.fit import fit
from vitdet.convert.report import Report, UnaccountedError
from vitdet.convert.rules import Drop, File, Format, Refuse, Rename, root_of
from vitdet.utils.checks import fail, nearest
from vitdet.utils.state_dicts import compare_shapes, compare_sizes, some

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (own, detectron2_zoo, sam, hf_vitdet, mae, timm_vit)
}
Shapes = Mapping[str, tuple[int, ...]]

_ANCHOR = "patch_embed.proj.weight"
_NESTS = ("model", "state_dict", "module", "model_state", "net")
# Parts of a backbone that a source may lack as a whole. Both start as the identity: detectron2
# initialises the tables with zeros, and the last norm of a propagation block too.
_OPTIONAL = (r"blocks\.\d+\.attn\.rel_pos_[hw]$", r"blocks\.\d+\.residual\.")
# A buffer that a model with federated loss computes from the data set.
_FED_LOSS = r"roi_heads\.box_predictor\.(\d+\.)?fed_loss_cls_weights$"
# What to set in a recipe when a part is in the file and not in the model, or the other way.
_ADVICE = (
    (r"\.ls[12]\.gamma$", "Set layer_scale of the recipe's backbone to what the file has."),
    (r"\.rel_pos_[hw]$", "Set use_rel_pos of the recipe's backbone to what the file has."),
    (r"\.residual\.", "Set residual_block_indexes of the recipe's backbone as in the file."),
    (r"\.qkv\.bias$", "Set qkv_bias of the recipe's backbone to what the file has."),
    (r"pos_embed$", "Set use_abs_pos of the recipe's backbone to what the file has."),
)


def detect(content: Mapping[str, Any]) -> str:
    """Return the name of the format of a file's content.

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict.

    Raises:
        InputError: none of `FORMATS` fits.
    """
    state_dict, nested_under = _unnest(content, "source")
    return _detect(content, state_dict, nested_under, "source").name


def convert(
    content: Mapping[str, Any],
    target: Shapes,
    *,
    source_format: str | None = None,
    backbone_only: bool = False,
    resize_patch_embed: bool = False,
    source: str = "source",
) -> tuple[dict[str, torch.Tensor], Report]:
    """Turn the content of a file into a state dict for a model.

    Args:
        content: what `vitdet.checkpoint.read` returned, or a state dict.
        target: {name: shape} of the model: a whole detector, a pyramid, or a backbone alone.
        source_format: a name in `FORMATS`; None to recognise it.
        backbone_only: leave out the source's pyramid and heads, if it has them.
        resize_patch_embed: allow the patch kernel to be resampled to another patch size.
        source: the file's name, for messages.

    Returns:
        (state dict, account). The state dict holds every target name but `account.initialised`.

    Raises:
        UnaccountedError: a key no rule covers, or a name that should have been filled.
        InputError: unknown format, another size, another number of classes, parts that our
            ViT has no place for.
    """
    state_dict, nested_under = _unnest(content, source)
    if source_format is None:
        fmt = _detect(content, state_dict, nested_under, source)
    elif source_format in FORMATS:
        fmt = FORMATS[source_format]
    else:
        _unknown_format(source_format)
    report = Report(fmt.name, nested_under)
    places = _places(fmt, state_dict, target, source)
    rest = sorted({str(key) for key in content} - {nested_under, "vitdet"}) if nested_under else []
    if rest:
        report.notes.append(f"left out beside the weights: {some(rest)}")

    named = _name_keys(state_dict, places, report, source, backbone_only=backbone_only)
    given = {name: tuple(tensor.shape) for name, (_, tensor) in named.items()}
    compare_sizes(given, target, source=source)
    about = content.get("vitdet")
    left_open = about.get("initialised", []) if isinstance(about, Mapping) else []
    _account(named, target, places, report, set(left_open))
    _stop_if_unaccounted(report, source)
    result = _fit_all(named, target, places, report, source, resize_patch_embed=resize_patch_embed)
    given = {name: tuple(tensor.shape) for name, tensor in result.items()}
    remedy = "Use the recipe that the file was made for."
    compare_shapes(given, target, source=source, remedy=remedy)
    return result, report


def _unnest(content: Mapping[str, Any], source: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return the state dict in a file's content and the key that held it."""
    key = next((k for k in _NESTS if isinstance(content.get(k), Mapping) and content[k]), "")
    inner: Mapping[str, Any] = content[key] if key else content
    wrong = [str(name) for name, value in inner.items() if not isinstance(value, torch.Tensor)]
    if wrong or not inner:
        got = f"other things: {some(wrong)}" if wrong else "nothing"
        remedy = f"The state dict may lie under one of: {', '.join(_NESTS)}."
        fail(f"{source}: state dict", expected="tensors", got=got, remedy=remedy)
    names = [str(name) for name in inner]
    # DistributedDataParallel puts this before every name
    prefix = "module." if all(name.startswith("module.") for name in names) else ""
    return {str(name)[len(prefix) :]: value for name, value in inner.items()}, key


def _detect(
    content: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], nest: str, source: str
) -> Format:
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    file = File(frozenset(map(str, content)), nest, shapes)
    found = [fmt for fmt in FORMATS.values() if fmt.recognise(file)]
    if len(found) != 1:
        got = " and ".join(fmt.name for fmt in found) or f"keys such as {some(shapes)}"
        remedy = "Name it with --source-format."
        fail(f"{source}: format", expected=f"one of {_known()}", got=got, remedy=remedy)
    return found[0]


def _unknown_format(name: str) -> NoReturn:
    close = nearest(name, FORMATS)
    remedy = f"Did you mean {close}?" if close else "Leave it out to have it recognised."
    fail("--source-format", expected=f"one of {_known()}", got=name, remedy=remedy)


def _known() -> str:
    return ", ".join(FORMATS)


@dataclass(frozen=True)
class _Places:
    """Where the backbone stands in the names of the source and of the target.

    A root is "backbone.net." in a detector, "net." in a pyramid, "" in a bare backbone; the pyramid
    stands one step up.
    """

    fmt: Format
    source_root: str
    target_root: str

    def local(self, key: str) -> str | None:
        """Return a source key without the backbone's root, None outside the backbone."""
        root = self.source_root
        return key[len(root) :] if key.startswith(root) else None

    def rule(self, key: str) -> Drop | Rename | Refuse | None:
        """Return the format's rule for a source key."""
        local = self.local(key)
        rules = self.fmt.outside if local is None else self.fmt.rules
        text = key if local is None else local
        return next((rule for rule in rules if re.match(rule.pattern, text)), None)

    def left_out(self, key: str, backbone_only: bool) -> str:
        """Return why a pyramid's or head's key has no place, "" when it has one."""
        if self.local(key) is not None or not (backbone_only or self.fmt.detector):
            return ""
        if backbone_only:
            return "outside the backbone (--backbone-only)"
        return "" if self.outside(key) else "pyramid or head: the model has no place for it"

    def outside(self, key: str) -> str | None:
        """Return the target's spelling of a pyramid's or head's key, None when it has no place."""
        source, target = _above(self.source_root), _above(self.target_root)
        if not self.target_root or not self.fmt.detector:
            return None
        if key.startswith(source):
            return target + key[len(source) :]
        return key if target else None

    def inside(self, name: str) -> str:
        """Return a target name without the backbone's root, "" outside the backbone."""
        return name[len(self.target_root) :] if name.startswith(self.target_root) else ""


def _above(root: str) -> str:
    return re.sub(r"[^.]+\.$", "", root)


def _places(fmt: Format, state_dict: Mapping[str, Any], target: Shapes, source: str) -> _Places:
    source_root = root_of(state_dict, fmt.anchor)
    target_root = root_of(target, _ANCHOR)
    if source_root is None:
        remedy = "Check --source-format."
        expected = f"a key that ends in {fmt.anchor}"
        fail(f"{source} as {fmt.name}", expected=expected, got=some(state_dict), remedy=remedy)
    if target_root is None or (not fmt.detector and not _is_vit(target, target_root)):
        got = some(list(target)[:3])
        remedy = "Use a recipe with a plain ViT."
        fail("model", expected="a plain ViT backbone", got=f"names like {got}", remedy=remedy)
    return _Places(fmt, source_root, target_root)


def _is_vit(target: Shapes, root: str) -> bool:
    return f"{root}blocks.0.mlp.fc1.weight" in target


def _name_keys(
    state_dict: Mapping[str, torch.Tensor],
    places: _Places,
    report: Report,
    source: str,
    *,
    backbone_only: bool,
) -> dict[str, tuple[str, torch.Tensor]]:
    """Return {name in the target's spelling: (source key, tensor)}; enter the others as dropped."""
    named: dict[str, tuple[str, torch.Tensor]] = {}
    for key, value in state_dict.items():
        local = places.local(key)
        rule = places.rule(key)
        if isinstance(rule, Refuse):
            what = f"{source}: {key} as {places.fmt.name}"
            remedy = "Our plain ViT has no such part, so these weights cannot be used."
            fail(what, expected="a plain ViT", got=rule.why, remedy=remedy)
        why = rule.why if isinstance(rule, Drop) else places.left_out(key, backbone_only)
        if why:
            report.dropped[key] = why
            continue
        name, tensor = places.outside(key), value
        if local is not None:
            if isinstance(rule, Rename):
                local = re.sub(rule.pattern, rule.replacement, local, count=1)
            name, tensor = places.target_root + local, places.fmt.tensor(local, value)
        if name is None:
            report.unaccounted.append(key)
        elif name in named:
            got = f"{named[name][0]} and {key}"
            remedy = "Check --source-format."
            fail(f"{source}: weights for {name}", expected="one key", got=got, remedy=remedy)
        else:
            named[name] = key, tensor
    return named


def _account(
    named: Mapping[str, tuple[str, torch.Tensor]],
    target: Shapes,
    places: _Places,
    report: Report,
    left_open: set[str],
) -> None:
    """Enter every key and every target name into the report."""
    for name, (key, _) in named.items():
        if name in target:
            report.used[key] = name
        elif re.match(_FED_LOSS, name):
            report.dropped[key] = "buffer of the federated loss: the model has no such loss"
        else:
            report.unaccounted.append(key)
    heads_given = any(not places.inside(name) for name in named)
    inside_given = [places.inside(name) for name in named]
    for name in target:
        if name in named:
            continue
        local = places.inside(name)
        optional = any(
            re.match(pattern, local) and not any(re.match(pattern, n) for n in inside_given)
            for pattern in _OPTIONAL
        )
        head = not local and (not heads_given or re.match(_FED_LOSS, name))
        open_ = optional or head or name in left_open
        (report.initialised if open_ else report.missing).append(name)


def _stop_if_unaccounted(report: Report, source: str) -> None:
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


def _fit_all(
    named: Mapping[str, tuple[str, torch.Tensor]],
    target: Shapes,
    places: _Places,
    report: Report,
    source: str,
    *,
    resize_patch_embed: bool,
) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for name, (key, tensor) in named.items():
        if name not in target:
            continue
        if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            remedy = "The file is damaged or its training diverged."
            fail(f"{source}: {key}", expected="finite numbers", got="inf or nan", remedy=remedy)
        fitted, notes = tensor, []
        if local := places.inside(name):
            shape, allowed = tuple(target[name]), resize_patch_embed
            fitted, notes = fit(local, tensor, shape, resize_patch_embed=allowed, source=source)
        if fitted.shape != tensor.shape:
            report.resized[name] = tuple(tensor.shape), tuple(fitted.shape)
        report.notes += notes
        result[name] = fitted
    return result
