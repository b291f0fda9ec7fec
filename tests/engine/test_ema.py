"""The moving average of the weights: its values, its way through a run, its names."""

import pytest
import torch
from test_run import assert_same, numbers, results_of
from tiny_recipe import recipe
from torch import nn

from vitdet import checkpoint
from vitdet.engine.parameters import Ema
from vitdet.engine.run import train
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError

DECAY = 0.75


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.full((2,), 0.1), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("batches", torch.tensor(0))


def test_average_by_hand_and_applied_within_the_block_only():
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
    model.weight.data.fill_(1 / 3)
    model.batches.fill_(7)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    parameter = model.weight
    with ema.applied():
        assert model.weight is parameter  # optimizer and DDP hold it
        assert model.weight.tolist() == [5.75, 5.75]
        assert int(model.batches) == 2
    assert_same(dict(model.state_dict()), own)
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert_same(dict(model.state_dict()), own)
    assert ema.state["weight"].tolist() == [5.75, 5.75]


@pytest.mark.slow
def test_a_run_averages_every_step_and_nothing_else_changes(tmp_path, monkeypatch):
    """Against weights written down after every step of a run without average and evaluations.

    In the published code the average's results take the place of the others, and the hook asks a
    bound method, always true, whether the model is training.
    """
    options = {"checkpoint_every": 8, "eval_every": 16}
    train(recipe(tmp_path / "with", **options, ema_decay=DECAY))
    train(recipe(tmp_path / "without", **options))
    history = []
    original = Trainer.step

    def step(self, batch):
        if not history:
            history.append({k: v.clone() for k, v in self.detector.state_dict().items()})
        original(self, batch)
        history.append({k: v.clone() for k, v in self.detector.state_dict().items()})

    monkeypatch.setattr(Trainer, "step", step)
    train(recipe(tmp_path / "quiet"))
    content = checkpoint.read(tmp_path / "with" / "model_final.pth")
    assert_same(content["model"], history[-1])
    assert content["ema_state"].keys() == content["model"].keys()
    for name, average in content["ema_state"].items():
        expected = history[0][name].double()
        for weights in history[1:]:
            expected = DECAY * expected + (1 - DECAY) * weights[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    moved = content["ema_state"]["roi_heads.box_head.fc1.weight"]
    assert not torch.equal(moved, content["model"]["roi_heads.box_head.fc1.weight"])

    stored, plain = results_of(tmp_path / "with"), results_of(tmp_path / "without")
    assert stored.keys() == {"bbox", "ema/bbox"}
    assert stored["bbox"] == plain["bbox"]
    assert stored["ema/bbox"]["AP50"] != stored["bbox"]["AP50"]
    lines = numbers(tmp_path / "with"), numbers(tmp_path / "without")
    for line, other in zip(*lines, strict=True):
        averaged = {key for key in line if key.startswith("ema/")}
        assert {key: value for key, value in line.items() if key not in averaged} == other
        assert averaged == ({"ema/bbox/AP", "ema/bbox/AP50"} if "bbox/AP" in line else set())
    assert "\nema/bbox  6.00" in (tmp_path / "with" / "log.txt").read_text()


def test_the_average_begins_with_the_weights_that_the_run_begins_with_and_goes_on(tmp_path):
    train(recipe(tmp_path / "a", num_images=4))
    start = tmp_path / "a" / "model_final.pth"
    train(recipe(tmp_path / "b", num_images=4, init_checkpoint=str(start), ema_decay=0.5))
    before, after = checkpoint.read(start), checkpoint.read(tmp_path / "b" / "model_final.pth")
    for name, average in after["ema_state"].items():
        expected = (before["model"][name] + after["model"][name]) / 2
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-8, msg=name)
    for folder, decay, text in (
        ("b", None, r"the file holds an average of the weights, got None"),
        ("a", DECAY, r"the file holds no average of the weights, got 0\.75"),
    ):
        with pytest.raises(InputError, match=r"train\.ema_decay for resuming .*" + text):
            train(recipe(tmp_path / folder, num_images=8, ema_decay=decay), resume=True)
