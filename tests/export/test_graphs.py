"""The wrappers compute what the models compute, before any exporter."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

from tests.export.tiny_models import KINDS, images, model
from vitdet.export.example import example_image
from vitdet.export.graphs import Detector, exportable, graph_of
from vitdet.export.parity import Limits, compare
from vitdet.utils.checks import InputError

EXACT = Limits(box=1e-4, score=1e-6, mask_iou=0.999, feature=1e-6)


def run(graph: nn.Module):
    return lambda image: list(graph(image))


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("kind", KINDS)
def test_detector(kind: str, late: bool) -> None:
    """Detections are those of the model's own code, on images of several sizes."""
    made = model(kind)
    graph = graph_of(made, "detector", late=late)
    report = compare(made, graph, run(graph), images(), EXACT)
    assert report.faults == []
    assert report.detections > 10
    assert report.matched == report.detections
    assert report.at_the_edge == 0


@pytest.mark.parametrize("masks", ["boxes", "none"])
def test_kinds_of_masks(masks: str) -> None:
    made = model("mask")
    graph = graph_of(made, "detector", masks=masks)
    report = compare(made, graph, run(graph), images(), EXACT)
    assert report.faults == []
    found = graph(images()[0])
    assert len(found) == len(graph.outputs) == (4 if masks == "boxes" else 3)
    if masks == "boxes":
        assert found[3].shape == (len(found[0]), 8, 8)


def test_backbone() -> None:
    made = model("no_square")
    graph = graph_of(made, "backbone")
    assert graph.outputs == ("p2", "p3", "p4", "p5", "p6")
    report = compare(made, graph, run(graph), images(), EXACT)
    assert report.faults == []
    assert report.feature_size > 0.1


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("kind", ["mask", "soft", "dense"])
def test_no_detection(kind: str, late: bool) -> None:
    """Nothing above the threshold: empty outputs of the right shapes."""
    made = model(kind)
    graph = graph_of(made, "detector", late=late)
    assert isinstance(graph, Detector)
    graph.threshold = 2.0
    boxes, scores, classes, *masks = graph(images()[1])
    assert boxes.shape == (0, 4)
    assert scores.shape == classes.shape == (0,)
    assert [each.shape for each in masks] == [(0, 50, 64)] * (kind != "dense")


def test_numbers_that_are_none() -> None:
    """Proposals and boxes that are no numbers are left out, as detectron2 does."""
    made = model("mask")
    with torch.no_grad():
        made.get_parameter("roi_heads.box_predictor.bbox_pred.bias")[0] = float("nan")
        made.get_parameter("proposal_generator.rpn_head.anchor_deltas.bias")[4:8] = float("inf")
    graph = graph_of(made, "detector")
    report = compare(made, graph, run(graph), images(), EXACT)
    assert report.faults == ["no detection on any image, so nothing was compared"]


def test_image_larger_than_the_square() -> None:
    graph = graph_of(model("mask"), "detector")
    with pytest.raises(RuntimeError, match="expanded size"):
        graph(torch.zeros(3, 65, 10, dtype=torch.uint8))


def test_fixed_size() -> None:
    made = model("no_square")
    graph = graph_of(made, "detector", (50, 64))
    assert graph(images()[1])[0].shape[1] == 4
    with pytest.raises(RuntimeError, match="expanded size"):
        graph(images()[0])


def test_kernels_come_back() -> None:
    made = model("mask")
    before = [block.attn.backend for block in made.backbone.net.blocks]

    def fails() -> None:
        with exportable(made):
            assert {block.attn.backend for block in made.backbone.net.blocks} == {"eager"}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [block.attn.backend for block in made.backbone.net.blocks] == before == ["auto"] * 2


def test_example_shows_the_general_case() -> None:
    """Its tokens do not divide by a window, and are no position table's."""
    made = model("no_square", scale_factors=(4.0, 2.0, 1.0), top_block=None)
    for block, window in zip(made.backbone.net.blocks, (7, 0), strict=True):
        block.window_size = window
    image = example_image(graph_of(made, "backbone"), torch.uint8)
    height, width = (-(-side // 16) for side in image.shape[1:])
    assert height % 7
    assert width % 7
    assert height != width
    assert 4 not in (height, width)  # the table of the global block: 64 / 16
    assert image.shape[1] % 16
    assert image.shape[2] % 16
    fixed = example_image(graph_of(made, "backbone", (30, 40)), torch.float32)
    assert fixed.shape == (3, 30, 40)
    assert fixed.dtype == torch.float32


def test_refused_models() -> None:
    made = model("mask")
    heads = made.roi_heads
    made.roi_heads = Res5ROIHeads.__new__(Res5ROIHeads)
    nn.Module.__init__(made.roi_heads)
    with pytest.raises(InputError, match=r"ROI heads to export: .*got Res5ROIHeads.*backbone"):
        graph_of(made, "detector")
    made.roi_heads = heads
    heads.box_predictor.test_topk_per_image = -1
    with pytest.raises(InputError, match="expected a limit, got -1"):
        graph_of(made, "detector")
    with pytest.raises(InputError, match=r"--size: expected at most 64 x 64 .*square_pad=0"):
        graph_of(made, "backbone", (65, 64))
    with pytest.raises(InputError, match="model to export: expected a detector with a backbone"):
        graph_of(nn.Linear(2, 2), "backbone")
