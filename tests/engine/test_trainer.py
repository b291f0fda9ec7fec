"""The step and the loop: rates, random numbers, clipping, precision, and batches in parts."""

import math
import re

import pytest
import ranks
import torch
from pair import in_pair
from test_variants import VARIANTS
from tiny_recipe import detector_node, draw, tiny_detector
from torch import nn

from vitdet import checkpoint
from vitdet.config import build_model
from vitdet.engine.losses import DetectorLoss
from vitdet.engine.trainer import HeadStatistics, Hook, NonFiniteLossError, Trainer
from vitdet.optim import adamw
from vitdet.utils.checks import InputError
from vitdet.utils.precision import autocast_dtype


class Noisy(nn.Module):
    """Two losses of one weight vector; one depends on torch's random numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.head = nn.Parameter(torch.ones(2))
        self.fault = None

    def forward(self, batch):
        if self.fault is not None:
            raise self.fault
        scale = torch.tensor([record["value"] for record in batch]).mean()
        noise = torch.rand(8)
        return {
            "loss_a": (self.weight * noise).sum() * scale,
            "loss_b": (self.head**2).sum() + 0 * self.weight.sum(),
        }


def batch_of(*values):
    return [{"value": v, "file_name": f"image_{v:g}.jpg"} for v in values]


def make_trainer(lr=0.1, **options):
    detector = Noisy()
    groups = [{"params": [detector.weight], "lr": lr / 10}, {"params": [detector.head], "lr": lr}]
    optimizer = torch.optim.SGD(groups, lr=lr)
    return Trainer(detector, optimizer, lambda images: 1 + images / 10, **options)


def real_trainer(lr, **options):
    detector = tiny_detector()
    optimizer = torch.optim.SGD(detector.parameters(), lr=lr)
    return Trainer(detector, optimizer, lambda _: 1.0, **options)


def test_rates_follow_the_images_seen_and_hooks_come_after_every_step():
    seen = []

    class Recorder(Hook):
        def after_step(self, trainer):
            seen.append((trainer.images_seen, [g["lr"] for g in trainer.optimizer.param_groups]))

        def after_train(self, trainer):
            seen.append("end")

    make_trainer().run(iter([batch_of(1.0, 2.0)] * 9), 5, [Recorder()])
    assert seen.pop() == "end"
    assert [images for images, _ in seen] == [2, 4, 6]
    assert [rates[0] for _, rates in seen] == pytest.approx([0.01, 0.012, 0.014])
    assert [rates[1] for _, rates in seen] == pytest.approx([0.1, 0.12, 0.14])


def adam_trainer(names):
    """Parameters of one shape in two groups, in the order of the names."""
    detector = Noisy()
    for name in names:
        detector.register_parameter(name, nn.Parameter(torch.full((2,), float(ord(name[0])))))
    return Trainer(detector, adamw(detector, no_decay=["b", "d"]), lambda _: 1.0)


def test_moments_follow_the_names_whatever_the_order_of_the_modules_was(tmp_path):
    then, now = adam_trainer(["a", "b", "c", "d"]), adam_trainer(["d", "c", "b", "a"])
    for name, parameter in then.detector.named_parameters():
        parameter.grad = torch.full_like(parameter, float(ord(name[0])))
    then.optimizer.step()
    checkpoint.write(tmp_path / "then.pth", then.state_dict())
    now.load_state_dict(checkpoint.read(tmp_path / "then.pth"), source="then.pth")
    for name, parameter in now.detector.named_parameters():
        mine, wanted = now.optimizer.state[parameter], 0.1 * ord(name[0])
        assert mine["exp_avg"].unique().item() == pytest.approx(wanted), name
        assert mine["step"] == 1
    state = then.state_dict()
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"exp_avg of weight has the shape \(3,\)"):
        adam_trainer(["a", "b", "c", "d"]).load_state_dict(state, source="then.pth")
    own = adam_trainer(["d", "c", "b", "a"])
    own.optimizer.param_groups.reverse()
    with pytest.raises(InputError, match=r"in another order, and this optimizer has one of"):
        own.load_state_dict(then.state_dict(), source="then.pth")


def test_the_gradient_is_clipped_as_a_whole():
    trainer = make_trainer(lr=1.0, clip_grad_norm=0.5)
    for group in trainer.optimizer.param_groups:
        group["initial_lr"] = 1.0
    before = [p.detach().clone() for p in trainer.detector.parameters()]
    trainer.step(batch_of(100.0))
    pairs = zip(trainer.detector.parameters(), before, strict=True)
    moved = sum(((p - old) ** 2).sum() for p, old in pairs)
    assert math.sqrt(moved) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_with_weights_in_fp32(precision):
    trainer = real_trainer(0.01, precision=precision)
    name = "backbone.net.patch_embed.proj.weight"
    before = trainer.detector.get_parameter(name).detach().clone()
    trainer.run(iter([[draw(0), draw(1)], [draw(2), draw(3)]]), 4)
    losses = [step.losses for step in trainer.window.steps]
    assert all(values.isfinite().all() for values in losses)
    assert {p.dtype for p in trainer.detector.parameters()} == {losses[0].dtype} == {torch.float32}
    assert not torch.equal(trainer.detector.get_parameter(name), before)
    assert bool(trainer.state_dict()["scaler"]) == (precision == "fp16")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_takes_bf16_only_where_the_processor_has_it(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) is expected
    assert autocast_dtype("bf16", cpu) is torch.bfloat16  # what is asked for by name is done
    with pytest.raises(InputError, match=r"one of auto, bf16, fp16, fp32, got fp8\. auto"):
        autocast_dtype("fp8", cpu)


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
    trainer.detector.fault = FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
    text = r"contain Inf/NaN after 1 images at lr 0\.11 .* image_3"
    with pytest.raises(NonFiniteLossError, match=text):  # detectron2's own report
        trainer.step(batch_of(3.0))


def test_head_statistics_do_not_wait_for_the_device():
    with HeadStatistics() as statistics:
        # The value of a meta tensor cannot be had, so a conversion would raise.
        statistics.put_scalar("count", torch.empty((), device="meta"))
    assert set(statistics.latest_values) == {"count"}


def test_what_a_resume_does_not_change():
    old = make_trainer(lr=0.1)
    old.step(batch_of(1.0))
    new = make_trainer(lr=0.5)
    new.load_state_dict(old.state_dict(), source="x.pth")
    new.step(batch_of(1.0))
    assert new.optimizer.param_groups[1]["lr"] == pytest.approx(0.5 * 1.1)
    text = r"train\.seed for resuming x\.pth: expected 0, .*got 2\. Give that"
    with pytest.raises(InputError, match=text):
        make_trainer(seed=2).load_state_dict(old.state_dict(), source="x.pth")


# --- batches in parts ----------------------------------------------------------------------------


def one_step(accumulate):
    """A step of 4 images without moving; the trainer and the gradient that it left."""
    trainer = real_trainer(0.0, accumulate=accumulate)
    trainer.run(iter([[draw(position) for position in range(4)]]), 4)
    named = trainer.detector.named_parameters()
    return trainer, {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_step_in_parts_is_that_of_the_whole_batch(accumulate):
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


@pytest.mark.slow
def test_parts_have_the_weights_of_one_batch_also_in_two_processes(tmp_path):
    """Of sharded weights test_fsdp.py says it."""
    ranks.train_even_batches(str(tmp_path / "whole"))
    in_pair(ranks.train_even_batches, tmp_path / "parts", accumulate=2)
    folders = [tmp_path / "whole", tmp_path / "parts"]
    whole, parts = (checkpoint.read(folder / "model_final.pth")["model"] for folder in folders)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_gradients_travel_with_the_last_part_only(tmp_path):
    in_pair(ranks.count_reductions, str(tmp_path))
    counts = [(tmp_path / f"rank{rank}.txt").read_text().split() for rank in range(2)]
    once, twice = counts[0]
    assert counts[1] == counts[0]
    assert twice == once != "0"


def test_parts_that_do_not_add_up_are_refused_or_said(caplog):
    loss = DetectorLoss(Noisy())  # stands for RetinaNet, FCOS and PanopticFPN
    loss.check_parts(1)
    text = "expected 1 for it, got 2: Noisy's losses are normalised by all images of a pass"
    with pytest.raises(InputError, match=rf"train\.accumulate: {text}"):
        loss.check_parts(2)
    node = detector_node()
    DetectorLoss(build_model(node)).check_parts(2)
    assert caplog.records == []
    VARIANTS["basic with BatchNorm"](node)
    node.backbone.square_pad = 0
    DetectorLoss(build_model(node)).check_parts(2)
    (line,) = caplog.messages
    norm = r"train\.accumulate=2: backbone\.net\.blocks\.0\.residual\.\S+ and \S+square_pad=0 sees"
    assert re.match(norm, line)
