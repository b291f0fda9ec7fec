from __future__ import annotations

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from tiny_recipe import detector_node, draw
from torch import nn

from vitdet.config import build_model
from vitdet.engine.losses import DetectorLoss
from vitdet.utils.checks import InputError
from vitdet.utils.env import random_state, seed_all, seed_from


def make_detector(**options) -> nn.Module:
    seed_all(0)
    return build_model(detector_node(**options)).train()


def losses_and_gradients(
    batch_sizes: list[int],
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Mean losses and accumulated gradients of 4 images, cut into batches."""
    detector = make_detector()
    loss = DetectorLoss(detector, seed=5)
    means: dict[str, float] = {}
    position = 0
    with EventStorage(0):
        for size in batch_sizes:
            losses = loss([draw(position + index) for index in range(size)])
            position += size
            (torch.stack(list(losses.values())).sum() * size / 4).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + value.item() * size / 4
    return means, {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("batch_sizes", [[2, 2], [1, 1, 1, 1], [3, 1]])
def test_losses_and_gradients_do_not_depend_on_how_images_are_batched(batch_sizes):
    means, gradients = losses_and_gradients([4])
    other_means, other_gradients = losses_and_gradients(batch_sizes)
    assert set(means) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}
    assert other_means == pytest.approx(means, abs=1e-6)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_one_image_gives_the_losses_of_detectron2():
    detector = make_detector()
    record = draw(7)
    with EventStorage(0):
        ours = DetectorLoss(detector, seed=5)([record])
        with random_state(seed_from(5, 7)):
            theirs = detector([record])
    assert {name: value.item() for name, value in ours.items()} == {
        name: value.item() for name, value in theirs.items()
    }


def test_the_random_state_outside_is_left_alone():
    loss = DetectorLoss(make_detector(), seed=5)
    before = torch.get_rng_state()
    with EventStorage(0):
        loss([draw(0), draw(1)])
    assert torch.equal(torch.get_rng_state(), before)


def test_activation_checkpointing_with_stochastic_depth_gives_the_same_gradients():
    gradients = []
    for blocks in ((), (0, 1)):
        detector = make_detector(drop_path_rate=0.5, checkpoint_blocks=blocks)
        seed_all(11)
        with EventStorage(0):
            losses = DetectorLoss(detector, seed=5)([draw(0), draw(1)])
        torch.stack(list(losses.values())).sum().backward()
        gradients.append({n: p.grad for n, p in detector.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


def test_an_image_without_position_is_named():
    record = draw(0)
    del record["position"]
    with pytest.raises(
        InputError, match=r"training image rectangle_0\.jpg: expected a \"position\" .*, got only"
    ):
        DetectorLoss(make_detector())([record])


class WholeBatch(nn.Module):
    """Stands for RetinaNet and FCOS: normalises over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, batch: list) -> dict[str, torch.Tensor]:
        self.calls.append(len(batch))
        return {"loss_cls": torch.tensor(1.5)}


def test_other_meta_architectures_get_the_whole_batch():
    detector = WholeBatch()
    assert DetectorLoss(detector)([draw(0), draw(1)]) == {"loss_cls": torch.tensor(1.5)}
    assert detector.calls == [2]


def test_a_subclass_with_its_own_forward_gets_the_whole_batch():
    class OwnForward(GeneralizedRCNN):
        def forward(self, batched_inputs: list) -> dict[str, torch.Tensor]:
            return {"loss_own": torch.tensor(float(len(batched_inputs)))}

    detector = make_detector()
    detector.__class__ = OwnForward
    assert DetectorLoss(detector)([draw(0), draw(1)]) == {"loss_own": torch.tensor(2.0)}


def test_an_image_larger_than_the_square_is_named_instead_of_cut_off():
    detector = make_detector()
    detector.backbone.square_pad = 32
    record = {**draw(0), "file_name": "wide.jpg"}
    text = r"image wide\.jpg: expected at most 32 x 32 pixels .*, got 64 x 64\. Resize to less"
    with pytest.raises(InputError, match=text):
        DetectorLoss(detector)([record])
