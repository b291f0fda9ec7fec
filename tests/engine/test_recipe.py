"""Types of the values under `train`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe import recipe

from vitdet.config import load_config
from vitdet.engine.recipe import check_recipe
from vitdet.engine.run import train
from vitdet.settings import OPTIONAL_TRAIN_KEYS, TRAIN_KEYS
from vitdet.utils.checks import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"seed": "0"}, "train.seed: expected a whole number, got '0'. Give a value of that type."),
        ({"seed": 1.5}, "train.seed: expected a whole number, got 1.5"),
        ({"output_dir": 3}, "train.output_dir: expected text, got 3"),
        ({"clip_grad_norm": "1"}, "train.clip_grad_norm: expected a number or null, got '1'"),
        ({"clip_grad_norm": True}, "train.clip_grad_norm: expected a number or null, got True"),
        ({"compile": 1}, "train.compile: expected true or false, got 1"),
        ({"ddp": ["a"]}, "train.ddp: expected a mapping or null, got ['a']"),
        ({"loggers": {"a": 1}}, "train.loggers: expected a list or null, got {'a': 1}"),
        ({"allow_changed_data": "yes"}, "train.allow_changed_data: expected true or false, got"),
        ({"reference_batch": 6.4}, "train.reference_batch: expected a whole number or null, got"),
    ],
)
def test_a_wrong_type_is_named_before_anything_starts(tmp_path, values, text):
    cfg = recipe(tmp_path / "out")
    cfg.train.update(values)
    with pytest.raises(InputError) as caught:
        train(cfg)
    assert str(caught.value).startswith(text)
    assert not (tmp_path / "out").exists()


def test_right_types_pass(tmp_path):
    cfg = recipe(tmp_path, ema_decay=0.9, clip_grad_norm=1, ddp=None, seed=0)
    cfg.train.update(tags=["of an earlier version"], reference_batch=None, loggers=None)
    check_recipe(cfg)


def test_every_key_stands_in_the_common_recipe():
    keys = load_config(CONFIGS / "COCO/mask_rcnn_vitdet_b_100ep.py").train
    assert {*keys} == TRAIN_KEYS | set(OPTIONAL_TRAIN_KEYS)
    for key, value in OPTIONAL_TRAIN_KEYS.items():
        assert key == "reference_batch" or keys[key] == value, key
