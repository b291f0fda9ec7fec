"""Durations in words, and what another data set and another batch make of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from tiny_recipe import recipe

from vitdet.config import instantiate, load_config, save_config
from vitdet.data.loaders import build_train_loader
from vitdet.engine.durations import check, images_an_epoch, lr_rules, resolve
from vitdet.engine.run import train
from vitdet.utils.checks import InputError
from vitdet.utils.durations import Duration, is_duration, parse

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [
    path.relative_to(ROOT / "configs").as_posix()
    for path in sorted((ROOT / "configs").rglob("*.py"))
    if not {"common", "backbones"}.intersection(path.relative_to(ROOT).parts)
]


@dataclass
class Images:
    """So many images with an object, and some without."""

    size: int
    empty: int = 0
    name: str = "images"
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records = [{"annotations": [{"iscrowd": 0}]}] * self.size
        self.records += [{"annotations": []}, {"annotations": [{"iscrowd": 1}]}] * (self.empty // 2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5000, (5000, "images")),
        ("5000", (5000, "images")),
        ("5000 images", (5000, "images")),
        ("1 image", (1, "images")),
        ("12 epochs", (12, "epochs")),
        ("1epoch", (1, "epochs")),
        ("0.5 epochs", (0.5, "epochs")),
        ("5e2 iterations", (500, "iterations")),
        (" 80% ", (80, "%")),
        ("88.9 %", (88.9, "%")),
    ],
)
def test_a_duration_is_read(value, expected):
    assert parse("schedule.warmup", value) == Duration(*expected)


def test_a_duration_in_images():
    sizes = {"epoch": 1000, "batch": 16, "whole": 12_000}
    found = [
        parse("schedule.warmup", text).images(**sizes)
        for text in ("7 images", "500 iterations", "12 epochs", "80%")
    ]
    assert found == [7, 8000, 12_000, 9600]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("12 epchs", r"got '12 epchs'\. Did you mean '12 epochs'\?"),
        ("12 Epoch", r"Did you mean '12 epoch'\?"),
        ("500 itertions", r"Did you mean '500 iterations'\?"),
        ("3 hours", r"got '3 hours'\. Units are images, iterations, epochs, %\."),
        ("twelve epochs", r'expected a number of images, or text such as "12 epochs"'),
        ("1.2.3 epochs", r"'1\.2\.3' is no number"),
        ("-3 epochs", r"It cannot be negative or endless"),
        (float("nan"), "It cannot be negative or endless"),
        (True, r"got True\. Write one of these"),
        (None, r"got None"),
    ],
)
def test_no_duration(value, text):
    with pytest.raises(InputError, match=text) as caught:
        parse("schedule.warmup", value)
    assert str(caught.value).startswith("schedule.warmup: expected")


def test_the_length_is_no_share_of_itself():
    with pytest.raises(InputError, match=r"train\.num_images: expected a length of its own"):
        parse("train.num_images", "80%")


def test_what_is_a_duration():
    assert is_duration("schedule.milestones.0")
    assert not is_duration("train.num_imagess")
    assert not is_duration("schedule.gamma")


# --- recipes -------------------------------------------------------------------------------------


def in_words() -> DictConfig:
    cfg = recipe(Path("unused"))
    cfg.train.update(num_images="12 epochs", checkpoint_every="1 epoch", eval_every="50 iterations")
    cfg.schedule.milestones, cfg.schedule.warmup = ["66.7%", "11 epochs", 11_500], "10 iterations"
    return cfg


def test_words_become_images(tmp_path):
    cfg = in_words()
    notes = resolve(cfg, Images(1000))
    assert (cfg.train.num_images, cfg.schedule.num_images) == (12_000, 12_000)
    assert (cfg.train.checkpoint_every, cfg.train.eval_every) == (1000, 200)
    assert (cfg.schedule.milestones, cfg.schedule.warmup) == ([8004, 11_000, 11_500], 40)
    assert notes == {
        "train.num_images": "12 epochs = 12000 images",
        "train.checkpoint_every": "1 epoch = 1000 images",
        "train.eval_every": "50 iterations = 200 images",
        "schedule.milestones": "66.7%, 11 epochs, 11500 = 8004, 11000, 11500 images",
        "schedule.warmup": "10 iterations = 40 images",
    }
    save_config(cfg, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml", trust=True)
    assert resolve(again, Images(1000)) == {}


def test_numbers_stay_without_epochs_and_no_data_are_looked_at():
    cfg = recipe(Path("unused"))
    before = OmegaConf.to_container(cfg.schedule), OmegaConf.to_container(cfg.train)
    assert resolve(cfg, None) == {}
    assert (OmegaConf.to_container(cfg.schedule), OmegaConf.to_container(cfg.train)) == before


def test_epochs_stretch_what_is_a_number_and_leave_text_its_meaning(tmp_path):
    cfg = in_words()
    cfg.train.num_images = 4000
    cfg.train.epochs = 2.5
    cfg.train.checkpoint_every = 400
    cfg.schedule.milestones, cfg.schedule.warmup = [3000, "90%"], 100
    notes = resolve(cfg, Images(320))
    assert cfg.train.num_images == 800
    assert (cfg.schedule.milestones, cfg.schedule.warmup) == ([600, 720], 20)
    assert (cfg.train.checkpoint_every, cfg.train.eval_every) == (80, 200)
    assert notes["train.epochs"] == "2.5 x 320 images = 800 images"
    save_config(cfg, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml", trust=True)
    assert set(resolve(again, Images(320))) == {"train.epochs"}  # and nothing more
    assert again.train.num_images == 800
    resolve(again, Images(640))  # the same recipe for twice the data
    assert (again.train.num_images, again.schedule.num_images) == (1600, 1600)
    assert (again.schedule.milestones, again.schedule.warmup) == ([1200, 1440], 40)


@pytest.mark.parametrize("filter_empty", [True, False])
def test_an_epoch_is_what_the_loader_draws_from(filter_empty):
    images = Images(10, empty=4)
    cfg = load_config(ROOT / "configs/mini/mask_rcnn_vitdet_shapes.py")
    cfg.dataloader.train.filter_empty = filter_empty
    loader = build_train_loader(
        images, lambda record: record, total_batch_size=2, num_workers=0, filter_empty=filter_empty
    )
    assert images_an_epoch(cfg, images) == loader.num_images == (10 if filter_empty else 14)


@pytest.mark.parametrize("value", [0, -1, float("inf"), "3", True])
def test_epochs_are_a_positive_number(value):
    cfg = recipe(Path("unused"), epochs=value)
    with pytest.raises(InputError, match=r"train\.epochs: expected a number above 0, got"):
        check(cfg)


def test_wrong_durations_of_a_recipe_stop_a_training_before_anything(tmp_path):
    with pytest.raises(InputError, match=r"train\.eval_every: .*Did you mean '2 epochs'\?"):
        train(recipe(tmp_path / "out", eval_every="2 epocs"))
    cfg = recipe(tmp_path / "out")
    cfg.schedule.milestones = "80%"
    with pytest.raises(InputError, match=r"schedule\.milestones: expected a list of durations"):
        train(cfg)
    cfg = recipe(tmp_path / "out", num_images=0)
    with pytest.raises(InputError, match=r"train\.num_images: expected at least one image, got 0"):
        train(cfg)
    with pytest.raises(InputError, match=r"an epoch of images: expected images to train on"):
        resolve(recipe(tmp_path, epochs=2), Images(0))
    assert not (tmp_path / "out").exists()


def test_a_training_in_words(tmp_path):
    cfg = recipe(tmp_path, checkpoint_every="50%")
    cfg.train.num_images, cfg.schedule.milestones = "3 iterations", ["8 images"]
    train(cfg)
    log = (tmp_path / "log.txt").read_text()
    assert "train.num_images: 3 iterations = 12 images" in log
    assert "12/12 images" in log
    assert (tmp_path / "model_000000008.pth").exists()  # the first step past 6 images
    saved = load_config(tmp_path / "config.yaml", trust=True)
    assert (saved.train.num_images, saved.train.checkpoint_every) == (12, 6)
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# train.num_images: 3 iterations = 12 images\n")


def test_overrides_take_durations(tmp_path):
    words = ["train.num_images=12 epochs", "schedule.milestones=[80%, 11 epochs]"]
    words += ["schedule.warmup=500 iterations", "train.eval_every=1e4", "train.epochs=3"]
    path = ROOT / "configs/COCO/mask_rcnn_vitdet_b_100ep.py"
    cfg = load_config(path, words)
    assert cfg.train.num_images == "12 epochs"
    assert cfg.schedule.milestones == ["80%", "11 epochs"]
    assert cfg.schedule.warmup == "500 iterations"
    assert (cfg.train.eval_every, cfg.train.epochs) == (10_000, 3)
    for word, text in (
        ("train.num_images=12 epoch's", r"train\.num_images: .*Did you mean '12 epochs'"),
        ("schedule.milestones=80%", r"'schedule\.milestones': expected a list, got '80%'"),
        ("schedule.milestones.0=half", r"schedule\.milestones\.0: expected a number of images"),
    ):
        with pytest.raises(InputError, match=text):
            load_config(path, [word])


# --- the same curve over the epochs, for every recipe ---------------------------------------------


@cache
def published(name: str) -> DictConfig:
    """The recipe; do not change it."""
    path = ROOT / "configs" / name
    missing = OmegaConf.missing_keys(load_config(path)) if name.startswith("own/") else ()
    return load_config(path, [f"{key}=given" for key in missing])


@pytest.mark.parametrize("name", RECIPES)
def test_a_thousand_images_have_the_same_curve_over_the_epochs(name):
    before = published(name)
    length = before.train.num_images
    after = before.copy()
    after.train.epochs = 100
    resolve(after, Images(1000))
    assert after.train.num_images == 100_000
    curves = instantiate(before.schedule), instantiate(after.schedule)
    share = 100_000 / length
    for period in ("checkpoint_every", "eval_every"):
        assert after.train[period] == pytest.approx(before.train[period] * share, abs=0.51)
    warmup = before.schedule.warmup
    edges = [warmup, *before.schedule.get("milestones", [])]
    for point in range(0, 100_001, 250):  # images of the new one
        old = point / share
        if min(abs(old - edge) * share for edge in edges) < 1:
            continue  # the edge itself is rounded to whole images
        in_warmup = old < warmup
        tolerance = 0.5 / after.schedule.warmup if in_warmup else 1e-4
        assert curves[1](point) == pytest.approx(curves[0](old), abs=tolerance), point
    ends = (curves[0](length), curves[1](100_000))
    assert ends[0] == pytest.approx(ends[1], abs=1e-12)


# --- another batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_reference_batch_is_the_recipes_own(name):
    cfg = published(name)
    assert cfg.train.reference_batch == cfg.dataloader.train.total_batch_size
    assert lr_rules(cfg) == ""


def test_rules_for_another_batch():
    path = ROOT / "configs/COCO/mask_rcnn_vitdet_b_100ep.py"
    cfg = load_config(path, ["dataloader.train.total_batch_size=16"])
    assert lr_rules(cfg) == (
        "a step has 16 images, and the recipe is made for 64; optimizer.lr=0.0001 is left as it "
        "is. If that is the rate for 64, the linear rule has 2.5e-05, the square-root rule 5e-05"
    )
    assert cfg.optimizer.lr == 1e-4
    cfg.train.reference_batch = None
    assert lr_rules(cfg) == ""


def test_a_run_says_what_another_batch_means(tmp_path):
    train(recipe(tmp_path, num_images=4, reference_batch=16))
    log = (tmp_path / "log.txt").read_text()
    assert "a step has 4 images, and the recipe is made for 16; optimizer.lr=0.001 is left" in log
    assert "the linear rule has 0.00025, the square-root rule 0.0005" in log
