"""Gradient accumulation: the step, its losses and its weights are those of the whole batch."""

from __future__ import annotations

import logging

import pytest
import ranks
import torch
from pair import in_pair
from test_run import numbers
from test_variants import VARIANTS
from tiny_recipe import detector_node, draw, recipe
from torch import nn

from vitdet import checkpoint
from vitdet.config import build_model
from vitdet.engine.losses import DetectorLoss, cut
from vitdet.engine.run import train
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError
from vitdet.utils.env import seed_all


def one_step(accumulate: int) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """A step of 4 images without moving; the trainer and the gradient that it left."""
    seed_all(0)
    detector = build_model(detector_node())
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.0)
    trainer = Trainer(detector, optimizer, lambda _: 1.0, accumulate=accumulate)
    trainer.run(iter([[draw(position) for position in range(4)]]), 4)
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    return trainer, gradients


@pytest.mark.parametrize("accumulate", [2, 4])
def test_the_gradient_is_that_of_the_whole_batch(accumulate):
    trainer, gradients = one_step(1)
    other, parts = one_step(accumulate)
    assert parts.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6, msg=name)
    (step,), (other_step,) = trainer.window.steps, other.window.steps
    assert other_step.names == step.names
    assert other_step.files == step.files == [f"rectangle_{n}.jpg (id {n})" for n in range(4)]
    torch.testing.assert_close(other_step.losses, step.losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(other_step.grad_norm, step.grad_norm, rtol=1e-5, atol=0)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(step.grad_norm, norm)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_run_has_the_weights_and_the_losses_of_whole_batches(tmp_path, accumulate):
    ranks.train_even_batches(str(tmp_path / "whole"))
    ranks.train_even_batches(str(tmp_path / "parts"), accumulate=accumulate)
    whole, parts = (
        checkpoint.read(tmp_path / name / "model_final.pth")["model"] for name in ("whole", "parts")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-6, msg=name)
    for line, other in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "parts"), strict=True):
        losses = {name: value for name, value in line.items() if name.startswith("loss_")}
        assert {name: other.get(name) for name in losses} == pytest.approx(losses, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_parts_in_two_processes_have_the_weights_of_one_batch(tmp_path, parallel):
    ranks.train_even_batches(str(tmp_path / "whole"))
    in_pair(ranks.train_in_parts, str(tmp_path / "parts"), 2, parallel)
    whole, parts = (
        checkpoint.read(tmp_path / name / "model_final.pth")["model"] for name in ("whole", "parts")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_gradients_travel_with_the_last_part_only(tmp_path):
    in_pair(ranks.count_reductions, str(tmp_path))
    counts = [(tmp_path / f"rank{rank}.txt").read_text().split() for rank in range(2)]
    once, twice = counts[0]
    assert counts[1] == counts[0]
    assert int(once) > 0
    assert twice == once


def test_a_batch_is_cut_in_order():
    batch = [{"position": position} for position in range(4)]
    assert cut(batch, 2) == [batch[:2], batch[2:]]
    assert cut(batch, 1) == [batch]


def test_a_part_must_be_a_divisor(tmp_path):
    with pytest.raises(
        InputError,
        match=r"total_batch_size: expected a multiple of the 1 processes times "
        r"train\.accumulate=3, got 4\. Change it",
    ):
        train(recipe(tmp_path / "out", accumulate=3))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"train\.accumulate: expected a divisor of 4, .*, got 3"):
        cut([{}] * 4, 3)


class WholeBatch(nn.Module):
    """Stands for RetinaNet, FCOS and PanopticFPN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def test_a_detector_that_normalises_over_the_batch_is_refused():
    loss = DetectorLoss(WholeBatch())
    loss.check_parts(1)
    with pytest.raises(
        InputError,
        match=r"train\.accumulate: expected 1 for WholeBatch, whose losses are normalised by all "
        r"images of a pass: .*, got 2\. Lower the batch",
    ):
        loss.check_parts(2)


def test_no_part_at_all():
    with pytest.raises(InputError, match=r"train\.accumulate: expected 1 or more, got 0"):
        DetectorLoss(build_model(detector_node())).check_parts(0)


def test_batchnorm_and_unequal_padding_are_told(caplog):
    node = detector_node()
    VARIANTS["basic with BatchNorm"](node)
    node.backbone.square_pad = 0
    with caplog.at_level(logging.WARNING):
        DetectorLoss(build_model(node)).check_parts(2)
    norms, padding = (each.getMessage() for each in caplog.records)
    assert "train.accumulate=2: backbone.net.blocks.0.residual." in norms
    assert "normalises over the images of a part" in norms
    assert "square_pad is 0" in padding
    caplog.clear()
    DetectorLoss(build_model(detector_node())).check_parts(2)
    assert caplog.records == []


def test_half_the_images_at_a_time_keep_half_as_much():
    """What autograd keeps for the backward pass, as far as it grows with the images."""
    kept = {}
    for accumulate in (1, 2):
        trainer, _ = one_step(accumulate)
        forward, sizes = trainer.detector_loss.forward, []

        def counted(part: list, forward=forward, sizes=sizes) -> dict[str, torch.Tensor]:
            sizes.append(0)

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                sizes[-1] += tensor.nbytes if tensor.shape[:1] == (len(part),) else 0
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(part)

        trainer.detector_loss.forward = counted
        trainer.run(iter([[draw(position) for position in range(4)]]), 8)
        assert len(sizes) == accumulate
        kept[accumulate] = max(sizes)
    assert kept[2] == pytest.approx(kept[1] / 2, rel=0.01)
