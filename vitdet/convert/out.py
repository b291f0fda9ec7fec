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
from vitdet.convert.rules import KINDS, Report, Shapes, UnaccountedError, renames
from vitdet.convert.tensors import class_rows
from vitdet.utils.checks import InputError, check_word
from vitdet.utils.state_dicts import some

_OTHER = "other"  # a backbone that `KINDS` does not list: detectron2's own Swin and MViT
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
        | dict.fromkeys(("vitae", "vitae_s", "vil", _OTHER), ".*"),
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
        after: the account of the conversion that made the weights; then that which is returned is
            of both steps.
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
    target = TARGETS[target_format]
    after = after or Report("vitdet", used={name: name for name in weights})
    report = _new_report(after, target)
    kind, root = _backbone(target, shapes_of(weights), source)
    ours = Names(FORMATS["vitdet"], root, root)
    inner = {key: ours.of_model(key) for key in weights}
    class_token = "cls_token" in inner.values()
    result: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        name = _spell(target, kind, key, inner[key])
        if backbone_only and inner[key].startswith("/"):
            report.dropped[key] = "outside the backbone (--backbone-only)"
        elif name is None:
            names, why = target.drops
            why = why if re.fullmatch(names, inner[key]) else after.constants.get(key)
            entries = report.dropped if why else report.inexact
            entries[key] = why or f"{target.name} has no place for it"
        else:
            report.used[key] = name
            result[name] = tensor
            if inner[key] == "pos_embed":
                what = f"{source}: {key}"
                result[name] = _positions(target.positions, tensor, class_token, what, key, report)
            if result[name].shape != tensor.shape:
                report.resized[name] = tuple(tensor.shape), tuple(result[name].shape)
    what = f"{source} as {target.name}"
    if report.inexact and not allow_inexact:
        raise UnaccountedError(_lost(report, what), after.then(report))
    if not result:
        raise InputError(f"{what}: expected weights, got none. Check it.")
    return result, after.then(report)


def _new_report(after: Report, target: Target) -> Report:
    rows = [name for name in after.initialised if name.endswith("]")]
    notes = [f"rows without weights are written as zeros: {some(rows)}"] if rows else []
    notes += [target.note] if target.note else []
    left = [name for name in after.initialised if name not in rows]
    return Report("vitdet", target_format=target.name, initialised=left, notes=notes)


def _backbone(target: Target, shapes: Shapes, source: str) -> tuple[str, str]:
    """Return the kind of the backbone and its root."""
    try:
        kind, root = kind_of(shapes)
        name, what = kind.name, kind.what
    except InputError:
        name, what, root = _OTHER, f"names like {some(shapes)}", "backbone."
    if name not in target.holds:
        wanted = " or ".join(kind.what for kind in KINDS if kind.name in target.holds)
        text = f"expected {wanted}, got {what}. Choose another --target-format."
        raise InputError(f"{source} as {target.name}: backbone: {text}")
    return name, root


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
    form: str, table: torch.Tensor, class_token: bool, what: str, key: str, report: Report
) -> torch.Tensor:
    """Bring a position embedding (1, rows, C) into a target's form; enter what that changes."""
    if table.ndim != 3:
        got = f"expected (1, rows, C), got {tuple(table.shape)}. Check --source-format."
        raise InputError(f"{what}: {got}")
    if not form or (form == "rows" and class_token):
        return table
    row = class_rows(table.shape[1], what)
    if form == "class row":  # transformers always reads past one
        if row:
            return table
        note = "pos_embed: class row filled with zeros, no ViTDet backbone reads it"
        report.notes.append(note)
        return torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)
    if row:
        report.inexact[key] = "class row, which no ViTDet backbone reads"
        table = table[:, 1:].contiguous()
    return table.unflatten(1, (math.isqrt(table.shape[1]), -1)) if form == "grid" else table


def _lost(report: Report, what: str) -> str:
    parts = (f"{why} ({some(keys)})" for why, keys in report.by_rule("inexact").items())
    advice = "".join(f"{a} " for p, a in _ADVICE if any(map(re.compile(p).search, report.inexact)))
    return (
        f"{what}: expected a place for every weight, got none for {len(report.inexact)}: "
        f"{'; '.join(parts)}. {advice}--allow-inexact leaves them out."
    )
