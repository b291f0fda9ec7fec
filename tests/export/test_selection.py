"""Selection without branches equals detectron2's and this project's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torchvision.ops import batched_nms

from tests.export.tiny_models import coarse_pooler
from vitdet.export import selection
from vitdet.export.selection import NEVER
from vitdet.postprocess import soft_nms


def boxes(count: int, seed: int = 0, side: float = 60.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * side], 1)


def test_paste() -> None:
    """The same pixels as detectron2, where rounding does not decide; also beyond the image."""
    generator = torch.Generator().manual_seed(1)
    masks, where = torch.rand(20, 28, 28, generator=generator), boxes(20) - 10
    expected = paste_masks_in_image(masks, where, (70, 90))
    got = selection.paste(masks, where, (70, 90))
    assert got.dtype == torch.bool
    assert got.shape == expected.shape
    assert int((got != expected).sum()) <= 2
    assert expected.any(2).any(1).all()


@pytest.mark.parametrize("levels", [1, 4])
def test_pool(levels: int) -> None:
    """Boxes go to the same levels and come back in their order; none of a level is no matter."""
    strides = (4, 8, 16, 32)
    pooler = coarse_pooler()
    if levels > 1:
        scales = [1 / stride for stride in strides]
        pooler = ROIPooler(4, scales, sampling_ratio=0, pooler_type="ROIAlignV2")
    generator = torch.Generator().manual_seed(2)
    maps = [torch.randn(1, 5, 512 // s, 512 // s, generator=generator) for s in strides[:levels]]
    where = torch.cat([boxes(5), boxes(5, side=200.0), boxes(5, side=30.0)])
    where[3] = 0.0  # without area
    torch.testing.assert_close(selection.pool(pooler, maps, where), pooler(maps, [Boxes(where)]))


def test_apart_equals_nms_by_class() -> None:
    where, scores = boxes(300), torch.rand(300, generator=torch.Generator().manual_seed(3))
    classes = torch.arange(300) % 1203
    moved = selection.apart(where, classes, 1203, (130, 130))
    got = selection.hard_nms(moved, scores, 0.5)
    kept = batched_nms(where.double(), scores.double(), classes, 0.5)
    assert torch.equal((got > NEVER).nonzero()[:, 0], kept.sort().values)
    assert torch.equal(got[kept], scores[kept])


@pytest.mark.parametrize("method", ["linear", "gaussian", "hard"])
def test_soft_nms(method: str) -> None:
    """The first places and scores are those of the project's own, fillers come last."""
    where, scores = boxes(60), torch.rand(60, generator=torch.Generator().manual_seed(4))
    heads = SimpleNamespace(method=method, iou_threshold=0.3, sigma=0.5, min_score=0.2)
    rules = {"method": method, "iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.2}
    expected, new = soft_nms(where, scores, **rules)
    filled = torch.cat([where, torch.zeros(50, 4)])
    places, got = selection.soft_nms(
        filled, torch.cat([scores, torch.full((50,), NEVER)]), heads, 50
    )
    count = int((got > NEVER).sum())
    assert count == min(50, len(expected)) > 5
    assert torch.equal(places[:count], expected[:count])
    torch.testing.assert_close(got[:count], new[:count])
    assert (got[count:] == NEVER).all()


def test_above_fills_up() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    where, found, classes = selection.above(boxes(2), scores, 0.5, 3)
    assert torch.equal(found, torch.tensor([0.9, 0.8, NEVER, NEVER, NEVER]))
    assert classes.tolist() == [1, 0, 0, 0, 0]
    assert torch.equal(where[:2], boxes(2))
    assert torch.equal(where[2:], torch.zeros(3, 4))
