"""Epochs, shares and another batch: what becomes of a recipe once the data are read."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from tiny_recipe import recipe

from vitdet.engine.length import check_length, images_an_epoch, lr_rules, set_length
from vitdet.utils.checks import InputError

# two images of five have an object to learn
DATASET = SimpleNamespace(
    records=[{"annotations": a} for a in ([{}], [{"iscrowd": 0}], [{"iscrowd": 1}], [], [])]
)


@pytest.mark.parametrize(
    ("train", "filter_empty", "expected"),
    [
        ({"eval_every": 12, "checkpoint_every": 6}, False, (24, 6, 12)),
        ({"eval_every": "100%", "checkpoint_every": "12.5%"}, False, (24, 3, 24)),
        ({"eval_every": 12, "checkpoint_every": 0, "epochs": 2}, False, (10, 0, 5)),
        ({"eval_every": "50%", "checkpoint_every": 1, "epochs": 1.5}, True, (3, 1, 2)),
    ],
)
def test_epochs_and_shares_become_images(tmp_path, train, filter_empty, expected):
    cfg = recipe(tmp_path, **train)
    cfg.dataloader.train.filter_empty = filter_empty
    assert images_an_epoch(cfg, DATASET) == (2 if filter_empty else 5)
    set_length(cfg, DATASET)
    assert (cfg.train.num_images, cfg.train.checkpoint_every, cfg.train.eval_every) == expected


@pytest.mark.parametrize(
    ("train", "text"),
    [
        ({"epochs": 0}, r"train\.epochs: expected a number above 0 or null, got 0\."),
        ({"epochs": "two"}, "train.epochs: .* got 'two'"),
        (
            {"num_images": "2 iterations"},
            r"num_images: .* got '2 iterations'\. train.epochs",
        ),
        ({"eval_every": -1}, "train.eval_every: .* got -1"),
        ({"eval_every": "ten%"}, 'train.eval_every: expected images or a share such as "10%"'),
        ({"checkpoint_every": "2 epochs"}, "train.checkpoint_every: .* got '2 epochs'. 0 means"),
    ],
)
def test_wrong_lengths(tmp_path, train, text):
    with pytest.raises(InputError, match=text):
        check_length(OmegaConf.merge(recipe(tmp_path).train, train))


def test_rules_for_another_batch(tmp_path, caplog):
    cfg = recipe(tmp_path, reference_batch=4)
    assert lr_rules(cfg) == ""
    cfg.dataloader.train.total_batch_size = 16
    caplog.set_level(logging.INFO)
    set_length(cfg, DATASET)
    assert caplog.messages == [
        "a step has 16 images, and the recipe is made for 4; optimizer.lr=0.001 is left as it is. "
        "If that is the rate for 4, the linear rule has 0.004, the square-root rule 0.002"
    ]
