"""Our weights under the names of other projects: a row a target format, and one pure function.

The way back is a source format of `vitdet.convert.formats`, and both read the same pairs of names:
out and in again gives the same weights, bit for bit, but for what the account of the way out lists
as left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vitdet.convert.formats import FORMATS, HF_VITDET, SAM, STREAMPETR, TIMM_EVA
from vitdet.convert.names import Names, kind_of, shapes_of
from vitdet.convert.rules import KINDS, Kind, Report, Shapes, UnaccountedError, by_rule, renames
from vitdet.convert.tensors import class_rows
from vitdet.utils.checks import InputError, check_word
from vitdet.utils.state_dicts import some

_FOLD = "--config-file with a recipe without LayerScale and --fold-layer-scale multiply it in."
_ADVICE = (
    (r"roi_heads|simfp", "--backbone-only leaves out pyramid and heads."),
    (r"\.ls[12]\.gamma$", _FOLD),
)


@dataclass(frozen=True)
class Target:
    """A target format, its name (`--target-format`) and whose code reads these files.

    Attributes:
        holds: for a kind of backbone (`KINDS`), a regular expression of the names inside it,
            without its root, that the target has a place for.
        names: (ours, theirs), as in `rules.renames`; other names are the same.
        outside: as `holds` for pyramid and heads, spelt as in a detectron2 detector after "/".
        drops: (names inside the backbone, why they may be left out).
        root: what stands before the backbone's names; None: every name stays as it is.
        nested: whether the state dict lies under "model" in torch files.
        positions: form of the position embedding: "" as it is, "class row" with one, "rows" without
            (but where a class token reads it), "grid" (1, H, W, C) without.
        note: what the names do not say, for the account.
    """

    name: str
    what: str
    holds: Mapping[str, str]
    names: tuple[tuple[str, str], ...] = ()
    outside: str = ""
    drops: tuple[str, str] = ("", "")
    root: str | None = ""
    nested: bool = False
    positions: str = ""
    note: str = ""


_WB = r"\.(weight|bias)"
_EMBEDDINGS = rf"pos_embed|patch_embed\.proj{_WB}|blocks\.\d+\.norm[12]{_WB}"
_PLAIN = rf"{_EMBEDDINGS}|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]){_WB}"
_REL_POS = rf"{_PLAIN}|blocks\.\d+\.attn\.rel_pos_[hw]"
_RESIDUAL = rf"blocks\.\d+\.residual\.(conv|norm)\d{_WB}"
# EVA-01's fork of detectron2 keeps the biases apart.
_EVA01 = r"blocks\.\d+\.(attn\.[qv]_bias|gamma_[12])"
_TIMM_EVA = (
    rf"{_EMBEDDINGS}|blocks\.\d+\.attn\.([qkv]_proj\.weight|[qv]_bias)|"
    rf"blocks\.\d+\.(attn\.(proj|inner_attn_ln)|mlp\.(w[123]|ffn_ln)){_WB}"
)
_ROPE = r"(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)"
_EVA02 = f"{_TIMM_EVA}|{_RESIDUAL}|{_ROPE}"
_TIMM_VIT = (
    rf"{_PLAIN}|blocks\.\d+\.(ls[12]\.gamma|attn\.[qk]_norm{_WB})|"
    rf"(cls|reg)_token|norm(_pre)?{_WB}"
)

_TARGETS = (
    Target("detectron2", "detectron2 and its ViTDet project, EVA's detectors",
        holds={"vit": f"{_REL_POS}|{_RESIDUAL}|{_EVA01}", "eva02": _EVA02}
        | dict.fromkeys(("vitae", "vitae_s", "vil"), ".*"),
        outside=".*", root=None, nested=True),
    Target("hf_vitdet", "transformers VitDetModel and VitDetBackbone",
        holds={"vit": f"{_REL_POS}|{_RESIDUAL}"}, names=HF_VITDET, positions="class row"),
    Target("sam", "Segment Anything's ImageEncoderViT, without its neck",
        holds={"vit": _REL_POS}, names=SAM, positions="grid",
        note="SAM adds pos_embed without resizing: it must have the grid of the image"),
    Target("timm", "timm VisionTransformer, and Eva for an EVA-02",
        holds={"vit": _TIMM_VIT, "eva02": _TIMM_EVA}, names=TIMM_EVA, positions="rows",
        drops=(_ROPE, "rotary table, which timm computes from the image size"),
        note="timm attends to the whole map in every block and knows no windows"),
    Target("streampetr", "StreamPETR's img_backbone, as its docs/ViT_Large.md makes it",
        holds={"vit": f"{_REL_POS}|{_RESIDUAL}", "eva02": _EVA02}, names=STREAMPETR,
        outside=r"/backbone\.simfp.*", root="img_backbone."),
)  # fmt: skip
TARGETS = {target.name: target for target in _TARGETS}


def export(
    weights: Mapping[str, torch.Tensor],
    target_format: str,
    *,
    after: Report | None = None,
    backbone_only: bool = False,
    allow_inexact: bool = False,
    source: str = "source",
) -> tuple[dict[str, torch.Tensor], Report]:
    """Give weights the names and forms of another project.

    Args:
        weights: a state dict in our names: a detector's, a pyramid's or a backbone's.
        target_format: a name in `TARGETS`.
        after: the account of the conversion that made the weights; that which is returned is of
            both steps.
        backbone_only: leave out the pyramid and the heads.
        allow_inexact: leave out what the target cannot hold; the account lists it as inexact.
        source: the file's name, for messages.

    Returns:
        (state dict, account).

    Raises:
        UnaccountedError: names that the target cannot hold.
        InputError: unknown format, another kind of backbone.
    """
    check_word("--target-format", target_format, TARGETS)
    target, what = TARGETS[target_format], f"{source} as {target_format}"
    kind, root = _kind(target, shapes_of(weights), what)
    after = after or Report("vitdet", used={name: name for name in weights})
    keys: dict[str, list[str]] = {name: [] for name in weights}
    for key, name in after.used.items():
        keys[name].append(key)
    report = _started(after, target)
    ours = Names(FORMATS["vitdet"], root, root)
    inner = {name: ours.of_model(name) for name in weights}
    class_token = "cls_token" in inner.values()
    result: dict[str, torch.Tensor] = {}
    lost: dict[str, str] = {}  # {our name: why}
    for name, tensor in weights.items():
        to = _spell(target, kind.name, name, inner[name])
        why = _dropped(target, inner[name], after.constants.get(name, ""), backbone_only, to)
        if why:
            report.dropped |= dict.fromkeys(keys[name], why)
        elif to is None:
            lost[name] = f"{target.name} has no place for it"
        else:
            result[to] = tensor
            if inner[name] == "pos_embed":
                place = f"{source}: {name}"
                how = (target.positions, tensor, class_token, place)
                result[to], note = _positions(*how, name, lost)
                report.notes += note
            report.used |= dict.fromkeys(keys[name], to)
            report.made |= {to: after.made[name]} if name in after.made else {}
            shapes = after.resized.get(name, (tuple(tensor.shape),))[0], tuple(result[to].shape)
            report.resized |= {to: shapes} if shapes[0] != shapes[1] else {}
    for name, why in lost.items():
        report.inexact |= dict.fromkeys(keys[name], why)
    if lost and not allow_inexact:
        raise UnaccountedError(_lost(lost, what), report)
    if not result:
        raise InputError(f"{what}: expected weights, got none. Check it.")
    return result, report


def _kind(target: Target, shapes: Shapes, what: str) -> tuple[Kind, str]:
    """Return the kind of the backbone and its root; an InputError where the target has no such."""
    kind, root = kind_of(shapes, what)
    if kind.name not in target.holds:
        wanted = " or ".join(kind.what for kind in KINDS if kind.name in target.holds)
        text = f"expected {wanted}, got {kind.what}. Choose another --target-format."
        raise InputError(f"{what}: backbone: {text}")
    return kind, root


def _started(after: Report, target: Target) -> Report:
    """Return the account of the way in, without what the names of the way out will say."""
    rows = [name for name in after.initialised if name.endswith("]")]
    zeros = f"rows without weights are written as zeros: {some(rows)}" if rows else ""
    left = [name for name in after.initialised if name not in rows]
    report = Report(after.source_format, after.nested_under, initialised=left)
    report.dropped, report.inexact = dict(after.dropped), dict(after.inexact)
    report.settings, report.classes = after.settings, after.classes
    report.notes = [*after.notes, *filter(None, (zeros, target.note))]
    report.target_format = target.name
    return report


def _dropped(target: Target, inner: str, constant: str, backbone_only: bool, to: str | None) -> str:
    """Return why a weight may be left out, "" where it may not or need not."""
    if backbone_only and inner.startswith("/"):
        return "outside the backbone (--backbone-only)"
    names, why = target.drops
    return "" if to is not None else why if re.fullmatch(names, inner) else constant


def _spell(target: Target, kind: str, key: str, inner: str) -> str | None:
    """Return the target's name of a weight, None when it has no place."""
    if not re.fullmatch(target.outside if inner.startswith("/") else target.holds[kind], inner):
        return None
    if target.root is None:
        return key
    for rule in renames(*target.names, out=True):
        if re.match(rule.pattern, inner):
            return target.root + re.sub(rule.pattern, rule.to, inner, count=1)
    return target.root + inner


