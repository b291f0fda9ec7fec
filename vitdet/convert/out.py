"""Our weights under the names of other projects: a table a target format, and one pure function.

The way back is a source format of `vitdet.convert.core`: out and in again gives the same weights,
bit for bit, but for what the account of the way out lists as left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from vitdet.convert.fit import class_rows
from vitdet.convert.formats import FORMATS
from vitdet.convert.places import Places, kind_of
from vitdet.convert.report import Report, UnaccountedError
from vitdet.convert.rules import KINDS, Drop, Rename, Shapes
from vitdet.utils.checks import InputError, fail, nearest
from vitdet.utils.state_dicts import some

_OTHER = "other"  # a backbone that `KINDS` does not list: detectron2's own Swin and MViT
_SAME = r"\g<0>"
_ADVICE = (
    (re.compile(r"roi_heads|simfp"), "--backbone-only leaves out pyramid and heads."),
    (
        re.compile(r"\.ls[12]\.gamma$"),
        "LayerScale can be multiplied into the weights: --config-file with a recipe that has none, "
        "and --fold-layer-scale.",
    ),
)


@dataclass(frozen=True)
class Positions:
    """A position embedding in a target's form: the tensor, a note, and what the form cannot hold.

    Both texts are "" where there is nothing to say.
    """

    tensor: torch.Tensor
    note: str = ""
    lost: str = ""


def _as_it_is(table: torch.Tensor, class_token: bool, what: str) -> Positions:
    del class_token, what
    return Positions(table)


def _with_class_row(table: torch.Tensor, class_token: bool, what: str) -> Positions:
    """(1, rows, C) to (1, 1 + H * W, C): transformers always reads past a class row."""
    del class_token
    if class_rows(table.shape[1], what):
        return Positions(table)
    row = table.new_zeros(1, 1, table.shape[2])
    note = "pos_embed: class row filled with zeros, no ViTDet backbone reads it"
    return Positions(torch.cat([row, table], dim=1), note)


def _without_class_row(table: torch.Tensor, class_token: bool, what: str) -> Positions:
    """(1, rows, C) to (1, H * W, C), unless there is a class token to read the class row."""
    if class_token or not class_rows(table.shape[1], what):
        return Positions(table)
    return Positions(table[:, 1:].contiguous(), lost="class row, which no ViTDet backbone reads")


def _as_grid(table: torch.Tensor, class_token: bool, what: str) -> Positions:
    """(1, rows, C) to (1, H, W, C): SAM has no class token."""
    del class_token
    grid = _without_class_row(table, False, what)
    side = math.isqrt(grid.tensor.shape[1])
    return Positions(grid.tensor.unflatten(1, (side, side)), grid.note, grid.lost)


@dataclass(frozen=True)
class Target:
    """A target format.

    Attributes:
        name: as in `--target-format`.
        what: one line for people: whose code reads these files.
        tables: for a kind of backbone (`KINDS`), rules for names inside it, without its root. The
            first that matches at the beginning of the name counts; a name that none matches cannot
            be held.
        outside: rules for the pyramid and the heads, spelt as in a detectron2 detector after "/".
        root: what stands before the backbone's names; None: every name stays as it is.
        nested_under: key that holds the state dict in torch files, "" for none.
        positions: brings the position embedding (1, rows, C) into the target's form.
        note: what the names do not say, for the account.
    """

    name: str
    what: str
    tables: Mapping[str, tuple[Rename | Drop, ...]]
    outside: tuple[Rename, ...] = ()
    root: str | None = ""
    nested_under: str = ""
    positions: Callable[[torch.Tensor, bool, str], Positions] = _as_it_is
    note: str = ""


def _same(*patterns: str) -> tuple[Rename, ...]:
    return tuple(Rename(pattern + "$", _SAME) for pattern in patterns)


_EMBEDDINGS = _same(r"pos_embed", r"patch_embed\.proj\.(weight|bias)")
_NORMS = _same(r"blocks\.\d+\.norm[12]\.(weight|bias)")
_ATTENTION = _same(r"blocks\.\d+\.attn\.(qkv|proj)\.(weight|bias)")
_TABLES = _same(r"blocks\.\d+\.attn\.rel_pos_[hw]")
_MLP = _same(r"blocks\.\d+\.mlp\.fc[12]\.(weight|bias)")
_RESIDUAL = _same(r"blocks\.\d+\.residual\.(conv|norm)\d\.(weight|bias)")
_PLAIN = (*_EMBEDDINGS, *_NORMS, *_ATTENTION, *_TABLES, *_MLP)
_ROPE = r"(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)$"
# EVA-01's fork of detectron2 keeps the biases apart.
_EVA01 = _same(r"blocks\.\d+\.(attn\.[qv]_bias|gamma_[12])")
_EVA02 = (
    *(*_EMBEDDINGS, *_NORMS, *_RESIDUAL, Rename(_ROPE, _SAME)),
    *_same(r"blocks\.\d+\.attn\.([qkv]_proj\.weight|proj\.(weight|bias)|[qv]_bias)"),
    *_same(r"blocks\.\d+\.attn\.inner_attn_ln\.(weight|bias)"),
    *_same(r"blocks\.\d+\.mlp\.(w[123]|ffn_ln)\.(weight|bias)"),
)
_TIMM_VIT = (
    *(*_EMBEDDINGS, *_NORMS, *_ATTENTION, *_MLP),
    *_same(r"blocks\.\d+\.ls[12]\.gamma", r"blocks\.\d+\.attn\.[qk]_norm\.(weight|bias)"),
    *_same(r"(cls|reg)_token", r"norm(_pre)?\.(weight|bias)"),
)
_TIMM_EVA = (
    *(*_EMBEDDINGS, *_NORMS),
    *_same(r"blocks\.\d+\.attn\.([qkv]_proj\.weight|proj\.(weight|bias))"),
    Rename(r"(blocks\.\d+\.attn\.[qv])_bias$", r"\1_proj.bias"),
    Rename(r"(blocks\.\d+\.attn)\.inner_attn_ln\.", r"\1.norm."),
    Rename(r"(blocks\.\d+\.mlp)\.w1\.", r"\1.fc1_g."),
    Rename(r"(blocks\.\d+\.mlp)\.w2\.", r"\1.fc1_x."),
    Rename(r"(blocks\.\d+\.mlp)\.ffn_ln\.", r"\1.norm."),
    Rename(r"(blocks\.\d+\.mlp)\.w3\.", r"\1.fc2."),
    Drop(_ROPE, "rotary table, which timm computes from the image size"),
)
_EVERYTHING = (Rename(r".+", _SAME),)
_HF_VITDET = (
    Rename(r"pos_embed$", "embeddings.position_embeddings"),
    Rename(r"patch_embed\.proj\.(weight|bias)$", r"embeddings.projection.\1"),
    Rename(
        r"blocks\.(\d+)\.attn\.((qkv|proj)\.(weight|bias)|rel_pos_[hw])$",
        r"encoder.layer.\1.attention.\2",
    ),
    Rename(
        r"blocks\.(\d+)\.((norm[12]|mlp\.fc[12]|residual\.(conv|norm)\d)\.(weight|bias))$",
        r"encoder.layer.\1.\2",
    ),
)
_SAM = (
    Rename(r"(blocks\.\d+\.mlp)\.fc([12])\.(weight|bias)$", r"\1.lin\2.\3"),
    *(*_EMBEDDINGS, *_NORMS, *_ATTENTION, *_TABLES),
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="detectron2",
            what="detectron2 and its ViTDet project, EVA's detectors",
            tables={"vit": (*_PLAIN, *_RESIDUAL, *_EVA01), "eva02": _EVA02}
            | dict.fromkeys(("vitae", "vitae_s", "vil", _OTHER), _EVERYTHING),
            outside=_EVERYTHING,
            root=None,
            nested_under="model",
        ),
        Target(
            name="hf_vitdet",
            what="transformers VitDetModel and VitDetBackbone",
            tables={"vit": _HF_VITDET},
            positions=_with_class_row,
        ),
        Target(
            name="sam",
            what="Segment Anything's ImageEncoderViT, without its neck",
            tables={"vit": _SAM},
            positions=_as_grid,
            note="SAM adds pos_embed without resizing: it must have the grid of the image",
        ),
        Target(
            name="timm",
            what="timm VisionTransformer, and Eva for an EVA-02",
            tables={"vit": _TIMM_VIT, "eva02": _TIMM_EVA},
            positions=_without_class_row,
            note="timm attends to the whole map in every block and knows no windows",
        ),
        Target(
            name="streampetr",
            what="StreamPETR's img_backbone, as its docs/ViT_Large.md makes it",
            tables={"vit": (*_PLAIN, *_RESIDUAL), "eva02": _EVA02},
            outside=(Rename(r"/backbone\.simfp", "img_backbone.adapter.simfp"),),
            root="img_backbone.",
        ),
    )
}


def export(
    weights: Mapping[str, torch.Tensor],
    target_format: str,
    *,
    initialised: Collection[str] = (),
    backbone_only: bool = False,
    allow_inexact: bool = False,
    prefix: str = "",
    constants: Mapping[str, str] = MappingProxyType({}),
    source: str = "source",
) -> tuple[dict[str, torch.Tensor], Report]:
    """Give weights the names and forms of another project.

    Args:
        weights: a state dict in our names: a detector's, a pyramid's or a backbone's.
        target_format: a name in `TARGETS`.
        initialised: what the file of the weights leaves to the model's own initialisation.
        backbone_only: leave out the pyramid and the heads.
        allow_inexact: leave out what the target cannot hold; the account lists it as inexact.
        prefix: put before every name: "image_encoder." for a whole SAM.
        constants: {name: rule} of what is no weight and may be left out.
        source: the file's name, for messages.

    Returns:
        (state dict, account). `nest` puts the state dict where the target's reader looks for it.

    Raises:
        UnaccountedError: names that the target cannot hold.
        InputError: unknown format, another kind of backbone.
    """
    target = _target(target_format)
    if prefix and not prefix.endswith("."):
        fail("--target-prefix", expected="a dot at its end", got=prefix, remedy="Add the dot.")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    report = Report(FORMATS["vitdet"].name, target_format=target.name)
    _note_left_open(report, initialised, target)
    way = _way(target, shapes, source)
    result: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        if backbone_only and way.outside(key):
            report.dropped[key] = "outside the backbone (--backbone-only)"
            continue
        name = way.name(key)
        if isinstance(name, Drop):
            report.dropped[key] = name.why
            continue
        if name is None:
            why = f"{target.name} has no place for it"
            (report.dropped if key in constants else report.inexact)[key] = constants.get(key, why)
            continue
        formed = way.form(key, tensor, report)
        result[prefix + name] = formed
        report.used[key] = prefix + name
        if formed.shape != tensor.shape:
            report.resized[prefix + name] = tuple(tensor.shape), tuple(formed.shape)
    _stop_if_lost(report, target, source, allow_inexact=allow_inexact)
    if not result:
        fail(f"{source} as {target.name}", expected="weights", got="none", remedy="Check it.")
    return result, report


def nest(weights: Mapping[str, torch.Tensor], target_format: str, *, flat: bool) -> dict[str, Any]:
    """Return the content of a file with the weights where the target's reader looks for them.

    Args:
        weights: what `export` returned.
        target_format: a name in `TARGETS`.
        flat: whether the container has no nesting (safetensors): then the state dict stands under
            "model", which is where `vitdet.checkpoint.write` takes it from.
    """
    key = "model" if flat else _target(target_format).nested_under
    return {key: dict(weights)} if key else dict(weights)


@dataclass
class _Way:
    """How the names of one state dict go over to a target."""

    target: Target
    rules: tuple[Rename | Drop, ...]
    places: Places
    source: str
    class_token: bool
    inner: dict[str, str] = field(default_factory=dict)

    def outside(self, key: str) -> bool:
        """Whether a name of ours belongs to the pyramid or the heads."""
        return self.inner[key].startswith("/")

    def name(self, key: str) -> str | Drop | None:
        """Return the target's name, the rule that drops it, or None when it has no place."""
        inner = self.inner[key]
        rules = self.target.outside if self.outside(key) else self.rules
        rule = next((rule for rule in rules if re.match(rule.pattern, inner)), None)
        if not isinstance(rule, Rename):
            return rule
        if self.target.root is None:
            return key
        name = re.sub(rule.pattern, rule.to, inner, count=1)
        return name if self.outside(key) else self.target.root + name

    def form(self, key: str, tensor: torch.Tensor, report: Report) -> torch.Tensor:
        """Return the tensor in the target's form; enter what that changes."""
        if self.inner[key] != "pos_embed":
            return tensor
        if tensor.ndim != 3:
            remedy = "Check --source-format."
            expected, got = "three dimensions (1, rows, C)", f"{tuple(tensor.shape)}"
            fail(f"{self.source}: {key}", expected=expected, got=got, remedy=remedy)
        positions = self.target.positions(tensor, self.class_token, f"{self.source}: {key}")
        if positions.note:
            report.notes.append(positions.note)
        if positions.lost:
            report.inexact[key] = positions.lost
        return positions.tensor


