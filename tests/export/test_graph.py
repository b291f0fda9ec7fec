"""The wrapper finds what the models find, before any exporter, and its parts are detectron2's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.modeling.roi_heads import Res5ROIHeads, fast_rcnn
from torch import nn
from torchvision.ops import batched_nms

from tests.export.tiny_models import KINDS, images, model
from vitdet import heads, postprocess
from vitdet.export import graph as graphs
from vitdet.export.graph import Detector, Features, Graph, example_image, exportable, graph_of
from vitdet.export.parity import compare
from vitdet.utils.checks import InputError


@contextmanager
def running(graph: Graph) -> Iterator[nn.Module]:
    """Give what an export follows."""
    with exportable(graph), torch.no_grad():
        yield graph


def boxes(count: int, seed: int = 0, side: float = 60.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * side], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_detector(kind: str) -> None:
    """Detections are those of the model's own code, on images of several sizes."""
    made: Any = model(kind)
    graph = graph_of(made, "detector")

    def run(image: torch.Tensor) -> list[torch.Tensor]:
        with running(graph):
            return list(graph(image))

    report = compare(made, graph, run, images())
    assert report.faults == []
    assert report.matched == report.detections > 10
    assert report.at_the_edge == report.extra == 0
    assert report.box < 1e-4
    assert report.score < 1e-6
    assert report.mask_iou > 0.999


@pytest.mark.parametrize("masks", ["boxes", "none"])
def test_kinds_of_masks(masks: str) -> None:
    made: Any = model("mask")
    graph = graph_of(made, "detector", masks=masks)
    report = compare(made, graph, lambda image: list(graph(image)), images())
    assert report.faults == []
    found = graph(images()[0])
    assert len(found) == len(graph.outputs) == (4 if masks == "boxes" else 3)
    if masks == "boxes":
        assert found[3].shape == (len(found[0]), 8, 8)


@pytest.mark.parametrize("kind", ["mask", "soft", "dense"])
def test_no_detection(kind: str) -> None:
    """Nothing above the threshold: empty outputs of the right shapes."""
    made: Any = model(kind)
    scores: Any = made if kind == "dense" else made.roi_heads.box_predictor
    scores.test_score_thresh = 1.0
    with running(graph_of(made, "detector")) as graph:
        found, scores, classes, *masks = graph(images()[1])
    assert found.shape == (0, 4)
    assert scores.shape == classes.shape == (0,)
    assert [each.shape for each in masks] == [(0, 50, 64)] * (kind != "dense")


def test_backbone_and_sizes() -> None:
    """The levels are the model's; another size, or one beyond the square, stops."""
    made: Any = model("no_square")
    graph = graph_of(made, "backbone")
    assert graph.outputs == ("p2", "p3", "p4", "p5", "p6")
    report = compare(made, graph, lambda image: list(graph(image)), images())
    assert report.faults == []
    assert report.feature < 1e-6
    assert report.feature_size > 0.1
    fixed = Detector(made, (50, 64))
    assert fixed(images()[1])[0].shape[1] == 4
    with pytest.raises(RuntimeError, match="expanded size"):
        fixed(images()[0])
    with pytest.raises(RuntimeError, match="expanded size"):
        Detector(model("mask"))(torch.zeros(3, 65, 10, dtype=torch.uint8))


def test_all_comes_back() -> None:
    """Kernels and functions are replaced for an export only, whatever happens in it."""
    graph: Any = graph_of(model("mask"), "detector")
    blocks = graph.model.backbone.net.blocks

    def fails() -> None:
        with exportable(graph):
            assert {block.attn.backend for block in blocks} == {"eager"}
            assert heads.soft_nms is not postprocess.soft_nms
            raise ZeroDivisionError

    before = (fast_rcnn.batched_nms, fast_rcnn.FastRCNNOutputLayers.predict_boxes)
    with pytest.raises(ZeroDivisionError):
        fails()
    assert [block.attn.backend for block in blocks] == ["auto"] * 2
    assert heads.soft_nms is postprocess.soft_nms
    assert (fast_rcnn.batched_nms, fast_rcnn.FastRCNNOutputLayers.predict_boxes) == before


