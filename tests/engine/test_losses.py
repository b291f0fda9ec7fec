"""Losses of a batch: those of its images, whatever else is in the batch, for every kind of head."""

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.events import EventStorage
from tiny_recipe import cascade, draw, tiny_detector
from torch import nn

from vitdet.engine.losses import DetectorLoss, by_image
from vitdet.utils.checks import InputError
from vitdet.utils.env import random_state, seed_from


def federated_cascade():
    """Three stages with class-agnostic boxes and a federated loss that draws one of two classes."""

    def change(node):
        node.roi_heads = cascade(node.roi_heads)

    detector = tiny_detector(change)
    for predictor in detector.roi_heads.box_predictor:
        predictor.use_sigmoid_ce = predictor.use_fed_loss = True
        predictor.fed_loss_num_classes = 1
        predictor.register_buffer("fed_loss_cls_weights", torch.ones(2))
    return detector


def four_images():
    records = [draw(position) for position in range(4)]
    records[2]["instances"] = records[2]["instances"][[]]  # an image without objects
    return records


class OneByOne(nn.Module):
    """detectron2's own losses of one image after the other, each under its own random state."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, batch):
        found = []
        for record in batch:
            with random_state(seed_from(5, record["position"])):
                found.append(self.detector([record]))
        return {name: sum(each[name] for each in found) / len(found) for name in found[0]}


def losses_and_gradients(loss, batches):
    """Mean losses, their gradient and what the heads report, of images cut into batches."""
    means = {}
    with EventStorage(0) as storage:
        for batch in batches:
            share = len(batch) / 4
            losses = loss(batch)
            (torch.stack(list(losses.values())).sum() * share).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + value.item() * share
        logged = set(storage.latest())
    gradients = {n: p.grad for n, p in loss.detector.named_parameters() if p.grad is not None}
    return means, gradients, logged


@pytest.mark.parametrize(("make", "names"), [(tiny_detector, 5), (federated_cascade, 9)])
def test_a_batch_gives_detectron2s_mean_over_its_images_however_it_is_cut(make, names):
    images = four_images()
    means, gradients, logged = losses_and_gradients(OneByOne(make()), [images])
    assert len(means) == names
    for sizes in ([4], [2, 2], [1, 1, 1, 1], [3, 1]):
        firsts = [sum(sizes[:place]) for place in range(len(sizes))]
        cut = [images[first : first + size] for first, size in zip(firsts, sizes, strict=True)]
        loss, before = DetectorLoss(make(), seed=5), torch.get_rng_state()
        found, ours, ours_logged = losses_and_gradients(loss, cut)
        assert torch.equal(torch.get_rng_state(), before)
        assert found == pytest.approx(means, abs=1e-6)
        assert ours_logged == logged
        assert ours.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def own_forward(detector):
    class OwnForward(GeneralizedRCNN):
        def forward(self, batched_inputs):
            return super().forward(batched_inputs)

    detector.__class__ = OwnForward


def own_predictor(detector):
    class OwnPredictor(FastRCNNOutputLayers):
        pass

    detector.roi_heads.box_predictor.__class__ = OwnPredictor


def boxes_of_the_predictor(detector):
    detector.roi_heads.train_on_pred_boxes = True


@pytest.mark.parametrize("change", [own_forward, own_predictor, boxes_of_the_predictor])
def test_detectors_of_another_kind_keep_detectron2s_normalisation(change):
    assert by_image(tiny_detector())
    results = []
    for make in (lambda detector: DetectorLoss(detector, seed=5), lambda detector: detector):
        detector = tiny_detector()
        change(detector)
        assert not by_image(detector)
        with EventStorage(0), random_state(1):
            results.append(make(detector)(four_images()))
    for name, value in results[1].items():
        assert torch.equal(results[0][name], value), name


def test_images_that_cannot_be_trained_on_are_named():
    detector, record = tiny_detector(), draw(0)
    del record["position"]
    with pytest.raises(
        InputError, match=r"training image rectangle_0\.jpg: expected a \"position\" .*, got only"
    ):
        DetectorLoss(detector)([record])
    detector.backbone.square_pad = 32
    text = r"image rectangle_0\.jpg: expected at most 32 x 32 .*, got 64 x 64\. Resize to less"
    with pytest.raises(InputError, match=text):
        DetectorLoss(detector)([draw(0)])
