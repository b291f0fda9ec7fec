"""A recipe's values and lengths, and where the lines and numbers of a run go."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from tiny_recipe import recipe

from vitdet.config import change, load_config
from vitdet.engine.log import Metrics, gradient_norm, logging_to
from vitdet.engine.recipe import check_recipe, images_an_epoch, set_absolute_paths, set_length
from vitdet.engine.run import evaluate, train
from vitdet.engine.trainer import StepRecord
from vitdet.utils.checks import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# two images of five have an object to learn
DATASET = SimpleNamespace(
    records=[{"annotations": a} for a in ([{}], [{"iscrowd": 0}], [{"iscrowd": 1}], [], [])]
)


WRONG = [
    ({"log_evry": 3}, r"train\.log_evry: there is no such key\. Did you mean log_every\?"),
    ({"seed": "x"}, r"train\.seed: Value 'x' of type 'str' could not be converted to Integer"),
    ({"seed": None}, r"train\.seed: Incompatible value 'None'"),
    ({"clip_grad_norm": True}, r"train\.clip_grad_norm: Value 'True' of type 'bool' could not"),
    ({"loggers": ["wandb"]}, r"train\.loggers: there is no such key"),
    ({"log_every": 0}, r"train\.log_every: expected 1 or more, got 0"),
    ({"num_images": 0}, r"train\.num_images: expected 1 or more, got 0"),
    ({"epochs": 0}, r"train\.epochs: expected a number above 0 or null, got 0"),
    ({"eval_every": -1}, r"train\.eval_every: .* got -1\. 0 means never"),
    ({"eval_every": "ten%"}, r'train\.eval_every: expected images, "10%" of the training or "500'),
    ({"checkpoint_every": "2 epochs"}, r"train\.checkpoint_every: .* got '2 epochs'"),
    ({"precision": "fp8"}, r"train\.precision: expected auto or bf16 or fp16 or fp32, got fp8"),
    ({"parallel": "fsdp", "compile": True}, r"train\.compile: it does not go with .*fsdp"),
    ({"init_checkpoint": "???"}, r"recipe: expected a value for train\.init_checkpoint, got"),
    ({"accumulate": 3}, r"total_batch_size: expected a multiple of the 1 processes times tra"),
    ({"ema_decay": 1.0}, r"train\.ema_decay: expected 0 <= decay < 1 or null, got 1\.0"),
    ({"patience": 0}, r"train\.patience: expected 1 or more, got 0"),
    ({"patience": 2}, r"train\.patience: it needs evaluations and a metric, got eval_every=0"),
]


@pytest.mark.parametrize(("values", "text"), WRONG)
def test_a_wrong_value_is_one_line_before_anything_starts(tmp_path, values, text):
    cfg = recipe(tmp_path / "out")
    cfg.train.update(values)
    with pytest.raises(InputError, match=text) as caught:
        train(cfg)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_part_is_no_recipe(tmp_path):
    cfg = recipe(tmp_path / "out")
    del cfg["train"], cfg["schedule"]
    text = r"recipe to train or evaluate: expected .*, got no schedule, train\."
    for command in (train, evaluate):
        with pytest.raises(InputError, match=text):
            command(cfg)


def test_right_values_pass_and_keys_may_be_left_out(tmp_path):
    cfg = recipe(tmp_path, ema_decay=0.9, clip_grad_norm=1, ddp=None, seed=0, loggers=[])
    cfg.train.update(tags=["of an earlier version"], reference_batch=None)
    found = check_recipe(cfg).train
    assert (found.clip_grad_norm, found.ddp, found.eval_weights) == (1.0, None, "model")
    assert "tags" not in found
    assert "tags" in cfg.train  # it was a copy
    assert check_recipe(recipe(tmp_path, ddp={"bucket_cap_mb": 5})).train.ddp == {
        "bucket_cap_mb": 5
    }
    assert load_config(CONFIGS / "COCO/mask_rcnn_vitdet_b_100ep.py").train.step_timeout == 1800


@pytest.mark.parametrize(
    ("values", "filter_empty", "expected"),
    [
        ({"eval_every": 12, "checkpoint_every": 6}, False, (24, 6, 12)),
        ({"eval_every": "100%", "checkpoint_every": "12.5%"}, False, (24, 3, 24)),
        ({"eval_every": "2 iterations", "checkpoint_every": "1 image"}, False, (24, 1, 8)),
        ({"eval_every": 12, "checkpoint_every": 0, "epochs": 2}, False, (10, 0, 5)),
        ({"eval_every": "50%", "checkpoint_every": 1, "epochs": 1.5}, True, (3, 1, 2)),
    ],
)
def test_epochs_and_shares_become_images(tmp_path, values, filter_empty, expected):
    cfg = check_recipe(recipe(tmp_path, **values))
    cfg.dataloader.train.filter_empty = filter_empty
    assert images_an_epoch(cfg, DATASET) == (2 if filter_empty else 5)
    set_length(cfg, DATASET)
    assert (cfg.train.num_images, cfg.train.checkpoint_every, cfg.train.eval_every) == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ((), (10, 5, 10, [16, 20])),  # in proportion
        (("checkpoint_every=6", "eval_every=0"), (6, 0, 10, [16, 20])),
        (("checkpoint_every=25%",), (3, 5, 10, [16, 20])),  # not at 8 and at 10
        (("schedule.warmup=5", "schedule.milestones=[5, 10]"), (10, 5, 12, [12, 24])),
        (("schedule.num_images=10", "schedule.milestones=[6, 9]"), (10, 5, 10, [6, 9])),
    ],
)
def test_what_a_person_types_is_not_rescaled(tmp_path, typed, expected):
    """Of a schedule for 24 images that becomes one for 10: shares are of the former."""
    cfg = recipe(tmp_path, checkpoint_every=24, eval_every=12, epochs=2)
    cfg.schedule.update(warmup=10, milestones=[16, 20])
    words = [word if word.startswith("schedule") else f"train.{word}" for word in typed]
    cfg = check_recipe(change(cfg, words))
    set_length(cfg, DATASET)
    found = cfg.train.checkpoint_every, cfg.train.eval_every, cfg.schedule.warmup
    assert (*found, cfg.schedule.milestones) == expected


def test_a_typed_length_takes_the_place_of_epochs(tmp_path):
    changed = change(recipe(tmp_path, epochs=2), ["train.num_images=30"])
    assert changed.train.epochs is None
    with pytest.raises(InputError, match=r"train\.num_images or train\.epochs, got both"):
        change(recipe(tmp_path, epochs=2), ["train.num_images=30", "train.epochs=1"])
    cfg = check_recipe(change(recipe(tmp_path), ["schedule.warmup=25"]))
    with pytest.raises(InputError, match=r"schedule\.warmup: expected at most the 24 images"):
        set_length(cfg, DATASET)


def test_rules_for_another_batch(tmp_path, caplog):
    cfg = check_recipe(recipe(tmp_path, reference_batch=4))
    caplog.set_level(logging.INFO)
    cfg.dataloader.train.total_batch_size = 16
    set_length(cfg, DATASET)
    assert caplog.messages == [
        "length: 24 images, 16 a step, so 2 steps; evaluated at the end",
        "a step has 16 images, the recipe is made for 4: optimizer.lr=0.001 is left as it is (the "
        "linear rule has 0.004, the square-root rule 0.002)",
    ]


def test_a_run_knows_where_its_data_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").touch()
    here = {"json": "a.json", "images": "images", "name": "images"}
    named = {"name": "coco_2017_val", "json": 3}
    cfg = OmegaConf.create({"dataloader": {"train": {"dataset": here}, "test": {"dataset": named}}})
    set_absolute_paths(cfg)
    wanted = {"json": f"{tmp_path}/a.json", "images": f"{tmp_path}/images", "name": "images"}
    assert cfg.dataloader.train.dataset == wanted
    assert cfg.dataloader.test.dataset == named


# --- where lines and numbers go ------------------------------------------------------------------


def test_a_resume_drops_later_lines(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(4, {"a": 2.0})
        metrics.write(8, {"a": 3.0, "bbox/AP": 4.0})
        metrics.write(12, {"a": 5.0})
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"images_seen": 8, "cut')  # by a kill
    with Metrics(tmp_path, 8) as metrics:
        metrics.write(12, {"a": 6.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [(line["images_seen"], line["a"]) for line in lines] == [(4, 2.0), (8, 3.0), (12, 6.0)]


def test_the_gradient_norm_is_the_mean_of_the_finite_ones():
    def step(norm):
        given = None if norm is None else torch.tensor(norm)
        return StepRecord(torch.zeros(0), (), [], 0.1, given)

    assert gradient_norm([step(1.0), step(3.0), step(float("inf"))]) == {"grad_norm": 2.0}
    assert gradient_norm([step(float("inf"))]) == gradient_norm([step(None)]) == {}


def test_lines_go_to_the_terminal_and_to_the_file(tmp_path, capsys):
    with logging_to() as log_to:
        logging.getLogger("vitdet.anything").info("a line\x1b[2J")
        log_to(tmp_path / "log.txt")
    printed = capsys.readouterr().out
    assert printed.endswith("a line\\x1b[2J\n")  # a terminal would obey it
    assert (tmp_path / "log.txt").read_text() == printed