def test_example_shows_the_general_case() -> None:
    """Its tokens do not divide by a window, and are no position table's."""
    made: Any = model("no_square", scale_factors=(4.0, 2.0, 1.0), top_block=None)
    for block, window in zip(made.backbone.net.blocks, (7, 0), strict=True):
        block.window_size = window
    image = example_image(Features(made))
    height, width = (-(-side // 16) for side in image.shape[1:])
    assert height % 7
    assert width % 7
    assert height != width
    assert 4 not in (height, width)  # the table of the global block: 64 / 16
    assert image.shape[1] % 16
    assert image.shape[2] % 16
    fixed = example_image(Features(made, (30, 40)))
    assert fixed.shape == (3, 30, 40)
    assert fixed.dtype == torch.uint8


def test_refused_models() -> None:
    made: Any = model("mask")
    own = made.roi_heads
    made.roi_heads = Res5ROIHeads.__new__(Res5ROIHeads)
    nn.Module.__init__(made.roi_heads)
    with pytest.raises(InputError, match=r"its ROI heads are Res5ROIHeads.* --part backbone"):
        graph_of(made, "detector")
    made.roi_heads = own
    own.box_predictor.test_topk_per_image = -1
    with pytest.raises(InputError, match="a limit of detections an image is needed"):
        graph_of(made, "detector")
    with pytest.raises(InputError, match=r"--size 65 64: at most 64 x 64 .*square_pad=0"):
        graph_of(made, "backbone", (65, 64))
    with pytest.raises(InputError, match=r"a detector with a backbone is needed, not .*Linear"):
        graph_of(nn.Linear(2, 2), "backbone")


def test_paste() -> None:
    """The same pixels as detectron2, where rounding does not decide; also beyond the image."""
    generator = torch.Generator().manual_seed(1)
    masks, where = torch.rand(20, 28, 28, generator=generator), boxes(20) - 10
    expected = paste_masks_in_image(masks, where, (70, 90))
    got = graphs.paste(masks, where, (70, 90))
    assert got.dtype == torch.bool
    assert got.shape == expected.shape
    assert int((got != expected).sum()) <= 2
    assert expected.any(2).any(1).all()


def test_nms_of_many_classes() -> None:
    """As exact with 1203 classes as class by class; boxes may be outside the image."""
    where, scores = boxes(300) - 40, torch.rand(300, generator=torch.Generator().manual_seed(3))
    classes = torch.arange(300) % 1203
    got = graphs._batched_nms(where, scores, classes, 0.5, groups=1203)
    assert torch.equal(got, batched_nms(where.double(), scores.double(), classes, 0.5))
    moved = graphs._apart(where, classes + 903, 1203) - where
    assert float(moved.max()) < 6000  # in a row it would be 180,000
    assert len(graphs._batched_nms(where[:0], scores[:0], classes[:0], 0.5, groups=3)) == 0


@pytest.mark.parametrize("by_class", [False, True], ids=["", "by_class"])
@pytest.mark.parametrize("method", ["linear", "gaussian", "hard"])
def test_soft_nms(method: str, by_class: bool) -> None:
    """The first places and scores are those of the project's own, also of fewer than may be."""
    where, scores = boxes(60), torch.rand(60, generator=torch.Generator().manual_seed(4))
    classes = torch.arange(60) % 3 if by_class else None
    rules: Any = {"method": method, "iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.2}
    expected, new = postprocess.soft_nms(where, scores, classes, **rules)
    for most in (5, 100):
        places, got = graphs._soft_nms(where, scores, classes, **rules, most=most)
        assert len(places) == min(most, len(expected)) >= 5
        assert torch.equal(places, expected[:most])
        torch.testing.assert_close(got, new[:most])
