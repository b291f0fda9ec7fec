"""The comparison sees every kind of difference, and forgives only what rounding decides."""

from __future__ import annotations

import re

import pytest
import torch
from detectron2.structures import Boxes, Instances

from tests.export.tiny_models import model
from vitdet.export.graph import Graph
from vitdet.export.parity import Report, compare, match, table
from vitdet.utils.checks import InputError

IMAGE = torch.zeros(3, 64, 64, dtype=torch.uint8)
Found = list[torch.Tensor]


def found() -> Found:
    """Three detections: boxes, scores, classes, masks."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60], [1, 0, 21, 20]])
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    for mask, box in zip(masks, boxes.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = True
    return [boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), masks]


class Says(torch.nn.Module):
    """A model that always finds the same."""

    input_format = "RGB"
    parts: Found

    def forward(self, _: object) -> list[dict]:
        instances = Instances((64, 64), pred_boxes=Boxes(self.parts[0]), scores=self.parts[1])
        instances.pred_classes, instances.pred_masks = self.parts[2:]
        return [{"instances": instances}]


@pytest.fixture(scope="module")
def graph() -> Graph:
    made = Graph(model("mask"))  # at most 10, above 0.05
    made.model = Says()
    return made


def judged(graph: Graph, wanted: Found, got: Found) -> Report:
    graph.model.parts = wanted
    return compare(graph, lambda _: got, [IMAGE])


def test_equal_also_in_another_order(graph: Graph) -> None:
    """Equal scores may come in any order: boxes find their like."""
    wanted = found()
    wanted[1] = torch.tensor([0.9, 0.9, 0.9])
    for order in ([0, 1, 2], [2, 0, 1]):
        report = judged(graph, wanted, [each[order] for each in wanted])
        assert report.faults == []
        assert (report.detections, report.matched) == (3, 3)
        assert (report.extra, report.at_the_edge) == (0, 0)
        assert (report.box, report.score, report.mask_iou) == (0.0, 0.0, 1.0)
    pairs = match(wanted, [each[[2, 0, 1]] for each in wanted])
    assert sorted(pairs) == [(0, 1), (1, 2), (2, 0)]


@pytest.mark.parametrize(
    ("part", "place", "value", "fault"),
    [
        (0, (1, 2), 60.6, "largest box difference 0.6 > 0.5"),
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
    assert len(report.faults) == 1
    assert re.search(fault, report.faults[0])
    assert report.faults[0] in table(report, True)[-1]


def test_detections_of_one_alone(graph: Graph) -> None:
    report = judged(graph, found(), [each[:2] for each in found()])
    assert report.faults == ["detections of one alone 1 > 0"]
    assert (report.extra, report.matched) == (1, 2)
    assert judged(graph, found(), [each[:0] for each in found()]).extra == 3
    none = [each[:0] for each in found()]
    nothing = ["nothing was found on any image, so nothing was compared"]
    assert judged(graph, none, none).faults == nothing
    assert compare(graph, lambda _: none, []).faults == nothing


def test_edge_of_the_threshold_and_of_a_full_list(graph: Graph) -> None:
    """By rounding a score falls on either side of the threshold, and the last of equal ones go."""
    wanted = found()
    for score, faults in ((0.0505, 0), (0.0515, 1)):
        wanted[1][2] = score
        assert len(judged(graph, wanted, [each[:2] for each in wanted]).faults) == faults
    boxes = torch.arange(11.0)[:, None] * 5 + torch.tensor([0.0, 0, 4, 4])
    scores = torch.linspace(0.9, 0.5, 11)
    scores[10] = scores[9] - 1e-4
    whole = [boxes, scores, torch.zeros(11, dtype=torch.long), torch.ones(11, 64, 64).bool()]
    first, other = [each[:10] for each in whole], [each[[*range(9), 10]] for each in whole]
    report = judged(graph, first, other)
    assert report.faults == []
    assert report.at_the_edge == 2


def test_one_pixel_is_rounding(graph: Graph) -> None:
    """On a small mask a pixel is more than a hundredth; two are a difference."""
    wanted, got = found(), found()
    for parts in (wanted, got):
        parts[3][:] = False
        parts[3][:, 5:10, 5:10] = True
    got[3][0, 5, 5] = False
    report = judged(graph, wanted, got)
    assert report.faults == []
    assert report.mask_iou == pytest.approx(24 / 25)
    got[3][0, 5, 6] = False
    assert judged(graph, wanted, got).faults


def test_levels_and_a_file_that_cannot_run() -> None:
    graph = Graph(model("no_square"), "backbone")

    def run(image: torch.Tensor) -> Found:
        levels = list(graph(image))
        levels[1] = levels[1] + 2e-4
        return levels

    assert compare(graph, run, [IMAGE]).faults == ["largest feature difference 0.0002 > 0.0001"]
    short = compare(graph, lambda x: [y[..., :1] for y in graph(x)], [IMAGE])
    assert "a level is (1, 32, 16, 1) and not (1, 32, 16, 16)" in short.faults

    def fails(_: torch.Tensor) -> Found:
        raise InputError("sizes do not agree\n at some place")

    expected = "an image of 64x64 cannot be run: sizes do not agree at some place"
    assert compare(graph, fails, [IMAGE]).faults[0] == expected
