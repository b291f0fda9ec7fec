"""Steps that are not finite: what is named and written, and what stop and skip do."""

import json
import math

import pytest
import ranks
import torch
from pair import in_pair
from test_run import assert_same
from test_variants import VARIANTS
from tiny_recipe import draw, recipe, tiny_detector
from torch import nn

from vitdet import checkpoint
from vitdet.engine.bad_steps import BadSteps
from vitdet.engine.checkpoints import last_checkpoint
from vitdet.engine.run import train
from vitdet.engine.trainer import NonFiniteLossError, Trainer
from vitdet.utils.checks import InputError

FC1 = "roi_heads.box_head.fc1"


class Roots(nn.Module):
    """A loss that is 0 with a gradient that is not finite for an image of value 0."""

    def __init__(self):
        super().__init__()
        self.slow = nn.Parameter(torch.ones(2))
        self.fast = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch):
        self.calls += 1
        value = torch.tensor([record["value"] for record in batch]).mean()
        return {"loss_slow": (self.slow * value).abs().sqrt().sum(), "loss_fast": self.fast.sum()}


def batch_of(value):
    return [{"value": value, "file_name": f"image_{value:g}.jpg", "image_id": 7, "position": 3}]


def roots(policy="stop", limit=10, **options):
    detector = Roots()
    groups = [{"params": [detector.slow], "lr": 0.1}, {"params": [detector.fast], "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    bad_steps = BadSteps(policy, limit=limit)
    return Trainer(detector, optimizer, lambda _: 1.0, bad_steps=bad_steps, **options)


def real_trainer(variant="", bad_steps=None, **options):
    detector = tiny_detector(VARIANTS.get(variant), drop_path_rate=0.5)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    return Trainer(detector, optimizer, lambda _: 1.0, seed=5, bad_steps=bad_steps, **options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_module_that_is_not_finite_is_named_and_the_file_holds_the_step(
    tmp_path, accumulate
):
    trainer = real_trainer(bad_steps=BadSteps(folder=tmp_path), accumulate=accumulate)
    trainer.run(iter([[draw(0), draw(1)]]), 2)
    trainer.detector.roi_heads.box_head.fc1.weight.data[0] = 3e38  # still finite
    path = tmp_path / "000000002.pth"
    with pytest.raises(
        NonFiniteLossError,
        match=rf"got loss_.*\(first not finite: the output of {FC1}\) after 2 images at lr 0\.01 "
        r"with images rectangle_2\.jpg \(id 2\), rectangle_3\.jpg \(id 3\), written to "
        rf"{path}\. Look at these",
    ) as caught:
        trainer.run(iter([[draw(2), draw(3)]]), 4)
    content = checkpoint.read(path)
    assert content["reason"] in str(caught.value)
    assert (content["images_seen"], content["seed"], content["autocast"]) == (2, 5, "")
    for image, position in zip(content["images"], (2, 3), strict=True):
        original = draw(position)
        ours, truth = image.pop("instances"), original.pop("instances")
        assert_same(image, original)
        assert torch.equal(ours["gt_boxes"], truth.gt_boxes.tensor)
        assert torch.equal(ours["gt_masks"], truth.gt_masks.tensor)
        assert torch.equal(ours["gt_classes"], truth.gt_classes)


def test_weights_and_gradients_that_are_not_finite_are_named():
    trainer = real_trainer()
    trainer.detector.backbone.net.blocks[1].norm2.weight.data[3] = math.nan
    with pytest.raises(
        NonFiniteLossError,
        match=r"the output of backbone\.net\.blocks\.1\.norm2, its own weights are not finite\)",
    ):
        trainer.run(iter([[draw(0)]]), 1)
    trainer = roots()
    with pytest.raises(
        NonFiniteLossError,
        match=r"got a gradient that is not finite \(gradient not finite in 1 parameters: slow at "
        r"lr 0\.1\) after 0 images at lr 0\.2 with images image_0\.jpg \(id 7\)\. Look",
    ):
        trainer.step(batch_of(0.0))
    assert trainer.detector.slow.tolist() == trainer.detector.fast.tolist() == [1.0, 1.0]


def test_a_skipped_step_leaves_all_but_the_count_and_too_many_stop_the_run():
    trainer = roots("skip", limit=2, ema_decay=0.5)
    trainer.step(batch_of(1.0))
    before, after = trainer.state_dict(), {}
    before = json.loads(json.dumps(before, default=lambda value: value.tolist()))
    trainer.step(batch_of(0.0))
    after = json.loads(json.dumps(trainer.state_dict(), default=lambda value: value.tolist()))
    assert after.pop("images_seen") == before.pop("images_seen") + 1 == 2
    (line,) = after.pop("bad_steps")
    assert "slow at lr 0.1" in line
    assert after == before  # weights, buffers, moments, average
    trainer.step(batch_of(1.0))
    assert len(trainer.window.steps) == 2
    assert trainer.detector.fast.tolist() != before["model"]["fast"]
    trainer.step(batch_of(0.0))
    text = r"3 bad steps, more than train\.max_bad_steps=2: .* after 1 images .*after 4 images"
    with pytest.raises(NonFiniteLossError, match=text):
        trainer.step(batch_of(0.0))


def test_batchnorm_keeps_its_statistics_over_a_skipped_step():
    trainer = real_trainer("basic with BatchNorm", BadSteps("skip"))
    before = {name: value.clone() for name, value in trainer.detector.state_dict().items()}
    poisoned = {**draw(0), "image": draw(0)["image"].float() * math.nan}
    trainer.run(iter([[poisoned]]), 1)
    assert_same(dict(trainer.detector.state_dict()), before)


def run_with_poison(folder, *, resume=False, **options):
    """6 steps of 4 images; image 9, in the third, is not a number."""
    cfg = recipe(folder, **{"checkpoint_every": 8, "ema_decay": 0.75, **options})
    cfg.dataloader.train.poison_at = 9
    train(cfg, resume=resume)
    return checkpoint.read(folder / "model_final.pth")


@pytest.mark.slow
def test_a_run_passes_over_a_bad_step_and_resumes_to_the_same_bits_and_count(tmp_path):
    whole = run_with_poison(tmp_path / "whole", on_bad_step="skip")
    (line,) = whole["bad_steps"]
    assert "rectangle_9.jpg (id 9)" in line
    assert "the output of backbone.net.patch_embed.proj" in line
    assert (tmp_path / "whole" / "bad_steps" / "000000008.pth").is_file()
    assert "bad step 1 of at most 10, passed over: " in (tmp_path / "whole/log.txt").read_text()
    run_with_poison(tmp_path / "parts", on_bad_step="skip", num_images=16)
    parts = run_with_poison(tmp_path / "parts", resume=True, on_bad_step="skip")
    for key in ("ema_state", "images_seen", "seed"):
        assert_same(parts[key], whole[key], key)
    assert [each.replace("parts", "whole") for each in parts["bad_steps"]] == whole["bad_steps"]


def test_stop_writes_the_batch_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"rectangle_9\.jpg .*written to .*000000008\.pth"):
        run_with_poison(tmp_path)
    assert last_checkpoint(tmp_path) == tmp_path / "model_000000008.pth"
    content = checkpoint.read(tmp_path / "bad_steps" / "000000008.pth")
    assert [image["position"] for image in content["images"]] == [8, 9, 10, 11]


def test_an_overflow_of_fp16_is_no_bad_step_until_the_scale_is_used_up():
    text = r"gradients that overflow in fp16 again and again \(loss scale 0\.5\)"
    trainer = roots("skip", precision="fp16", limit=0)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(2):
        trainer.step(batch_of(0.0))
    assert (trainer.bad_steps.met, trainer.scaler.get_scale()) == ([], 1.0)
    with pytest.raises(NonFiniteLossError, match=rf"got 1 bad steps, .*: {text}"):
        trainer.step(batch_of(0.0))
    assert trainer.detector.slow.tolist() == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_bad_image_of_one_process_makes_all_pass_over_the_step(tmp_path, parallel):
    """The result is that of one process, which has no one to agree with."""
    one, two = tmp_path / "one", tmp_path / "two"
    poison = {"poison_at": 21, "on_bad_step": "skip"}
    ranks.train_even_batches(one, **poison)
    in_pair(ranks.train_even_batches, two, parallel=parallel, **poison)
    ours, theirs = (checkpoint.read(folder / "model_final.pth") for folder in (one, two))
    for name, weight in ours["model"].items():
        torch.testing.assert_close(theirs["model"][name], weight, rtol=0, atol=1e-6, msg=name)
    (line,) = theirs["bad_steps"]
    assert line.startswith("process 1: ")
    assert "rectangle_21.jpg" in line
    assert "process 0" not in line
    assert [path.name for path in (two / "bad_steps").iterdir()] == ["000000016.rank1.pth"]


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_names_the_images_of_all_processes(tmp_path):
    text = r"process 0: a gradient .*slow at lr 0\.1\).*image_1.*process 1: .*image_0"
    with pytest.raises(InputError, match=text):
        in_pair(ranks.bad_gradient_of_rank_1, str(tmp_path))
