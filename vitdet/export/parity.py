"""Whether an exported file finds what the model finds: the report at the end of every export."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import nn

from vitdet.export.graph import Detector, Graph, paste

Run = Callable[[torch.Tensor], list[torch.Tensor]]  # how a file is run: image in, outputs out

# How far a file may be from the model.
BOX = 0.5  # pixels between two sides of a box
SCORE = 1e-3  # between two scores
MASK_IOU = 0.99  # of two masks, at least; one pixel may differ whatever the size
FEATURE = 1e-4  # between two numbers of a level
LIMITS = {"box": BOX, "score": SCORE, "mask_iou": MASK_IOU, "feature": FEATURE}


@dataclass
class Report:
    """Differences between a file and the model, over all images.

    Attributes:
        images: how many were compared.
        sizes: their (height, width), each once.
        detections: of the model.
        matched: detections that both have.
        extra: detections of one alone that both could have: none for an export that holds.
        at_the_edge: detections of one alone whose score is that of the last ones, where rounding
            decides which of them is still there.
        box: largest difference of a side in pixels.
        score: largest difference of scores.
        mask_iou: lowest IoU of two masks of one detection.
        mask_pixels: largest number of pixels that two masks of one detection differ in, among
            those below the limit of IoU.
        feature: largest difference of a level.
        feature_size: largest number of a level, to compare with.
        faults: limits that do not hold, as sentences.
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

    @property
    def holds(self) -> bool:
        """Whether everything is within the limits."""
        return not self.faults

    def plain(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"holds": self.holds, "limits": LIMITS, **asdict(self)}


def compare(model: nn.Module, graph: Graph, run: Run, images: list[torch.Tensor]) -> Report:
    """Run the model and a file of it on images; return how far they are apart.

    Args:
        model: runs its own code, not the wrapper that was exported.
        graph: the wrapper.
        run: runs the file; a RuntimeError says that it cannot take an image, which it should.
        images: (3, H, W) each.
    """
    report = Report()
    for image in images:
        report.images += 1
        size = (image.shape[-2], image.shape[-1])
        report.sizes += [size] if size not in report.sizes else []
        try:
            found = run(image)
        except RuntimeError as error:
            text = " ".join(str(error).split())[-200:]
            report.faults.append(f"an image of {size[0]}x{size[1]} cannot be run: {text}")
            continue
        with torch.no_grad():
            if isinstance(graph, Detector):
                _compare_detections(report, graph, detections(model, image), found, size)
            else:
                _compare_features(report, _levels(model, graph, image), found)
    _judge(report, isinstance(graph, Detector))
    return report


