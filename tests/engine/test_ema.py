"""The moving average of the weights: its values, its way through a run, its names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import ranks
from pair import in_pair
from test_run import assert_same, numbers, stop_after
from tiny_recipe import recipe
from torch import nn

from vitdet import checkpoint
from vitdet.engine.ema import Ema
from vitdet.engine.run import evaluate, train
from vitdet.engine.trainer import NonFiniteLossError, Trainer
from vitdet.utils.checks import InputError

DECAY = 0.75


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.full((2,), 0.1), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("batches", torch.tensor(0))


def test_average_by_hand():
    model = Model()
    model.weight.data.fill_(8.0)
    ema = Ema(model, DECAY)
    for step in (1, 2):
        model.weight.data.mul_(0.5)
        model.mean.add_(1.0)
        model.batches.add_(1)
        ema.update()
        assert int(ema.state["batches"]) == step
    # 0.75 * 8 + 0.25 * 4 = 7; 0.75 * 7 + 0.25 * 2 = 5.75
    assert ema.state["weight"].tolist() == [5.75, 5.75]
    # 0.25; 0.75 * 0.25 + 0.25 * 2
    assert ema.state["mean"].tolist() == [0.6875, 0.6875]
    assert torch.equal(ema.state["frozen"], model.frozen)
    assert model.weight.tolist() == [2.0, 2.0]


def test_average_equals_its_closed_form_over_many_steps():
    model, steps, decay = Model(), 50, 0.9
    ema = Ema(model, decay)
    history = torch.randn(steps, 2, generator=torch.Generator().manual_seed(0))
    for row in history:
        model.weight.data.copy_(row)
        ema.update()
    factors = (1 - decay) * decay ** torch.arange(steps - 1, -1, -1.0, dtype=torch.float64)
    torch.testing.assert_close(ema.state["weight"].double(), factors @ history.double())


def test_applied_within_the_block_only():
    model = Model()
    ema = Ema(model, DECAY)
    model.weight.data.fill_(1 / 3)
    model.batches.fill_(7)
    state = model.state_dict()
    parameter = model.weight
    with ema.applied():
        assert model.weight is parameter  # optimizer and DDP hold it
        assert model.weight.tolist() == [0.0, 0.0]
        assert int(model.batches) == 0
    assert_same(model.state_dict(), state)
    assert model.weight.tolist() == [torch.tensor(1 / 3).item()] * 2
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert model.weight.tolist() == [torch.tensor(1 / 3).item()] * 2
    assert ema.state["weight"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_outside_its_range(decay):
    with pytest.raises(
        InputError, match=rf"train\.ema_decay: expected 0 <= decay < 1.*got {decay}"
    ):
        Ema(Model(), decay)


# --- in a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a whole run: 6 steps of 4 images, a checkpoint every 8 images."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(recipe(folder, checkpoint_every=8, eval_every=16, ema_decay=DECAY))
    return folder


def test_the_file_holds_the_average_of_the_steps(undisturbed, tmp_path, monkeypatch):
    """Checked against weights that were written down after every step of a second run."""
    history: list[dict[str, torch.Tensor]] = []
    original = Trainer.step

    def step(self: Trainer, batch: list) -> None:
        if not history:
            history.append({k: v.clone() for k, v in self.detector.state_dict().items()})
        original(self, batch)
        history.append({k: v.clone() for k, v in self.detector.state_dict().items()})

    monkeypatch.setattr(Trainer, "step", step)
    train(recipe(tmp_path / "again"))
    content = checkpoint.read(undisturbed / "model_final.pth")
    assert_same(content["model"], history[-1])
    assert content["ema_state"].keys() == content["model"].keys()
    for name, average in content["ema_state"].items():
        expected = history[0][name].double()
        for weights in history[1:]:
            expected = DECAY * expected + (1 - DECAY) * weights[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    moved = content["ema_state"]["roi_heads.box_head.fc1.weight"]
    assert not torch.equal(moved, content["model"]["roi_heads.box_head.fc1.weight"])


def test_both_have_their_own_numbers_and_neither_those_of_the_other(undisturbed, tmp_path):
    """In the published code the results of the average take the place of the others."""
    train(recipe(tmp_path / "without", checkpoint_every=8, eval_every=16))
    stored = json.loads((undisturbed / "results.json").read_text())["results"]
    plain = json.loads((tmp_path / "without" / "results.json").read_text())["results"]
    assert stored.keys() == {"bbox", "ema/bbox"}
    assert stored["bbox"] == plain["bbox"]
    assert stored["ema/bbox"]["AP"] == 6.0
    assert stored["ema/bbox"]["AP50"] != stored["bbox"]["AP50"]
    for line, other in zip(numbers(undisturbed), numbers(tmp_path / "without"), strict=True):
        averaged = {key for key in line if key.startswith("ema/")}
        assert {key: value for key, value in line.items() if key not in averaged} == other
        assert averaged == ({"ema/bbox/AP", "ema/bbox/AP50"} if "bbox/AP" in line else set())
    log = (undisturbed / "log.txt").read_text()
    assert "\n    bbox    6.00" in log
    assert "\n ema/bbox    6.00" in log


def test_evaluation_does_not_touch_the_average_or_the_weights(undisturbed, tmp_path):
    """The published hook asks a bound method, always true, whether the model is training."""
    train(recipe(tmp_path / "quiet", ema_decay=DECAY))  # no evaluation in between
    quiet, often = (
        checkpoint.read(folder / "model_final.pth") for folder in (tmp_path / "quiet", undisturbed)
    )
    for key in ("model", "ema_state", "optimizer"):
        assert_same(quiet[key], often[key], key)


@pytest.mark.parametrize("steps", [3, 4])  # in the middle of a period, and right after a checkpoint
def test_a_resumed_run_ends_with_the_same_bits(undisturbed, tmp_path, monkeypatch, steps):
    options = dict(checkpoint_every=8, eval_every=16, ema_decay=DECAY)
    stop_after(monkeypatch, steps)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path / "run", **options))
    results = train(recipe(tmp_path / "run", **options), resume=True)
    whole = checkpoint.read(undisturbed / "model_final.pth")
    resumed = checkpoint.read(tmp_path / "run" / "model_final.pth")
    for key in ("model", "ema_state", "optimizer", "images_seen"):
        assert_same(resumed[key], whole[key], key)
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    stored = json.loads((undisturbed / "results.json").read_text())["results"]
    assert results["ema/bbox"]["AP50"] == stored["ema/bbox"]["AP50"]


def test_the_average_begins_with_the_weights_that_the_run_begins_with(undisturbed, tmp_path):
    start = undisturbed / "model_000000016.pth"
    train(recipe(tmp_path, num_images=4, init_checkpoint=str(start), ema_decay=0.5))
    before = checkpoint.read(start)["model"]
    after = checkpoint.read(tmp_path / "model_final.pth")
    for name, average in after["ema_state"].items():
        expected = (before[name] + after["model"][name]) / 2
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize(("which", "name"), [("model", "bbox"), ("ema", "ema/bbox")])
def test_evaluation_alone_takes_the_weights_that_it_is_told(undisturbed, tmp_path, which, name):
    stored = json.loads((undisturbed / "results.json").read_text())["results"]
    start = str(undisturbed / "model_final.pth")
    results = evaluate(recipe(tmp_path / "out", init_checkpoint=start, eval_weights=which))
    assert results.keys() == {name}
    assert results[name]["AP50"] == stored[name]["AP50"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert written == {name: stored[name]}


def test_evaluation_of_an_average_that_is_not_there(undisturbed, tmp_path):
    content = checkpoint.read(undisturbed / "model_final.pth")
    del content["ema_state"]
    checkpoint.write(tmp_path / "plain.pth", content)
    cfg = recipe(tmp_path / "out", init_checkpoint=str(tmp_path / "plain.pth"), eval_weights="ema")
    with pytest.raises(
        InputError,
        match=r'plain\.pth: expected a moving average of the weights \("ema_state"\).*got only the '
        r"keys model, optimizer.*train\.eval_weights=model",
    ):
        evaluate(cfg)
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_or_without_average_as_it_began(undisturbed, tmp_path):
    for first, second, message in (
        (DECAY, None, r"expected the run's: the file holds an average of the weights, got null"),
        (None, DECAY, r"expected null: the file holds no average of the weights, got 0\.75"),
    ):
        folder = tmp_path / str(first)
        train(recipe(folder, num_images=4, ema_decay=first))
        before = (folder / "model_final.pth").read_bytes()
        with pytest.raises(InputError, match=r"train\.ema_decay for resuming .*" + message):
            train(recipe(folder, num_images=8, ema_decay=second), resume=True)
        assert (folder / "model_final.pth").read_bytes() == before


def test_a_wrong_name_for_the_weights(tmp_path):
    with pytest.raises(InputError, match=r"train\.eval_weights: expected model or ema, got best"):
        train(recipe(tmp_path / "out", eval_weights="best"))


def test_recipes_may_leave_both_keys_out(tmp_path):
    cfg = recipe(tmp_path, num_images=4)
    del cfg.train["ema_decay"], cfg.train["eval_weights"]
    assert train(cfg).keys() == {"bbox"}
    assert "ema_state" not in checkpoint.read(tmp_path / "model_final.pth")


def test_an_average_that_is_not_finite_is_not_saved():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model, optimizer, lambda _: 1.0, ema_decay=DECAY)
    trainer.check_weights()
    trainer.ema.state["weight"].fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"1 tensors that are not \(ema_state\.weight"):
        trainer.check_weights()


@pytest.mark.slow
def test_two_processes_have_the_average_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    ranks.train_even_batches(str(one), ema_decay=DECAY)
    in_pair(ranks.train_with_average, str(two), DECAY)
    ours, theirs = (checkpoint.read(folder / "model_final.pth") for folder in (one, two))
    for name, average in ours["ema_state"].items():
        torch.testing.assert_close(theirs["ema_state"][name], average, rtol=0, atol=1e-6, msg=name)
    ranks = [torch.load(two / f"ema{rank}.pth") for rank in range(2)]
    assert_same(ranks[0], ranks[1])
    assert_same(ranks[0], dict(theirs["ema_state"]))