def _positions(
    form: str, table: torch.Tensor, class_token: bool, what: str, name: str, lost: dict[str, str]
) -> tuple[torch.Tensor, list[str]]:
    """Bring a position embedding (1, rows, C) into a target's form; return notes, too."""
    if table.ndim != 3:
        got = f"expected (1, rows, C), got {tuple(table.shape)}. Check --source-format."
        raise InputError(f"{what}: {got}")
    if not form or (form == "rows" and class_token):
        return table, []
    row = class_rows(table.shape[1], what)
    if form == "class row":  # transformers always reads past one
        if row:
            return table, []
        note = "pos_embed: class row filled with zeros, no ViTDet backbone reads it"
        return torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1), [note]
    if row:
        lost[name] = "class row, which no ViTDet backbone reads"
        table = table[:, 1:].contiguous()
    return table.unflatten(1, (math.isqrt(table.shape[1]), -1)) if form == "grid" else table, []


def _lost(lost: Mapping[str, str], what: str) -> str:
    parts = (f"{why} ({some(names)})" for why, names in by_rule(lost).items())
    advice = "".join(f"{text} " for p, text in _ADVICE if any(map(re.compile(p).search, lost)))
    return (
        f"{what}: expected a place for every weight, got none for {len(lost)}: "
        f"{'; '.join(parts)}. {advice}--allow-inexact leaves them out."
    )
