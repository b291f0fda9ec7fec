"""The comparison sees every kind of difference, and forgives only what rounding decides."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes, Instances

from tests.export.tiny_models import model
from vitdet.export.graph import Graph, graph_of
from vitdet.export.parity import Report, compare, match, table

IMAGE = torch.zeros(3, 64, 64, dtype=torch.uint8)
Found = list[torch.Tensor]


def found() -> Found:
    """Three detections: boxes, scores, classes, masks."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60], [1, 0, 21, 20]])
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    for mask, box in zip(masks, boxes.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = True
    return [boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), masks]


class Says:
    """A model that always finds the same."""

    input_format = "RGB"

    def __init__(self, parts: Found) -> None:
        self.parts = parts

    def __call__(self, _: object) -> list[dict]:
        instances = Instances((64, 64), pred_boxes=Boxes(self.parts[0]), scores=self.parts[1])
        instances.pred_classes, instances.pred_masks = self.parts[2:]
        return [{"instances": instances}]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(model("mask"), "detector")  # at most 10, above 0.05


def judged(graph: Graph, wanted: Found, got: Found) -> Report:
    return compare(Says(wanted), graph, lambda _: got, [IMAGE])  # pyright: ignore


def test_equal(graph: Graph) -> None:
    report = judged(graph, found(), found())
    assert report.holds
    assert (report.detections, report.matched, report.extra, report.at_the_edge) == (3, 3, 0, 0)
    assert (report.box, report.score, report.mask_iou) == (0.0, 0.0, 1.0)


def test_another_order_of_ties(graph: Graph) -> None:
    """Equal scores may come in any order: boxes find their like."""
    wanted = found()
    wanted[1] = torch.tensor([0.9, 0.9, 0.9])
    report = judged(graph, wanted, [each[[2, 0, 1]] for each in wanted])
    assert report.holds
    assert report.box == 0.0
    pairs = match(wanted, [each[[2, 0, 1]] for each in wanted])
    assert sorted(pairs) == [(0, 1), (1, 2), (2, 0)]


@pytest.mark.parametrize(
    ("part", "place", "value", "fault"),
    [
        (0, (1, 2), 60.6, r"largest box difference \(px\) 0.6 > 0.5"),
        (0, (1, 2), float("nan"), "of one alone 2 > 0"),
        (1, (1,), 0.802, "largest score difference 0.002 > 0.001"),
        (2, (1,), 0, "detections of one alone 2 > 0"),
        (3, (0, 0), True, r"lowest mask IoU 0.9009 < 0.99"),
    ],
)
def test_differences(graph: Graph, part: int, place: tuple, value: float, fault: str) -> None:
    got = found()
    got[part][place] = value
    report = judged(graph, found(), got)
    assert not report.holds
    assert len(report.faults) == 1
    assert re.search(fault, report.faults[0])
    assert report.faults[0] in table(report, True)[-1]


def test_missing_detection(graph: Graph) -> None:
    report = judged(graph, found(), [each[:2] for each in found()])
    assert report.faults == ["detections of one alone 1 > 0"]
    assert (report.extra, report.matched) == (1, 2)


def test_none_found_by_the_file(graph: Graph) -> None:
    report = judged(graph, found(), [each[:0] for each in found()])
    assert report.extra == 3


def test_edge_of_the_threshold(graph: Graph) -> None:
    """A score at the threshold falls on either side of it by rounding."""
    wanted = found()
    wanted[1][2] = 0.0505
    assert judged(graph, wanted, [each[:2] for each in wanted]).holds
    wanted[1][2] = 0.0515
    assert not judged(graph, wanted, [each[:2] for each in wanted]).holds


def test_edge_of_a_full_list(graph: Graph) -> None:
    """With as many detections as there may be, the last of equal ones is either's."""
    boxes = torch.arange(11.0)[:, None] * 5 + torch.tensor([0.0, 0, 4, 4])
    scores = torch.linspace(0.9, 0.5, 11)
    scores[10] = scores[9] - 1e-4
    whole = [boxes, scores, torch.zeros(11, dtype=torch.long), torch.ones(11, 64, 64).bool()]
    first, other = [each[:10] for each in whole], [each[[*range(9), 10]] for each in whole]
    report = judged(graph, first, other)
    assert report.holds
    assert report.at_the_edge == 2


def test_one_pixel_is_rounding(graph: Graph) -> None:
    """On a small mask a pixel is more than a hundredth; two are a difference."""
    wanted, got = found(), found()
    for parts in (wanted, got):
        parts[3][:] = False
        parts[3][:, 5:10, 5:10] = True
    got[3][0, 5, 5] = False
    report = judged(graph, wanted, got)
    assert report.holds
    assert report.mask_iou == pytest.approx(24 / 25)
    got[3][0, 5, 6] = False
    assert not judged(graph, wanted, got).holds


def test_nothing_to_compare(graph: Graph) -> None:
    none = [each[:0] for each in found()]
    report = judged(graph, none, none)
    assert report.faults == ["no detection on any image, so nothing was compared"]
    assert compare(Says(none), graph, lambda _: none, []).faults  # pyright: ignore


def test_levels() -> None:
    made = model("no_square")
    graph = graph_of(made, "backbone")

    def run(image: torch.Tensor) -> Found:
        levels = list(graph(image))
        levels[1] = levels[1] + 2e-4
        return levels

    report = compare(made, graph, run, [IMAGE])
    assert report.faults == ["largest feature difference 0.0002 > 0.0001"]
    short = compare(made, graph, lambda x: [y[..., :1] for y in graph(x)], [IMAGE])
    assert "a level is (1, 32, 16, 1) and not (1, 32, 16, 16)" in short.faults


def test_a_file_that_cannot_run(graph: Graph) -> None:
    def run(_: torch.Tensor) -> Found:
        raise RuntimeError("sizes do not agree\n at some place")

    report = compare(Says(found()), graph, run, [IMAGE])  # pyright: ignore
    expected = "an image of 64x64 cannot be run: sizes do not agree at some place"
    assert report.faults[0] == expected


def test_report_as_json(graph: Graph) -> None:
    plain = json.loads(json.dumps(judged(graph, found(), found()).plain()))
    assert plain["holds"] is True
    assert plain["limits"] == {"box": 0.5, "score": 1e-3, "mask_iou": 0.99, "feature": 1e-4}
    assert plain["sizes"] == [[64, 64]]
    assert SimpleNamespace(**plain).matched == 3