def _way(target: Target, shapes: Shapes, source: str) -> _Way:
    try:
        kind, root = kind_of(shapes)
        name, what = kind.name, kind.what
    except InputError:
        name, what, root = _OTHER, f"names like {some(shapes)}", "backbone."
    if name not in target.tables:
        wanted = " or ".join(kind.what for kind in KINDS if kind.name in target.tables)
        remedy = "Choose another --target-format."
        fail(f"{source} as {target.name}: backbone", expected=wanted, got=what, remedy=remedy)
    places = Places(FORMATS["vitdet"], root, root)
    inner = {key: places.inner_of_target(key) for key in shapes}
    class_token = "cls_token" in inner.values()
    return _Way(target, target.tables[name], places, source, class_token, inner)


def _target(name: str) -> Target:
    if name in TARGETS:
        return TARGETS[name]
    close = nearest(name, TARGETS)
    remedy = f"Did you mean {close}?" if close else "Choose one of these."
    fail("--target-format", expected=f"one of {', '.join(TARGETS)}", got=name, remedy=remedy)


def _note_left_open(report: Report, initialised: Collection[str], target: Target) -> None:
    report.initialised = [name for name in initialised if not name.endswith("]")]
    rows = [name for name in initialised if name.endswith("]")]
    if rows:
        report.notes.append(f"rows without weights are written as zeros: {some(rows)}")
    if target.note:
        report.notes.append(target.note)


def _stop_if_lost(report: Report, target: Target, source: str, *, allow_inexact: bool) -> None:
    lost = report.inexact
    if not lost or allow_inexact:
        return
    parts = (
        f"{why} ({some([key for key, each in lost.items() if each == why])})"
        for why in Counter(lost.values())
    )
    text = f"{source} as {target.name}: expected a place for every weight, got none for "
    text += f"{len(lost)}: {'; '.join(parts)}. "
    text += " ".join(advice for pattern, advice in _ADVICE if any(map(pattern.search, lost)))
    raise UnaccountedError(f"{text} --allow-inexact leaves them out.".replace("  ", " "), report)
