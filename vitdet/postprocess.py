"""Scores of detections after the heads: soft-NMS and maskness. Torch alone.

Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", Sec. 3, and Wang et al.,
"SOLO: Segmenting Objects by Locations", Sec. 3.4 (mask score), as baaivision/EVA, EVA-02/det
evaluates with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch

from vitdet.utils.checks import InputError, check_word

SoftNMSMethod = Literal["linear", "gaussian", "hard"]

_PAIRS = 2_000_000  # pairs of boxes that are looked at together: about 100 MB


def soft_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor | None = None,
    *,
    method: SoftNMSMethod = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower the scores of boxes that overlap better ones, and drop those that become too low.

    The definition: take the box with the highest score (of equal ones the first), multiply the
    score of every box that is left by f(IoU with it), and go on. f is, with t the threshold,
    "linear" 1 - IoU from IoU >= t on, "gaussian" exp(-IoU ** 2 / sigma), "hard" 0 from IoU >= t on,
    else 1. Overlaps and scores are computed in float64, whatever comes in.

    Args:
        boxes: (N, 4), XYXY.
        scores: (N,).
        classes: (N,) whole numbers; boxes of different classes do not touch each other. None for
            one class.
        method: f, see above.
        iou_threshold: t, above 0; not used by "gaussian".
        sigma: width of "gaussian", above 0.
        min_score: boxes below it are dropped; above 0.

    Returns:
        Places (K,) of the boxes that are kept, in the order of falling new scores, and these (K,).
    """
    check_soft_nms(method, iou_threshold, sigma, min_score)
    # A box below min_score only lowers boxes that are below it, too.
    places = (scores >= min_score).nonzero()[:, 0]
    parts = []
    for i, j, iou in _overlaps(boxes[places], None if classes is None else classes[places]):
        if method == "gaussian":
            parts.append((i, j, torch.exp(-(iou**2) / sigma)))
        else:
            near = (iou >= iou_threshold).nonzero()[:, 0]
            factor = 0 * _at(iou, near) if method == "hard" else 1 - _at(iou, near)
            parts.append((_at(i, near), _at(j, near), factor))
    first, second, factor = (torch.cat(each) for each in zip(*parts, strict=True))
    # Scores only fall, so a box is at its final score as soon as no box that it overlaps has a
    # higher one. All boxes of which this is true are taken in one round; there are some tens.
    new = scores[places].double()
    while len(first):
        # Of every pair the one that comes later in the order of falling scores.
        a, b = new[first], new[second]
        later = torch.where((a > b) | ((a == b) & (first < second)), second, first)
        waits = torch.zeros_like(new, dtype=torch.bool)
        waits[later] = True
        by_first, by_second = ~waits[first], ~waits[second]  # never both
        target = torch.cat([second[by_first], first[by_second]])
        new.scatter_reduce_(0, target, torch.cat([factor[by_first], factor[by_second]]), "prod")
        alive = new >= min_score
        left = ~(by_first | by_second) & alive[first] & alive[second]
        first, second, factor = first[left], second[left], factor[left]
    order = new.argsort(descending=True, stable=True)
    order = order[new[order] >= min_score]
    return places[order], new[order].to(scores.dtype)


def maskness(masks: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Return how sure masks (N, ..., H, W) of probabilities are, (N,).

    That is the mean of each over its pixels above `threshold`, 0 where it has none.
    """
    flat = masks.flatten(1)
    inside = flat > threshold
    return (flat * inside).sum(1) / inside.sum(1).clamp(min=1)


def check_soft_nms(method: str, iou_threshold: float, sigma: float, min_score: float) -> None:
    """Raise InputError for an argument of `soft_nms` outside its range."""
    check_word("soft-NMS method", method, get_args(SoftNMSMethod))
    if not 0 < iou_threshold <= 1:
        text = f"soft-NMS iou_threshold: expected 0 < t <= 1, got {iou_threshold}. "
        raise InputError(text + "Published recipes have 0.6.")
    for name, value, usual in (("sigma", sigma, 0.5), ("min_score", min_score, 0.001)):
        if value <= 0:
            raise InputError(f"soft-NMS {name}: expected more than 0, got {value}, as {usual}.")


def _overlaps(
    boxes: torch.Tensor, classes: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (first, second, IoU) of the pairs of one class that can overlap, part by part.

    Boxes are sorted by class and left side; a box can then overlap only a run of those behind it.
    """
    boxes = boxes.double()
    x1, y1, x2, y2 = boxes.unbind(1)
    group = torch.zeros_like(x1)
    if classes is not None:
        group = classes.unique(return_inverse=True)[1].double()
    span = torch.cat([x2, x1, x1.new_zeros(1)]).max() - torch.cat([x1, x1.new_zeros(1)]).min() + 1
    left, order = (x1 + group * span).sort(stable=True)
    x1, y1, x2, y2 = boxes[order].t().contiguous().unbind(0)
    area = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
    row = torch.arange(len(boxes), device=boxes.device)
    runs = torch.searchsorted(left, x2 + group[order] * span) - row - 1
    runs = runs.clamp(min=0)
    total = runs.cumsum(0)
    pairs = int(total[-1]) if len(total) else 0
    ends = torch.tensor(range(_PAIRS, pairs, _PAIRS), dtype=total.dtype, device=total.device)
    begin = 0
    for end in [*torch.searchsorted(total, ends).tolist(), len(total)]:
        length = runs[begin:end]
        i = row[begin:end].repeat_interleave(length)
        # Place in the part, less the place where the pairs of this row begin.
        of_row = (length.cumsum(0) - length).repeat_interleave(length)
        j = i + 1 + torch.arange(len(i), device=i.device) - of_row
        bottom, top = torch.minimum(_at(y2, i), _at(y2, j)), torch.maximum(_at(y1, i), _at(y1, j))
        meet = (bottom > top).nonzero()[:, 0]  # few do: the rest is done for these alone
        i, j, height = _at(i, meet), _at(j, meet), _at(bottom, meet) - _at(top, meet)
        width = (torch.minimum(_at(x2, i), _at(x2, j)) - _at(x1, j)).clamp(min=0)
        common = width * height
        yield _at(order, i), _at(order, j), common / (_at(area, i) + _at(area, j) - common)
        begin = end


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return values[index], which torch has a faster way for on a CPU, three to five times."""
    return values.index_select(0, index)
