"""Every recipe under configs/: it builds, it reloads, and it says what was published.

The expected values stand here a second time on purpose: a slip in a recipe shows as a difference.
Sources: facebookresearch/detectron2 projects/ViTDet (README tables and configs).
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.utils.registry import locate
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig, ListConfig

from tests.recipes import NAMES, ROOT, count, header, model_of, recipe, shapes, text_of
from vitdet import plain_recipes
from vitdet.config import _dotted_name, build_model, instantiate, load_config, save_config
from vitdet.layers.norms import channel_layer_norm
from vitdet.optim import parameter_table

CHECKPOINTS = Path(os.environ.get("VITDET_CHECKPOINTS", ROOT.parent / "shared/checkpoints"))
BATCH = 64


class Row(NamedTuple):
    """What was published for one recipe; `millions` is None where no source counts them."""

    box_ap: float
    mask_ap: float
    millions: float | None
    parameters: int  # counted
    lr: float
    drop_path: float


# The counts of the ViT rows are also those of the published files (test_published_names); Swin and
# MViTv2 are detectron2's own classes. 361.0 and 103.2 are 360.950 and 103.149, rounded twice.
ROWS = {
    "COCO/mask_rcnn_vitdet_b_100ep": Row(51.6, 45.9, 110.9, 110_895_792, 1e-4, 0.1),
    "COCO/mask_rcnn_vitdet_l_100ep": Row(55.5, 49.2, 330.7, 330_684_656, 1e-4, 0.4),
    "COCO/mask_rcnn_vitdet_h_75ep": Row(56.7, 50.2, 661.2, 661_203_760, 1e-4, 0.5),
    "COCO/cascade_mask_rcnn_vitdet_b_100ep": Row(54.0, 46.7, 141.2, 141_160_990, 1e-4, 0.1),
    "COCO/cascade_mask_rcnn_vitdet_l_100ep": Row(57.6, 50.0, 361.0, 360_949_854, 1e-4, 0.4),
    "COCO/cascade_mask_rcnn_vitdet_h_75ep": Row(58.7, 51.0, 691.5, 691_468_958, 1e-4, 0.5),
    "COCO/cascade_mask_rcnn_swin_b_in21k_50ep": Row(53.9, 46.2, 139.3, 139_311_894, 4e-5, 0.4),
    "COCO/cascade_mask_rcnn_swin_l_in21k_50ep": Row(55.0, 47.2, 247.8, 247_810_802, 4e-5, 0.4),
    "COCO/cascade_mask_rcnn_mvitv2_b_in21k_100ep": Row(55.6, 48.1, 103.2, 103_149_086, 8e-5, 0.4),
    "COCO/cascade_mask_rcnn_mvitv2_l_in21k_50ep": Row(55.7, 48.3, 265.1, 265_112_702, 8e-5, 0.5),
    "COCO/cascade_mask_rcnn_mvitv2_h_in21k_36ep": Row(55.9, 48.3, 718.2, 718_158_046, 1.6e-4, 0.6),
    "LVIS/mask_rcnn_vitdet_b_100ep": Row(40.2, 38.2, 116.9, 116_939_778, 2e-4, 0.1),
    "LVIS/mask_rcnn_vitdet_l_100ep": Row(46.1, 43.6, None, 336_728_642, 2e-4, 0.4),
    "LVIS/mask_rcnn_vitdet_h_100ep": Row(49.1, 46.0, None, 667_247_746, 1e-4, 0.4),
    "LVIS/cascade_mask_rcnn_vitdet_b_100ep": Row(43.0, 38.9, 144.9, 144_902_826, 2e-4, 0.1),
    "LVIS/cascade_mask_rcnn_vitdet_l_100ep": Row(49.2, 44.5, None, 364_691_690, 2e-4, 0.4),
    "LVIS/cascade_mask_rcnn_vitdet_h_100ep": Row(51.5, 46.6, None, 695_210_794, 1e-4, 0.4),
    "LVIS/cascade_mask_rcnn_swin_b_in21k_50ep": Row(44.0, 39.6, None, 143_053_730, 1e-4, 0.3),
    "LVIS/cascade_mask_rcnn_swin_l_in21k_50ep": Row(46.0, 41.4, None, 251_552_638, 1e-4, 0.3),
    "LVIS/cascade_mask_rcnn_mvitv2_b_in21k_100ep": Row(46.3, 42.0, None, 106_890_922, 1e-4, 0.4),
    "LVIS/cascade_mask_rcnn_mvitv2_l_in21k_50ep": Row(49.4, 44.2, None, 268_854_538, 4e-5, 0.5),
    "LVIS/cascade_mask_rcnn_mvitv2_h_in21k_50ep": Row(49.5, 44.1, None, 721_899_882, 2e-5, 0.6),
}


class Times(NamedTuple):
    """Iterations, where the rate is cut, and the share of the warm-up in the whole training."""

    iterations: int
    milestones: tuple[int, int]
    warmup_share: float


TIMES = {  # by data set and epochs
    ("COCO", 100): Times(184375, (163889, 177546), 250 / 184375),
    ("COCO", 75): Times(138281, (122916, 133159), 250 / 184375),
    ("COCO", 50): Times(92187, (81944, 88773), 250 / 184375),
    ("COCO", 36): Times(67500, (52500, 62500), 250 / 67500),
    ("LVIS", 100): Times(156250, (138889, 150463), 250 / 156250),
    ("LVIS", 50): Times(78125, (69444, 75231), 250 / 78125),
}
BACKBONES: dict[str, dict[str, Any]] = {
    "vitdet_b": dict(embed_dim=768, depth=12, num_heads=12, global_block_indexes=[2, 5, 8, 11]),
    "vitdet_l": dict(embed_dim=1024, depth=24, num_heads=16, global_block_indexes=[5, 11, 17, 23]),
    "vitdet_h": dict(embed_dim=1280, depth=32, num_heads=16, global_block_indexes=[7, 15, 23, 31]),
    "swin_b": dict(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=7),
    "swin_l": dict(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=7),
    "mvitv2_b": dict(embed_dim=96, depth=24, num_heads=1, last_block_indexes=[1, 4, 20, 23]),
    "mvitv2_l": dict(embed_dim=144, depth=48, num_heads=2, last_block_indexes=[1, 7, 43, 47]),
    "mvitv2_h": dict(embed_dim=192, depth=80, num_heads=3, last_block_indexes=[3, 11, 71, 79]),
}
# weight decay, that of norms (None: the same), names without any, layer-wise lr decay
RULES: dict[str, tuple[float, float | None, list[str], float | None]] = {
    "vitdet_b": (0.1, 0.0, ["pos_embed"], 0.7),
    "vitdet_l": (0.1, 0.0, ["pos_embed"], 0.8),
    "vitdet_h": (0.1, None, [], 0.9),
    "swin": (0.05, 0.0, ["relative_position_bias_table"], None),
    "mvitv2": (0.1, 0.0, ["pos_embed"], None),
}


def backbone_of(name: str) -> str:
    (found,) = re.findall(r"(?:vitdet|swin|mvitv2)_[blh]", name)
    return found


def times_of(name: str) -> Times:
    ((folder, epochs),) = re.findall(r"^(COCO|LVIS)/.*_(\d+)ep$", name)
    return TIMES[folder, int(epochs)]


def calls(node: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every LazyCall in a config, with its place."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        for name in node:
            yield from calls(node[name], f"{key}.{name}")
    elif isinstance(node, ListConfig):
        for i, item in enumerate(node):
            yield from calls(item, f"{key}.{i}")


def target(node: DictConfig) -> Any:
    found = node["_target_"]
    return locate(found) if isinstance(found, str) else found


def resolved(node: Any) -> Any:
    """Plain values, interpolations resolved, dotted names turned into what they name."""
    if isinstance(node, DictConfig):
        return {k: target(node) if k == "_target_" else resolved(node[k]) for k in node}
    if isinstance(node, ListConfig):
        return [resolved(item) for item in node]
    return node


def test_every_recipe_is_found():
    folders = Counter(name.split("/")[0] for name in NAMES)
    assert folders == {
        "COCO": 16,
        "LVIS": 15,
        "O365": 1,
        "mini": 17,
        "own": 8,
        "easycv": 7,
        "mmdetection": 1,
        "paper": 44,
        "vil": 25,
        "vitae": 7,
    }
    published = {name for name in NAMES if name.startswith(("COCO", "LVIS"))}
    assert {name for name in published if "eva02" not in name} == set(ROWS)  # test_configs_eva02.py


def check_calls_fit_their_callables(name: str):
    assert sorted(recipe(name)) == ["dataloader", "model", "optimizer", "schedule", "train"]
    assert recipe(name).dataloader.keys() == {"train", "test", "evaluator"}
    found = dict(calls(recipe(name)))
    assert len(found) > 20  # a detector and its data, optimizer and schedule
    for key, node in found.items():
        arguments = {k: node[k] for k in node if k != "_target_"}
        try:
            inspect.signature(target(node)).bind(**arguments)
        except TypeError as error:
            pytest.fail(f"{name}{key}: {error}")


def check_it_is_on_meta(name: str):
    model = model_of(name)
    assert {value.device.type for value in model.parameters()} == {"meta"}


def check_parameters(name: str):
    found = count(model_of(name))
    assert found == ROWS[name].parameters
    if ROWS[name].millions is not None:
        assert found / 1e6 == pytest.approx(ROWS[name].millions, abs=0.055)


def check_schedule_is_in_order(name: str):
    schedule, train = recipe(name).schedule, recipe(name).train
    milestones = schedule.get("milestones", [])
    points = [schedule.warmup, *milestones, train.num_images]
    assert points == sorted(set(points))
    assert schedule.num_images == train.num_images
    curve = instantiate(schedule)

    def multiplier(images: float) -> float:
        return curve(images / train.num_images)

    assert multiplier(0) == pytest.approx(schedule.warmup_factor if schedule.warmup else 1.0)
    assert multiplier(schedule.warmup) == pytest.approx(1.0)
    for i, milestone in enumerate(milestones):
        assert multiplier(milestone - train.reference_batch) == pytest.approx(schedule.gamma**i)
        assert multiplier(milestone) == pytest.approx(schedule.gamma ** (i + 1))


def check_learning_rate(name: str):
    """Against the schedulers that detectron2 trained with."""
    iterations, milestones, share = times_of(name)
    steps = MultiStepParamScheduler([1.0, 0.1, 0.01], iterations, list(milestones))
    published = WarmupParamScheduler(steps, warmup_factor=0.001, warmup_length=share)
    cfg = recipe(name)
    assert cfg.train.num_images == iterations * BATCH
    assert list(cfg.schedule.milestones) == [milestone * BATCH for milestone in milestones]
    multiplier = instantiate(cfg.schedule)
    points = (0, round(share * iterations), *milestones)
    near = {point + step for point in points for step in (-1, 0, 1)}
    for iteration in sorted({*near, 60, 100_000, iterations - 1}):
        if 0 <= iteration < iterations:
            ours = cfg.optimizer.lr * multiplier(iteration / iterations)
            theirs = ROWS[name].lr * published(iteration / iterations)
            assert ours == pytest.approx(theirs, rel=1e-5), iteration


def test_a_recipe_from_elsewhere_may_build_what_these_build():
    """Put a part that a recipe builds anew into PARTS, and take out what none builds any more."""
    found: dict[str, set[str]] = {place: set() for place in plain_recipes.PARTS}
    for name in [*NAMES, "common/models/cascade_mask_rcnn_eva01"]:  # of no recipe yet
        for key, node in calls(recipe(name)):
            place = plain_recipes._place(tuple(key.split(".")[1:]))
            found[place].add(_dotted_name(target(node)))
    for place, names in plain_recipes.PARTS.items():
        assert found[place] ^ names == set(), place


def check_it_loads_again(name: str, tmp_path: Path):
    save_config(recipe(name), tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert resolved(again) == resolved(recipe(name))
    assert shapes(build_model(again.model, device="meta")) == shapes(model_of(name))
    save_config(again, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()


def check_backbone(name: str):
    backbone = recipe(name).model.backbone
    trunk = backbone.net if "vitdet" in name else backbone.bottom_up
    expected = {"drop_path_rate": ROWS[name].drop_path, **BACKBONES[backbone_of(name)]}
    if "vitdet" in name:
        expected |= dict(window_size=14, img_size=1024, patch_size=16, norm_eps=1e-6)
        expected |= dict(use_rel_pos=True, use_abs_pos=True, residual_block_indexes=[])
    assert {key: trunk[key] for key in expected} == expected
    assert backbone.square_pad == 1024


def check_heads(name: str):
    model = recipe(name).model
    assert (model.input_format, model.pixel_mean) == ("RGB", [123.675, 116.28, 103.53])
    assert model.pixel_std == [58.395, 57.12, 57.375]
    assert model.proposal_generator.head.conv_dims == [-1, -1]
    assert model.proposal_generator.head.norm is None
    heads, stages = model.roi_heads, [(0.5, [10, 10, 5, 5])]
    predictors, matchers = [heads.get("box_predictor")], [heads.get("proposal_matcher")]
    if "cascade" in name:
        stages += [(0.6, [20, 20, 10, 10]), (0.7, [30, 30, 15, 15])]
        predictors, matchers = heads.box_predictors, heads.proposal_matchers
    assert [matcher.thresholds for matcher in matchers] == [[overlap] for overlap, _ in stages]
    assert [p.box2box_transform.weights for p in predictors] == [weights for _, weights in stages]
    expected: dict[str, Any] = dict(test_nms_thresh=0.5, num_classes=80)
    expected |= dict(test_score_thresh=0.05, test_topk_per_image=100)
    if name.startswith("LVIS"):
        expected |= dict(num_classes=1203, test_score_thresh=0.02, test_topk_per_image=300)
        expected |= dict(use_sigmoid_ce=True, use_fed_loss=True)
    if "cascade" in name:
        expected |= dict(cls_agnostic_bbox_reg=True)
    for predictor in predictors:
        assert {key: predictor[key] for key in expected} == expected
        assert ("get_fed_loss_cls_weights" in predictor) is name.startswith("LVIS")
        assert ("cls_agnostic_bbox_reg" in predictor) is ("cascade" in name)


def check_optimizer(name: str):
    optimizer = recipe(name).optimizer
    backbone = backbone_of(name)
    decay, decay_norm, without, rate = RULES.get(backbone) or RULES[backbone[:-2]]
    assert (optimizer.lr, optimizer.betas) == (ROWS[name].lr, [0.9, 0.999])
    rules = dict(weight_decay=decay, weight_decay_norm=decay_norm, no_decay=without)
    assert {key: optimizer[key] for key in rules} == rules
    assert optimizer.layer_decay_rate == rate
    table = parameter_table(model_of(name), **rules, layer_decay_rate=rate)
    assert {table[key].lr_multiplier for key in table if "roi_heads" in key} == {1.0}
    for key, setting in table.items():
        if key.endswith("relative_position_bias_table"):
            assert setting.weight_decay == 0.0
        if key.endswith(("qkv.weight", "rel_pos_h", "conv1.norm.weight")):
            assert setting.weight_decay == decay
        if key.endswith(("norm1.bias", "pos_embed")):
            assert setting.weight_decay == (0.1 if decay_norm is None else 0.0)
    if rate is not None:
        depth = BACKBONES[backbone]["depth"]
        first, last = "backbone.net.patch_embed.proj.weight", f"backbone.net.blocks.{depth - 1}."
        assert table[first].lr_multiplier == pytest.approx(rate ** (depth + 1))
        assert table[last + "attn.qkv.weight"].lr_multiplier == pytest.approx(rate)


def check_data_and_training(name: str):
    cfg, lvis = recipe(name), name.startswith("LVIS")
    train, test, evaluator = cfg.dataloader.train, cfg.dataloader.test, cfg.dataloader.evaluator
    stem = "lvis_v1" if lvis else "coco_2017"
    assert (train.dataset.name, test.dataset.name) == (f"{stem}_train", f"{stem}_val")
    assert evaluator.dataset.name == f"{stem}_val"
    assert (evaluator.max_dets, train.repeat_threshold) == ((300, 0.001) if lvis else (100, None))
    assert (train.total_batch_size, test.batch_size, train.seed) == (BATCH, 1, cfg.train.seed)
    assert train.mapper.image_format == test.mapper.image_format == cfg.model.input_format
    flip, scale, crop = instantiate(train.mapper.augmentations)
    assert flip.horizontal
    assert (scale.min_scale, scale.max_scale, scale.target_height) == (0.1, 2.0, 1024)
    assert (tuple(crop.crop_size), crop.pad) == ((1024, 1024), False)
    (resize,) = instantiate(test.mapper.augmentations)
    assert (list(resize.short_edge_length), resize.max_size) == ([1024], 1024)
    assert (cfg.train.precision, cfg.train.clip_grad_norm) == ("fp16", None)
    assert cfg.train.ddp.fp16_compression is True
    assert cfg.train.checkpoint_every == 5000 * BATCH
    assert cfg.train.eval_every == (30000 if lvis else 5000) * BATCH


def test_no_two_recipes_share_initial_weights():  # they list what that recipe initialises itself
    files = Counter(recipe(name).train.init_checkpoint for name in ROWS)
    assert max(files.values()) == 1, files


def check_header_and_docs(name: str):
    said, text = header(name), text_of(name)
    row, times = ROWS[name], times_of(name)
    assert f"box AP {row.box_ap}, mask AP {row.mask_ap}" in said
    assert f"Parameters {row.parameters / 1e6:.2f} M" in said
    assert f"{times.iterations} iterations x {BATCH} images" in said
    assert all(f" {milestone} (" in said for milestone in times.milestones)
    table = (ROOT / "docs/recipes.md").read_text()
    assert f"/{name}.py) | {row.box_ap} | {row.mask_ap} | {row.parameters / 1e6:.2f} |" in table
    warmup = f"{times.iterations * times.warmup_share:.1f}".removesuffix(".0")
    assert f"warm-up {warmup} iterations" in said
    assert said.count(f"python train_net.py --config-file configs/{name}.py") == 2
    assert "--eval-only train.init_checkpoint=" in said
    assert len(text.splitlines()) <= 45


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name: str, tmp_path: Path):
    """All that holds for every recipe."""
    check_calls_fit_their_callables(name)
    check_it_is_on_meta(name)
    check_schedule_is_in_order(name)
    check_it_loads_again(name, tmp_path)


@pytest.mark.parametrize("name", ROWS)
def test_published(name: str):
    """What was published for a recipe of detectron2."""
    check_parameters(name)
    check_learning_rate(name)
    check_backbone(name)
    check_heads(name)
    check_optimizer(name)
    check_data_and_training(name)
    check_header_and_docs(name)


def test_rpn_norm_switch():
    cfg = load_config(ROOT / "configs/COCO/mask_rcnn_vitdet_b_100ep.py")
    plain = shapes(build_model(cfg.model, device="meta"))
    cfg.model.proposal_generator.head.norm = L(channel_layer_norm)(eps=1e-6)
    normed = shapes(build_model(cfg.model, device="meta"))
    conv = "proposal_generator.rpn_head.conv.conv{}.{}"
    assert plain.keys() - normed.keys() == {conv.format(i, "bias") for i in (0, 1)}
    assert normed.keys() - plain.keys() == {
        conv.format(i, f"norm.{part}") for i in (0, 1) for part in ("weight", "bias")
    }


def published(file: str) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """{recipe: {name: (shape, dtype)}} of a file of published checkpoints' contents."""
    stem = {"detectron2_vitdet_coco.json": "COCO", "detectron2_vitdet_lvis.json": "LVIS"}[file]
    found = {}
    for entry in json.loads((CHECKPOINTS / file).read_text())["checkpoints"]:
        tensors = dict(entry["tensors"])
        for group in entry["blocks"]:
            for i in group["indexes"]:
                tensors |= {f"{group['prefix']}{i}.{k}": v for k, v in group["tensors"].items()}
        assert len(tensors) == entry["count"]
        name = f"{stem}/{Path(entry['source']).stem}"
        found[name] = {
            k: (tuple(size), getattr(torch, kind)) for k, (size, kind) in tensors.items()
        }
    return found


@pytest.mark.skipif(
    not (CHECKPOINTS / "detectron2_vitdet_coco.json").is_file(),
    reason=f"no published names in {CHECKPOINTS} (set VITDET_CHECKPOINTS)",
)
@pytest.mark.parametrize("file", ["detectron2_vitdet_coco.json", "detectron2_vitdet_lvis.json"])
def test_published_names_and_shapes(file: str):
    found = published(file)
    assert len(found) == 6  # the ViT rows
    for name, tensors in found.items():
        assert shapes(model_of(name)) == tensors, name
