"""Compare what vitdet computes with what a golden case stores.

Tolerances. Outputs, intermediate results, their statistics and input gradients: 1e-4 absolute. The
published code itself moves by up to 5e-5 between float32 and float64 on these cases. Where a case
says that it moves by more (gradients of 1000 for inputs of 0.01), three times that.
Boxes and anchors in pixels: 1e-5 of the largest coordinate, because a box side of S pixels is
S * delta / 10 for a delta that may be wrong by 1e-4.
Gradient norms: 1e-5 relative, and 2e-5 absolute for norms below 2: gradients are float32 sums of
many terms of order 1, and one that is zero in theory (that of the bias of k) comes out with a norm
of 4e-6 to 2e-5 in the cases of detectron2. That is of the float64 result: to the stored number,
itself as far off as its case says (`float32_error`, at most 5e-5), it is so much more. In
vil_srformer_small_values, on a processor without AVX-512, ours is 8e-6 to one side of it and the
stored one 5e-6 to the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

TOLERANCE = 1e-4
_PIXEL_TOLERANCE = 1e-5
_NORM_TOLERANCE = 1e-5
_SMALL_NORM = 2.0
# Of what the published code moves by in float32, stored in the case.
_ROUNDING = 3.0

# Results of top-k and NMS: order and membership may change where scores nearly tie. This share of
# the stored entries must be found, at most so many rows away from their place.
_RANKED = re.compile(r"extra/(rpn\.proposals|detections)\.\d+\.")
_RANKED_SHARE = 0.98
_RANKED_REACH = 3

_PIXELS = re.compile(r"\b(anchors|boxes|proposals|decoded|final_boxes)(\.p\d+)?$")
Tensors = Mapping[str, torch.Tensor]


class Difference(NamedTuple):
    """One compared key: the largest difference, what it may be, and where it is."""

    key: str
    largest: float
    tolerance: float
    place: str

    def __str__(self):
        sizes = f"max difference {self.largest:.3g}, tolerance {self.tolerance:.3g}"
        return f"{self.key}: {sizes}, {self.place}"


@dataclass
class Comparison:
    """Everything compared for one case."""

    case: str
    differences: list[Difference] = field(default_factory=list)

    @property
    def failures(self):
        """The differences above their tolerances, and NaNs; largest excess first."""
        failed = [each for each in self.differences if not each.largest <= each.tolerance]
        return sorted(failed, key=lambda each: -each.largest / max(each.tolerance, 1e-30))

    def text(self):
        """Return the failures, a line each."""
        failures = self.failures
        lines = [f"golden case {self.case}: {len(failures)} of {len(self.differences)} keys differ"]
        return "\n  ".join(lines + [str(each) for each in failures])

    def add(self, key, largest, tolerance, place):
        """Add a result."""
        self.differences.append(Difference(key, float(largest), tolerance, place))


def compare(case, outputs, extra, gradients, input_gradients, not_offered=frozenset()):
    """Compare one run with everything the case stores; a stored key that is not compared fails.

    All have the case's names, `extra` without "extra/"; `input_gradients` are in order, and
    `not_offered` are names of `extra` that vitdet has no counterpart of.
    """
    result = Comparison(case.name)
    left = set(case.arrays) - {f"grad_norm/{name}" for name in gradients}
    left -= {f"{start}extra/{name}" for name in not_offered for start in ("", "stats/")}
    values = dict(outputs) | {f"extra/{name}": value for name, value in extra.items()}
    for i, gradient in enumerate(input_gradients):
        key = "grad_input" if len(input_gradients) == 1 else f"grad_input/{i}"
        if gradient is not None:
            values[key] = gradient
    for key, value in values.items():
        if key in case.arrays:
            _compare_array(result, case, key, value.detach().numpy())
            left -= {key, f"stats/{key}"}
    _compare_norms(result, case, gradients)
    if not case.info.get("conversion"):
        # n outputs wrong by 1e-4 with normal weights sum up to 1e-4 * sqrt(n)
        count = sum(value.numel() for value in outputs.values())
        got = float(loss_of(case, {name: value.detach() for name, value in outputs.items()}))
        stored = case.info["loss"]
        place = f"got {got:.6g}, stored {stored:.6g}"
        result.add("loss", abs(got - stored), TOLERANCE * count**0.5, place)
    for key in sorted(left):
        result.add(key, np.inf, TOLERANCE, "stored, but vitdet offers nothing to compare")
    return result


def loss_of(case, outputs):
    """Return the sum over outputs k of (output_k * golden.image(1000 + k, its shape)).sum()."""
    loss = torch.zeros(())
    for k, name in enumerate(case.info["outputs"]):
        weight = case.golden.image(1000 + k, tuple(outputs[name].shape))
        loss = loss + (outputs[name] * torch.from_numpy(weight)).sum()
    return loss


def _compare_array(result, case, key, whole):
    expected, stats = case.arrays[key], case.arrays.get(f"stats/{key}")
    if stats is None:  # of whole numbers there are none
        assert expected.dtype.kind in "iu", f"{case.name}: no statistics of {key}"
        stats = np.array([whole.mean(), whole.std(), np.abs(whole).max()])
    tolerance = max(TOLERANCE, _ROUNDING * case.info.get("float32_error", {}).get(key, 0.0))
    if _PIXELS.search(key):
        tolerance = _PIXEL_TOLERANCE * max(1.0, float(stats[2]))
    stride = case.info["subsampled"]["stride"].get(key)
    if _RANKED.match(key):
        _compare_ranked(result, key, whole, expected, stride or 1, tolerance)
        # That share of the entries may be others, of at most the largest size.
        more = tolerance + (1 - _RANKED_SHARE) * float(stats[2])
        _compare_stats(result, key, whole, stats, more)
        return
    table = case.info["extra"] if key.startswith("extra/") else case.info["outputs"]
    shape = None if key.startswith("grad_input") else tuple(table[key.removeprefix("extra/")])
    got = whole if stride is None else whole.reshape(-1)[::stride]
    if whole.shape != (shape or whole.shape) or got.shape != expected.shape:
        sizes = f"shape {whole.shape}, stored {shape} as {expected.shape}"
        result.add(key, np.inf, tolerance, sizes)
        return
    if not expected.size:  # a table of no tokens: its shape is all there is
        result.add(key, 0.0, tolerance, "empty")
        return
    difference = np.abs(got.astype(np.float64) - expected)
    worst = int(np.argmax(np.nan_to_num(difference, nan=np.inf)))
    place = tuple(int(i) for i in np.unravel_index(worst * (stride or 1), whole.shape))
    values = f"got {got.reshape(-1)[worst]:.7g}, stored {expected.reshape(-1)[worst]:.7g}"
    result.add(key, difference.reshape(-1)[worst], tolerance, f"at {list(place)}: {values}")
    _compare_stats(result, key, whole, stats, tolerance)


def _compare_stats(result, key, value, stats, tolerance):
    """Compare mean, population standard deviation and largest absolute value of the full array."""
    value = value.astype(np.float64)
    got = np.array([value.mean(), value.std(), np.abs(value).max()])
    difference = np.abs(got - stats)
    worst = int(np.argmax(np.nan_to_num(difference, nan=np.inf)))
    place = f"{('mean', 'std', 'max abs')[worst]}: got {got[worst]:.7g}, stored {stats[worst]:.7g}"
    result.add(f"stats/{key}", difference[worst], tolerance, place)


def _compare_ranked(result, key, got, stored, stride, tolerance):
    """Compare rows that are sorted by score, where ties may have another order."""
    columns = got.shape[1] if got.ndim > 1 else 1
    flat, stored = got.reshape(-1).astype(np.float64), stored.reshape(-1).astype(np.float64)
    at = np.arange(stored.size) * stride
    nearest = np.full(stored.size, np.inf)
    for shift in range(-_RANKED_REACH, _RANKED_REACH + 1):
        place = at + shift * columns
        inside = (place >= 0) & (place < flat.size)
        found = np.abs(flat[place[inside]] - stored[inside])
        nearest[inside] = np.minimum(nearest[inside], found)
    allowed = int((1 - _RANKED_SHARE) * stored.size)
    missing = int((~(nearest <= tolerance)).sum())
    place = f"{missing} of {stored.size} stored entries not found, {allowed} may be"
    result.add(key, float(np.sort(nearest)[-1 - allowed]), tolerance, place)


def _compare_norms(result, case, gradients):
    errors = case.info.get("float32_error", {})
    stored_error = max((e for key, e in errors.items() if key.startswith("grad_norm")), default=0.0)
    for name, gradient in gradients.items():
        key = f"grad_norm/{name}"
        got = 0.0 if gradient is None else float(gradient.double().norm())
        if name in case.info["parameters_without_grad"]:
            result.add(key, got, 0.0, f"got {got:.7g}, no gradient in the published code")
        elif key not in case.arrays:
            result.add(key, np.inf, 0.0, f"got {got:.7g}, nothing stored")
        else:
            stored = float(case.arrays[key])
            # As a relative difference, so that keys can be compared with each other.
            difference = abs(got - stored) / max(stored, _SMALL_NORM)
            tolerance = _NORM_TOLERANCE + stored_error
            result.add(key, difference, tolerance, f"got {got:.7g}, stored {stored:.7g}")
