"""Whether an exported file finds what the model finds: the report at the end of every export."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import Boxes, pairwise_iou

from vitdet.export.graph import Graph, paste
from vitdet.utils.checks import InputError

Run = Callable[[torch.Tensor], list[torch.Tensor]]  # how a file is run: image in, outputs out

# How far a file may be from the model: sides of a box in pixels, scores, lowest IoU of two masks
# (one pixel may differ whatever the size), numbers of a level.
LIMITS = {"box": 0.5, "score": 1e-3, "mask_iou": 0.99, "feature": 1e-4}


@dataclass
class Report:
    """Largest differences between a file and the model over all images (lowest IoU of masks).

    Of the model's `detections` `matched` are found by both. `at_the_edge` are found by one alone,
    with a score where rounding decides which detections are the last; `extra` are the others, none
    for an export that holds. `mask_pixels` is the largest number of pixels that two masks below the
    limit of IoU differ in, `faults` has the limits that do not hold as sentences.
    """

    images: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    detections: int = 0
    matched: int = 0
    extra: int = 0
    at_the_edge: int = 0
    box: float = 0.0
    score: float = 0.0
    mask_iou: float = 1.0
    mask_pixels: int = 0
    feature: float = 0.0
    feature_size: float = 0.0
    faults: list[str] = field(default_factory=list)


def compare(graph: Graph, run: Run, images: list[torch.Tensor]) -> Report:
    """Run a wrapped model's own code and a file of it on images (3, H, W)."""
    report = Report()
    for image in images:
        size = (image.shape[-2], image.shape[-1])
        report.images += 1
        report.sizes += [size] if size not in report.sizes else []
        try:
            found = run(image)
        except InputError as error:
            text = str(error)[-200:]
            report.faults.append(f"an image of {size[0]}x{size[1]} cannot be run: {text}")
            continue
        wanted = outputs_of(graph, image)
        if graph.detector:
            _compare_detections(report, graph, wanted, found, size)
            continue
        for ours, theirs in zip(wanted, found, strict=True):
            if ours.shape != theirs.shape:
                text = f"a level is {tuple(theirs.shape)} and not {tuple(ours.shape)}"
                report.faults.append(text)
                continue
            report.feature = _worse(report.feature, ours - theirs)
            report.feature_size = _worse(report.feature_size, ours)
    _judge(report, graph.detector)
    return report


@torch.no_grad()
def outputs_of(graph: Graph, image: torch.Tensor) -> list[torch.Tensor]:
    """Return what the model's own code finds, or its levels."""
    model: Any = graph.model
    bgr = getattr(model, "input_format", "RGB") == "BGR"
    record = {"image": image.flip(0) if bgr else image}
    if not graph.detector:
        features = model.backbone(model.preprocess_image([record]).tensor)
        return [features[name] for name in graph.outputs]
    found = model([record])[0]["instances"]
    parts = [found.pred_boxes.tensor, found.scores, found.pred_classes]
    return [*parts, found.pred_masks] if found.has("pred_masks") else parts


def _compare_detections(
    report: Report,
    graph: Graph,
    wanted: list[torch.Tensor],
    found: list[torch.Tensor],
    size: tuple[int, int],
) -> None:
    pairs = match(wanted, found)
    report.detections += len(wanted[0])
    report.matched += len(pairs)
    # below the threshold, or the last of a full list, rounding decides
    full = [float(scores.min()) for scores in (wanted[1], found[1]) if len(scores) >= graph.most]
    edge = max([graph.threshold, *full]) + LIMITS["score"]
    for side, scores in enumerate((wanted[1], found[1])):
        alone = set(range(len(scores))) - {pair[side] for pair in pairs}
        # not `score > edge`: a score that is no number is no excuse
        extra = sum(not float(scores[place]) <= edge for place in alone)
        report.extra += extra
        report.at_the_edge += len(alone) - extra
    if not pairs:
        return
    first, second = (torch.tensor(each) for each in zip(*pairs, strict=True))
    report.box = _worse(report.box, wanted[0][first] - found[0][second])
    report.score = _worse(report.score, wanted[1][first] - found[1][second])
    if graph.masks == "none":
        return
    ours, theirs = wanted[3][first], found[3][second]
    if graph.masks == "boxes":
        theirs = paste(theirs, found[0][second], size)
    common, either = (ours & theirs).flatten(1).sum(1), (ours | theirs).flatten(1).sum(1)
    iou = torch.where(either > 0, common / either.clamp(min=1), 1.0)
    report.mask_iou = min(report.mask_iou, float(iou.min()))
    low = (either - common)[iou < LIMITS["mask_iou"]]
    report.mask_pixels = max(report.mask_pixels, *low.tolist(), 0)


def match(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Return pairs of places of the same detection in both lists (boxes, scores, classes, ...).

    In the order of falling scores each of `wanted` takes what overlaps it most, at least half,
    among those of its class that are left; so ties in another order still find each other.
    """
    overlap = pairwise_iou(Boxes(wanted[0]), Boxes(found[0]))
    overlap = torch.where(wanted[2][:, None] == found[2][None], overlap, -1.0)
    pairs = []
    for place in wanted[1].argsort(descending=True, stable=True).tolist() if len(found[0]) else ():
        best, other = overlap[place].max(0)
        if best >= 0.5:
            pairs.append((place, int(other)))
            overlap[:, int(other)] = -1.0
    return pairs


def _worse(before: float, x: torch.Tensor) -> float:
    """Return the larger of a number and all of a tensor; no number is worse than any."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return largest if math.isnan(largest) else max(before, largest)


def _rows(report: Report, detector: bool) -> list[tuple[str, float, str]]:
    """Return name, value and limit of what is compared."""
    names = ("box", "score") if detector else ("feature",)
    return [(f"{name} difference", getattr(report, name), name) for name in names]


def _judge(report: Report, detector: bool) -> None:
    """List the limits that do not hold."""
    for name, value, key in _rows(report, detector):
        if not value <= LIMITS[key]:
            report.faults.append(f"largest {name} {value:.3g} > {LIMITS[key]:g}")
    if report.extra:
        report.faults.append(f"detections of one alone {report.extra} > 0")
    if report.mask_iou < LIMITS["mask_iou"] and report.mask_pixels > 1:
        limit = LIMITS["mask_iou"]
        report.faults.append(f"lowest mask IoU {report.mask_iou:.4f} < {limit:g}")
    if not (report.detections if detector else report.images):
        report.faults.append("nothing was found on any image, so nothing was compared")


def table(report: Report, detector: bool) -> list[str]:
    """Return the report as lines to read."""
    sizes = ", ".join(f"{height}x{width}" for height, width in report.sizes[:4])
    more = ", ..." if len(report.sizes) > 4 else ""
    lines = [f"images               {report.images} ({sizes}{more})"]
    if detector:
        lines.append(
            f"detections           {report.detections}, {report.matched} found by both, "
            f"{report.at_the_edge} at the edge, {report.extra} by one alone"
        )
    for name, value, key in _rows(report, detector):
        unit = " px" if key == "box" else ""
        lines.append(f"{name:<20} {value:.2e}{unit} (limit {LIMITS[key]:g})")
    if detector:
        limit = LIMITS["mask_iou"]
        lines.append(f"lowest mask IoU      {report.mask_iou:.4f} (limit {limit:g})")
    return [*lines, *(f"does not hold        {fault}" for fault in report.faults)]