def detections(model: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """Return what the model itself finds: boxes, scores, classes and masks, if it has them."""
    found = model([_record(model, image)])[0]["instances"]
    parts = [found.pred_boxes.tensor, found.scores, found.pred_classes]
    return [*parts, found.pred_masks] if found.has("pred_masks") else parts


def _levels(model: Any, graph: Graph, image: torch.Tensor) -> list[torch.Tensor]:
    """Return what the model's own backbone makes of an image."""
    features = model.backbone(model.preprocess_image([_record(model, image)]).tensor)
    return [features[name] for name in graph.outputs]


def _record(model: Any, image: torch.Tensor) -> dict[str, torch.Tensor]:
    bgr = getattr(model, "input_format", "RGB") == "BGR"
    return {"image": image.flip(0) if bgr else image}


def _compare_features(
    report: Report, wanted: list[torch.Tensor], found: list[torch.Tensor]
) -> None:
    for ours, theirs in zip(wanted, found, strict=True):
        if ours.shape != theirs.shape:
            report.faults.append(f"a level is {tuple(theirs.shape)} and not {tuple(ours.shape)}")
            continue
        report.feature = _worse(report.feature, _largest(ours - theirs))
        report.feature_size = max(report.feature_size, _largest(ours))


def _compare_detections(
    report: Report,
    graph: Detector,
    wanted: list[torch.Tensor],
    found: list[torch.Tensor],
    size: tuple[int, int],
) -> None:
    pairs = match(wanted, found)
    report.detections += len(wanted[0])
    report.matched += len(pairs)
    edge = _edge(graph, wanted[1], found[1]) + SCORE
    ours, theirs = ({pair[side] for pair in pairs} for side in (0, 1))
    for scores, taken in ((wanted[1], ours), (found[1], theirs)):
        for place, score in enumerate(scores.tolist()):
            if place not in taken:
                # not `score <= edge`: a score that is no number is no excuse
                report.at_the_edge += score <= edge
                report.extra += not score <= edge
    if not pairs:
        return
    first, second = (torch.tensor(each) for each in zip(*pairs, strict=True))
    report.box = _worse(report.box, _largest(wanted[0][first] - found[0][second]))
    report.score = _worse(report.score, _largest(wanted[1][first] - found[1][second]))
    if graph.masks == "none":
        return
    masks = found[3][second]
    if graph.masks == "boxes":
        masks = paste(masks, found[0][second], size)
    _compare_masks(report, wanted[3][first], masks)


def _edge(graph: Detector, *scores: torch.Tensor) -> float:
    """Return the score below which a detection may be left out of either list."""
    full = [float(each.min()) for each in scores if len(each) >= graph.most]
    return max([graph.threshold, *full])


def _compare_masks(report: Report, wanted: torch.Tensor, found: torch.Tensor) -> None:
    common = (wanted & found).flatten(1).sum(1)
    either = (wanted | found).flatten(1).sum(1)
    iou = torch.where(either > 0, common / either.clamp(min=1), torch.ones_like(common).float())
    report.mask_iou = min(report.mask_iou, float(iou.min()))
    low = iou < MASK_IOU
    if low.any():
        report.mask_pixels = max(report.mask_pixels, int((either - common)[low].max()))


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


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _worse(a: float, b: float) -> float:
    """Return the larger; no number is worse than any."""
    return b if math.isnan(b) else max(a, b)


def _judge(report: Report, detector: bool) -> None:
    """List the limits that do not hold."""
    checks = (
        ("largest box difference (px)", report.box, BOX),
        ("largest score difference", report.score, SCORE),
        ("largest feature difference", report.feature, FEATURE),
        ("detections of one alone", report.extra, 0),
    )
    for name, value, limit in checks:
        if not value <= limit:
            report.faults.append(f"{name} {value:.3g} > {limit:g}")
    if report.mask_iou < MASK_IOU and report.mask_pixels > 1:
        report.faults.append(f"lowest mask IoU {report.mask_iou:.4f} < {MASK_IOU:g}")
    if detector and not report.detections:
        report.faults.append("no detection on any image, so nothing was compared")
    if not report.images:
        report.faults.append("no image, so nothing was compared")


def table(report: Report, detector: bool) -> list[str]:
    """Return the report as lines to read."""
    sizes = ", ".join(f"{height}x{width}" for height, width in report.sizes[:4])
    more = ", ..." if len(report.sizes) > 4 else ""
    lines = [f"images               {report.images} ({sizes}{more})"]
    if detector:
        lines += [
            f"detections           {report.detections}, {report.matched} found by both, "
            f"{report.at_the_edge} at the edge, {report.extra} by one alone",
            f"box difference       {report.box:.2e} px (limit {BOX:g})",
            f"score difference     {report.score:.2e} (limit {SCORE:g})",
            f"lowest mask IoU      {report.mask_iou:.4f} (limit {MASK_IOU:g})",
        ]
    else:
        lines.append(
            f"feature difference   {report.feature:.2e} (limit {FEATURE:g}; "
            f"largest number {report.feature_size:.3g})"
        )
    return [*lines, *(f"does not hold        {fault}" for fault in report.faults)]
