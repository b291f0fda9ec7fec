from __future__ import annotations

import math

import pytest
import torch
from tiny_recipe import detector_node, draw
from torch import nn

from vitdet.config import build_model
from vitdet.engine.trainer import HeadStatistics, NonFiniteLossError, Trainer
from vitdet.utils.checks import InputError
from vitdet.utils.env import seed_all


class Noisy(nn.Module):
    """Two losses of one weight vector; one depends on torch's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.head = nn.Parameter(torch.ones(2))
        self.fault: Exception | None = None

    def forward(self, batch: list) -> dict[str, torch.Tensor]:
        if self.fault is not None:
            raise self.fault
        scale = torch.tensor([record["value"] for record in batch]).mean()
        noise = torch.rand(8)
        return {
            "loss_a": (self.weight * noise).sum() * scale,
            "loss_b": (self.head**2).sum() + 0 * self.weight.sum(),
        }


def batch_of(*values: float) -> list[dict]:
    return [{"value": v, "file_name": f"image_{v:g}.jpg"} for v in values]


def make_trainer(lr: float = 0.1, **options) -> Trainer:
    detector = Noisy()
    groups = [
        {"params": [detector.weight], "lr": lr / 10},
        {"params": [detector.head], "lr": lr},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr)
    return Trainer(detector, optimizer, lambda images: 1 + images / 10, **options)


def forever(*values: float):
    while True:
        yield batch_of(*values)


def test_learning_rates_follow_the_images_seen():
    trainer = make_trainer()
    seen = []
    for _ in range(3):
        trainer.step(batch_of(1.0, 2.0))
        seen.append([group["lr"] for group in trainer.optimizer.param_groups])
    assert trainer.images_seen == 6
    assert [group[0] for group in seen] == pytest.approx([0.01, 0.012, 0.014])
    assert [group[1] for group in seen] == pytest.approx([0.1, 0.12, 0.14])


def test_run_counts_images_and_calls_hooks_after_every_step():
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[object] = []

        def after_step(self, trainer: Trainer) -> None:
            self.calls.append(trainer.images_seen)

        def after_train(self, trainer: Trainer) -> None:
            self.calls.append("end")

    trainer, recorder = make_trainer(), Recorder()
    trainer.run(forever(1.0, 2.0), 5, [recorder])
    assert recorder.calls == [2, 4, 6, "end"]


def test_random_numbers_are_a_function_of_seed_and_images_seen():
    whole, parts = make_trainer(seed=4), make_trainer(seed=4)
    other_seed = make_trainer(seed=5)
    for _ in range(4):
        whole.step(batch_of(1.0))
        other_seed.step(batch_of(1.0))
    parts.step(batch_of(1.0))
    parts.step(batch_of(1.0))
    torch.rand(100)  # something else used random numbers meanwhile
    resumed = make_trainer(seed=4)
    resumed.detector.load_state_dict(parts.detector.state_dict())
    resumed.load_state_dict(parts.state_dict(), source="here")
    resumed.step(batch_of(1.0))
    resumed.step(batch_of(1.0))
    assert resumed.images_seen == 4
    assert torch.equal(resumed.detector.weight, whole.detector.weight)
    assert not torch.equal(other_seed.detector.weight, whole.detector.weight)


def test_the_gradient_is_clipped_as_a_whole():
    trainer = make_trainer(lr=1.0, clip_grad_norm=0.5)
    for group in trainer.optimizer.param_groups:
        group["initial_lr"] = 1.0
    before = [p.detach().clone() for p in trainer.detector.parameters()]
    trainer.step(batch_of(100.0))
    moved = sum(
        ((p - old) ** 2).sum() for p, old in zip(trainer.detector.parameters(), before, strict=True)
    )
    assert math.sqrt(moved) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_with_weights_in_fp32(precision):
    seed_all(0)
    detector = build_model(detector_node())
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    trainer = Trainer(detector, optimizer, lambda _: 1.0, precision=precision)
    trainer.run(iter([[draw(0), draw(1)], [draw(2), draw(3)]]), 4)
    losses = [step.losses for step in trainer.window.steps]
    assert all(values.isfinite().all() for values in losses)
    assert losses[0].dtype == torch.float32
    for name, parameter in detector.named_parameters():
        assert parameter.dtype == torch.float32, name
    moved = [name for name, p in detector.named_parameters() if not torch.equal(p, before[name])]
    assert "backbone.net.patch_embed.proj.weight" in moved
    assert bool(trainer.state_dict()["scaler"]) == (precision == "fp16")


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    trainer = make_trainer()
    trainer.step(batch_of(1.0))
    before = trainer.detector.weight.detach().clone()
    with pytest.raises(
        NonFiniteLossError,
        match=r"expected finite losses and weights, got loss_a=inf, loss_b=\d.* after 1 images "
        r"at lr 0\.11 with images image_2\.jpg, image_inf\.jpg\. Look at",
    ) as caught:
        trainer.step(batch_of(2.0, math.inf))
    assert "\n" not in str(caught.value)
    assert torch.equal(trainer.detector.weight, before)


def test_detectron2s_own_report_of_a_nan_gets_the_images_too():
    trainer = make_trainer()
    trainer.detector.fault = FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
    with pytest.raises(
        NonFiniteLossError,
        match=r"contain Inf/NaN \(the proposals are not finite\) after 0 images at lr 0\.1 with "
        r"images image_3",
    ):
        trainer.step(batch_of(3.0))


def test_head_statistics_do_not_wait_for_the_device():
    with HeadStatistics() as statistics:
        # The value of a meta tensor cannot be had, so a conversion would raise.
        statistics.put_scalar("count", torch.empty((), device="meta"))
        statistics.put_scalar("accuracy", 0.5, smoothing_hint=False)
    assert statistics.latest_values["accuracy"] == 0.5
    assert set(statistics.latest_values) == {"count", "accuracy"}


def test_resuming_with_another_seed_is_refused():
    state = make_trainer(seed=1).state_dict()
    with pytest.raises(
        InputError,
        match=r"train\.seed for resuming x\.pth: expected 1, .*got 2\. Add train\.seed=1",
    ):
        make_trainer(seed=2).load_state_dict(state, source="x.pth")


def test_resuming_with_another_optimizer_is_refused():
    state = make_trainer().state_dict()
    state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
    with pytest.raises(
        InputError,
        match=r"optimizer state in x\.pth: expected 2 parameters in 2 groups, got 1 in 1",
    ):
        make_trainer().load_state_dict(state, source="x.pth")


def test_learning_rates_of_the_config_hold_after_a_resume():
    old = make_trainer(lr=0.1)
    old.step(batch_of(1.0))
    new = make_trainer(lr=0.5)
    new.load_state_dict(old.state_dict(), source="x.pth")
    new.step(batch_of(1.0))
    assert new.optimizer.param_groups[1]["lr"] == pytest.approx(0.5 * 1.1)
