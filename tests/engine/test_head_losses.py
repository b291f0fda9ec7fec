"""Heads on a whole batch against the same heads on one image at a time."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
)
from detectron2.utils.events import EventStorage
from tiny_recipe import detector_node, draw
from torch import nn

from vitdet.config import build_model
from vitdet.engine import losses
from vitdet.engine.head_losses import can_batch
from vitdet.utils.env import seed_all


def mask_rcnn() -> nn.Module:
    seed_all(0)
    return build_model(detector_node()).train()


def cascade() -> nn.Module:
    """Three stages with class-agnostic boxes and a federated loss that draws one of two classes."""
    detector = mask_rcnn()
    heads = detector.roi_heads
    weights = [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    detector.roi_heads = CascadeROIHeads(
        num_classes=2,
        batch_size_per_image=16,
        positive_fraction=0.25,
        box_in_features=heads.box_in_features,
        box_pooler=heads.box_pooler,
        box_heads=[
            FastRCNNConvFCHead(ShapeSpec(channels=32, height=4, width=4), conv_dims=[], fc_dims=[8])
            for _ in weights
        ],
        box_predictors=[
            FastRCNNOutputLayers(
                ShapeSpec(channels=8),
                box2box_transform=Box2BoxTransform(weights=each),
                num_classes=2,
                cls_agnostic_bbox_reg=True,
                use_sigmoid_ce=True,
                use_fed_loss=True,
                get_fed_loss_cls_weights=lambda: torch.ones(2),
                fed_loss_num_classes=1,
            )
            for each in weights
        ],
        proposal_matchers=[
            Matcher([at], [0, 1], allow_low_quality_matches=False) for at in (0.3, 0.4, 0.5)
        ],
        mask_in_features=heads.mask_in_features,
        mask_pooler=heads.mask_pooler,
        mask_head=heads.mask_head,
    )
    return detector.train()


def batch() -> list[dict]:
    records = [draw(position) for position in range(4)]
    records[2]["instances"] = records[2]["instances"][[]]  # an image without objects
    return records


@pytest.mark.parametrize(("make", "names"), [(mask_rcnn, 5), (cascade, 9)])
def test_a_batch_gives_the_mean_of_its_images(make, names, monkeypatch):
    results = []
    for batched in (True, False):
        detector = make()
        assert can_batch(detector)
        if not batched:
            monkeypatch.setattr(losses, "can_batch", lambda _: False)
        with EventStorage(0) as storage:
            found = losses.DetectorLoss(detector, seed=5)(batch())
        torch.stack(list(found.values())).sum().backward()
        gradients = {n: p.grad for n, p in detector.named_parameters() if p.grad is not None}
        results.append((found, gradients, set(storage.latest())))
    (ours, ours_grad, ours_logged), (theirs, theirs_grad, theirs_logged) = results
    assert len(ours) == names
    assert {n: v.item() for n, v in ours.items()} == pytest.approx(
        {n: v.item() for n, v in theirs.items()}, abs=1e-6
    )
    assert ours_grad.keys() == theirs_grad.keys()
    for name, gradient in theirs_grad.items():
        torch.testing.assert_close(ours_grad[name], gradient, rtol=1e-4, atol=1e-6)
    assert ours_logged == theirs_logged


def test_heads_with_parts_of_their_own_go_image_by_image():
    class OwnPredictor(FastRCNNOutputLayers):
        pass

    detector = mask_rcnn()
    assert can_batch(detector)
    detector.roi_heads.box_predictor.__class__ = OwnPredictor
    assert not can_batch(detector)
    detector = mask_rcnn()
    detector.roi_heads.train_on_pred_boxes = True
    assert not can_batch(detector)
