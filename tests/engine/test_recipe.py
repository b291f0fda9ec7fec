"""A recipe's values against each other, and its length once the data are read."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from tiny_recipe import recipe

from vitdet.config import load_config
from vitdet.engine.recipe import check_recipe, images_an_epoch, lr_rules, set_length
from vitdet.engine.record import set_absolute_paths
from vitdet.engine.run import evaluate, train
from vitdet.utils.checks import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# two images of five have an object to learn
DATASET = SimpleNamespace(
    records=[{"annotations": a} for a in ([{}], [{"iscrowd": 0}], [{"iscrowd": 1}], [], [])]
)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"log_evry": 3}, r"train\.log_evry: there is no such key\. Did you mean log_every\?"),
        ({"seed": "x"}, r"train\.seed: Value 'x' of type 'str' could not be converted to Integer"),
        ({"seed": 1.5}, r"train\.seed: Value '1\.5' of type 'float' could not"),
        ({"seed": None}, r"train\.seed: Incompatible value 'None'"),
        ({"clip_grad_norm": True}, r"train\.clip_grad_norm: Value 'True' of type 'bool' could not"),
        ({"ddp": ["a"]}, r"train\.ddp: "),
        ({"loggers": "wandb"}, r"train\.loggers: Invalid value assigned"),
        ({"num_images": "2 iterations"}, r"train\.num_images: Value '2 iterations'"),
        ({"num_images": 0}, r"train\.num_images: expected at least one image, got 0"),
        ({"epochs": 0}, r"train\.epochs: expected a number above 0 or null, got 0"),
        ({"eval_every": -1}, r"train\.eval_every: .* got -1\. 0 means never"),
        (
            {"eval_every": "ten%"},
            r'train\.eval_every: expected images, "10%" of the training or "500',
        ),
        ({"checkpoint_every": "2 epochs"}, r"train\.checkpoint_every: .* got '2 epochs'"),
        ({"eval_weights": "best"}, r"train\.eval_weights: expected model or ema, got best"),
        ({"precision": "fp8"}, r"train\.precision: expected auto or bf16 or fp16 or fp32, got fp8"),
        ({"on_bad_step": "ignore"}, r"train\.on_bad_step: expected stop or skip, got ignore"),
        ({"device": "tpu"}, r"train\.device: expected auto or cpu or cuda, got tpu"),
        ({"parallel": "zero"}, r"train\.parallel: expected ddp or fsdp, got zero"),
        ({"parallel": "fsdp", "compile": True}, r"train\.compile: it does not go with .*fsdp"),
        ({"init_checkpoint": "???"}, r"recipe: expected a value for train\.init_checkpoint, got"),
        ({"accumulate": 3}, r"total_batch_size: expected a multiple of the 1 processes times tra"),
    ],
)
def test_a_wrong_value_is_one_line_before_anything_starts(tmp_path, values, text):
    cfg = recipe(tmp_path / "out")
    cfg.train.update(values)
    with pytest.raises(InputError, match=text) as caught:
        train(cfg)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"device cuda: torch cannot use it \("):
        train(recipe(tmp_path / "out", device="cuda"))


@pytest.mark.parametrize("command", [train, evaluate])
def test_a_part_is_no_recipe(tmp_path, command):
    cfg = recipe(tmp_path / "out")
    del cfg["train"], cfg["schedule"]
    with pytest.raises(
        InputError, match=r"recipe to train or evaluate: expected .*, got no schedule, train\."
    ):
        command(cfg)


def test_right_values_pass_and_keys_may_be_left_out(tmp_path):
    cfg = recipe(tmp_path, ema_decay=0.9, clip_grad_norm=1, ddp=None, seed=0, loggers=None)
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


def test_rules_for_another_batch(tmp_path, caplog):
    cfg = check_recipe(recipe(tmp_path, reference_batch=4))
    assert lr_rules(cfg) == ""
    cfg.dataloader.train.total_batch_size = 16
    caplog.set_level(logging.INFO)
    set_length(cfg, DATASET)
    assert caplog.messages == [
        "a step has 16 images, and the recipe is made for 4; optimizer.lr=0.001 is left as it is. "
        "If that is the rate for 4, the linear rule has 0.004, the square-root rule 0.002"
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
