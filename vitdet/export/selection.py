"""How predictions become detections, in operations that every exporter knows.

The same selection as detectron2's (modeling/proposal_generator/proposal_utils.py,
roi_heads/fast_rcnn.py, modeling/poolers.py, meta_arch/dense_detector.py, layers/mask_ops.py) and
`vitdet.postprocess`, without branches on values and without loops whose length depends on them:
lists are filled up to a fixed length with boxes of no area that score `NEVER`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torchvision.ops import nms

NEVER = -math.inf
# (height, width) of an image: numbers, or what a tracer takes for them.
Size = tuple[Any, Any]


def clip(boxes: torch.Tensor, size: Size) -> torch.Tensor:
    """Cut boxes (..., 4) XYXY to an image of `size`."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    columns = (x.clamp(min=0).clamp(max=width) for x in (x1, x2))
    rows = (y.clamp(min=0).clamp(max=height) for y in (y1, y2))
    (x1, x2), (y1, y2) = columns, rows
    return torch.stack((x1, y1, x2, y2), dim=-1)


def finite(x: torch.Tensor) -> torch.Tensor:
    """Return which rows (N,) of x (N, ...) have finite numbers only."""
    return (x.abs() < math.inf).flatten(1).all(dim=1)


def wider_than(boxes: torch.Tensor, side: float) -> torch.Tensor:
    """Return which of the boxes (N, 4) have both sides longer than `side` pixels."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1 > side) & (y2 - y1 > side)


def proposals(
    rpn: Any, features: dict[str, torch.Tensor], size: Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the proposals of detectron2's RPN for one image.

    Args:
        rpn: the module.
        features: {name: (1, C, H, W)}.
        size: of the image.

    Returns:
        Boxes (R, 4), and which of the R are proposals (R,): the others fill up.
    """
    maps = [features[name] for name in rpn.in_features]
    most = int(rpn.pre_nms_topk[False])
    boxes, scores = [], []
    anchors = (each.tensor for each in rpn.anchor_generator(maps))
    for anchor, logits, deltas in zip(anchors, *rpn.rpn_head(maps), strict=True):
        score = _filled(logits[0].permute(1, 2, 0).flatten(), most, NEVER)
        delta = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
        score, place = score.topk(most)
        decode = rpn.box2box_transform.apply_deltas
        box = decode(_filled(delta, most)[place], _filled(anchor, most)[place])
        right = finite(box) & (score.abs() < math.inf)
        box = clip(torch.where(right[:, None], box, torch.zeros_like(box)), size)
        right = right & wider_than(box, rpn.min_box_size)
        box = torch.where(right[:, None], box, torch.zeros_like(box))
        score = torch.where(right, score, torch.full_like(score, NEVER))
        scores.append(hard_nms(box, score, rpn.nms_thresh))
        boxes.append(box)
    total = most * len(boxes)
    best, place = torch.cat(scores).topk(min(int(rpn.post_nms_topk[False]), total))
    return torch.cat(boxes)[place], best > NEVER


def _filled(x: torch.Tensor, count: int, value: float = 0.0) -> torch.Tensor:
    """Return x (N, ...) with `count` rows of `value` behind it."""
    return torch.cat((x, x.new_full((count, *x.shape[1:]), value)))


def pool(pooler: Any, maps: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Return what detectron2's ROIPooler makes of one image's maps and boxes (N, 4)."""
    rois = torch.cat((torch.zeros_like(boxes[:, :1]), boxes), dim=1)
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], rois)
    x1, y1, x2, y2 = boxes.unbind(-1)
    # Lin et al., "Feature Pyramid Networks", eq. 1
    sides = torch.sqrt((x2 - x1) * (y2 - y1)) / pooler.canonical_box_size
    levels = torch.floor(pooler.canonical_level + torch.log2(sides + 1e-8))
    levels = levels.clamp(pooler.min_level, pooler.max_level).to(torch.int64) - pooler.min_level
    pooled, order = [], []
    for level, (of_level, features) in enumerate(zip(pooler.level_poolers, maps, strict=True)):
        here = (levels == level).nonzero()[:, 0]
        order.append(here)
        pooled.append(of_level(features, rois[here]))
    return torch.cat(pooled)[torch.cat(order).argsort()]


def places_above(
    scores: torch.Tensor, threshold: float, fill: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows, scores and classes, each (K,), of the scores (R, classes) above a threshold.

    Behind them come `fill` entries of row 0 and class 0 that score NEVER.
    """
    rows, classes = (scores > threshold).nonzero().unbind(1)
    found = _filled(scores[rows, classes], fill, NEVER)
    return _filled(rows, fill), found, _filled(classes, fill)


def above(
    boxes: torch.Tensor, scores: torch.Tensor, threshold: float, fill: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the boxes (K, 4), scores (K,) and classes (K,) of the scores above a threshold.

    Args:
        boxes: (R, 4), or (R, classes, 4).
        scores: (R, classes).
        threshold: see above.
        fill: so many boxes without area that score NEVER come behind them.
    """
    rows, found, classes = places_above(scores, threshold, fill)
    chosen = boxes[rows] if boxes.dim() == 2 else boxes[rows, classes]
    return torch.where((found > NEVER)[:, None], chosen, torch.zeros_like(chosen)), found, classes


def hard_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the scores (K,), NEVER where a box overlaps a better one by more than `threshold`."""
    kept = nms(boxes, scores, threshold)
    return torch.full_like(scores, NEVER).scatter(0, kept, scores[kept])


def seen(
    boxes: torch.Tensor, scores: torch.Tensor, *others: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Leave out fillers and boxes without area."""
    rows = (wider_than(boxes, 0.0) & (scores > NEVER)).nonzero()[:, 0]
    return boxes[rows], scores[rows], *(each[rows] for each in others)


def apart(
    boxes: torch.Tensor, classes: torch.Tensor, num_classes: int, step: tuple[Any, Any]
) -> torch.Tensor:
    """Move boxes (K, 4) of every class to a place of their own, so that classes do not overlap.

    The places are a square of `step` (height, width) each. In one row, as torchvision's
    `batched_nms` has them, float32 would keep 1/8 pixel of a box of the last LVIS class.
    """
    side = math.ceil(math.sqrt(num_classes))
    right, down = classes % side * step[1], classes // side * step[0]
    return boxes + torch.stack((right, down, right, down), dim=1).to(boxes.dtype)


def soft_nms(
    boxes: torch.Tensor, scores: torch.Tensor, heads: Any, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places (most,) and new scores (most,) of the best boxes after soft-NMS.

    The definition of `vitdet.postprocess.soft_nms`, box after box: scores only fall, so the n-th
    box that is taken is the n-th of the result, and `most` steps are enough.

    Args:
        boxes: (K, 4), those of different groups apart.
        scores: (K,); with NEVER for a filler, of which there are `most` at least.
        heads: has `method`, `iou_threshold`, `sigma` and `min_score`.
        most: how many.

    Returns:
        The places, and the scores: NEVER where fewer boxes are left at `min_score`.
    """
    box, left = boxes.double(), scores.double().clamp(min=-1.0)
    x1, y1, x2, y2 = box.unbind(1)
    area, rows = (x2 - x1) * (y2 - y1), torch.arange(left.shape[0], device=left.device)
    places, found = [], []
    for _ in range(most):
        place = left.argmax(0)
        taken = box[place]
        places.append(place)
        found.append(left[place])
        across = (torch.minimum(x2, taken[2]) - torch.maximum(x1, taken[0])).clamp(min=0)
        along = (torch.minimum(y2, taken[3]) - torch.maximum(y1, taken[1])).clamp(min=0)
        common = across * along
        overlap = common / (area + area[place] - common).clamp(min=1e-12)
        left = torch.where(rows == place, -torch.ones_like(left), left * _factor(overlap, heads))
    new = torch.stack(found)
    new = torch.where(new >= heads.min_score, new, torch.full_like(new, NEVER))
    return torch.stack(places), new.to(scores.dtype)


def _factor(overlap: torch.Tensor, heads: Any) -> torch.Tensor:
    """Return f(IoU), see `vitdet.postprocess.soft_nms`."""
    if heads.method == "gaussian":
        return torch.exp(-(overlap**2) / heads.sigma)
    lower = torch.zeros_like(overlap) if heads.method == "hard" else 1 - overlap
    return torch.where(overlap >= heads.iou_threshold, lower, torch.ones_like(overlap))


def paste(masks: torch.Tensor, boxes: torch.Tensor, size: Size) -> torch.Tensor:
    """Return the masks of a whole image, bool (N, height, width).

    Bilinear, pixel centres at halves, nothing outside the box: the same as sampling on a grid, but
    rows and columns are weighted one after the other, as two matrix products.

    Args:
        masks: (N, M, M) probabilities inside the boxes.
        boxes: (N, 4).
        size: of the image.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    rows = _weights(y1, y2, size[0], masks.shape[-2])
    columns = _weights(x1, x2, size[1], masks.shape[-1])
    return rows @ masks @ columns.transpose(1, 2) >= 0.5


def _weights(first: torch.Tensor, last: torch.Tensor, length: Any, cells: int) -> torch.Tensor:
    """Return the weights (N, length, cells) of a mask's cells for each pixel along an axis."""
    pixels = torch.arange(length, device=first.device, dtype=first.dtype) + 0.5
    places = (pixels - first[:, None]) / (last - first)[:, None] * cells - 0.5
    centres = torch.arange(cells, device=first.device, dtype=first.dtype)
    return (1 - (places[..., None] - centres).abs()).clamp(min=0)
