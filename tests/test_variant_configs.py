"""Recipes of ViTAE, EasyCV, mmdetection 3.x and of the paper's own tables.

The expected values stand here a second time on purpose, as in test_configs.py, which tests these
recipes too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from torch import nn

from tests import recipes
from tests.recipes import ROOT, count, header, model_of, recipe, text_of
from vitdet.config import instantiate
from vitdet.layers.norms import ChannelLayerNorm

FOLDERS = ("easycv", "mmdetection", "paper", "vitae")
NAMES = [name for name in recipes.NAMES if name.split("/")[0] in FOLDERS]

# Published box and mask AP, parameters (counted). The counts of the rows that have weights are
# those of the published files (tests/convert/test_mmdet_families.py).
ROWS: dict[str, tuple[tuple[float, float] | None, int]] = {
    "easycv/cascade_mask_rcnn_vitdet_b_100ep": (None, 141_160_990),
    "easycv/faster_rcnn_vitdet_b_100ep": (None, 108_251_488),
    "easycv/mask_rcnn_vit_b_v06_attn_100ep": ((50.57, 44.96), 118_563_824),
    "easycv/mask_rcnn_vit_b_v06_basicblock_100ep": (None, 160_992_240),
    "easycv/mask_rcnn_vit_b_v06_bottleneck_100ep": (None, 121_028_592),
    "easycv/mask_rcnn_vit_b_v06_conv_100ep": (None, 139_752_432),
    "easycv/mask_rcnn_vitdet_b_100ep": ((50.65, 45.41), 110_895_792),
    "mmdetection/mask_rcnn_vitdet_b_100ep": ((51.6, 45.7), 110_895_792),
    "paper/fig5_retinanet_b": (None, 96_976_500),
    "paper/fig5_retinanet_h": (None, 644_629_364),
    "paper/fig5_retinanet_l": (None, 315_601_652),
    "paper/t10_lvis_in1k_b": ((37.2, 34.9), 116_939_778),
    "paper/t10_lvis_in1k_l": ((38.3, 36.0), 336_728_642),
    "paper/t10_lvis_in21k_b": ((38.7, 36.3), 116_939_778),
    "paper/t10_lvis_in21k_l": ((42.1, 39.5), 336_728_642),
    "paper/t1_pyramid_fpn_4stage_b": ((50.3, 44.9), 110_803_120),
    "paper/t1_pyramid_fpn_4stage_l": ((54.4, 48.4), 330_550_512),
    "paper/t1_pyramid_fpn_last_b": ((50.9, 45.3), 110_803_120),
    "paper/t1_pyramid_fpn_last_l": ((54.6, 48.5), 330_550_512),
    "paper/t1_pyramid_none_b": ((47.8, 42.5), 106_045_996),
    "paper/t1_pyramid_none_l": ((51.2, 45.4), 323_613_740),
    "paper/t1_pyramid_simple_b": ((51.2, 45.5), 110_803_120),
    "paper/t1_pyramid_simple_l": ((54.6, 48.6), 330_550_512),
    "paper/t2a_propagation_none_l": ((52.9, 47.2), 330_550_512),
    "paper/t2a_propagation_shifted_l": ((54.0, 47.9), 330_550_512),
    "paper/t2b_conv_basic_l": ((54.8, 48.8), 406_064_368),
    "paper/t2b_conv_bottleneck_l": ((54.6, 48.6), 344_198_384),
    "paper/t2b_conv_naive_l": ((54.3, 48.3), 368_307_440),
    "paper/t2c_placement_first_l": ((52.9, 47.1), 330_550_512),
    "paper/t2c_placement_last_l": ((54.3, 48.3), 330_550_512),
    "paper/t2d_count_2_l": ((54.4, 48.5), 330_550_512),
    "paper/t2d_count_all_l": ((55.1, 48.9), 330_550_512),
    "paper/t4_in1k_b": ((47.6, 42.4), 110_803_120),
    "paper/t4_in1k_l": ((49.6, 43.8), 330_550_512),
    "paper/t4_in21k_b": ((47.8, 42.6), 110_803_120),
    "paper/t4_in21k_l": ((50.6, 44.8), 330_550_512),
    "paper/t4_scratch_b": ((48.1, 42.6), 110_803_120),
    "paper/t4_scratch_l": ((50.0, 44.2), 330_550_512),
    "paper/t6_system_b": ((56.0, 48.0), 141_177_374),
    "paper/t6_system_h": ((60.4, 52.0), 691_489_438),
    "paper/t6_system_l": ((59.6, 51.1), 360_966_238),
    "paper/t7_lvis_system_h": ((53.4, 48.1), 695_231_274),
    "paper/t7_lvis_system_l": ((51.2, 46.0), 364_708_074),
    "paper/t8a_propagation_none_b": ((48.9, 43.9), 110_803_120),
    "paper/t8a_propagation_shifted_b": ((50.1, 44.8), 110_803_120),
    "paper/t8b_conv_basic_b": ((50.7, 45.2), 153_282_736),
    "paper/t8b_conv_bottleneck_b": ((51.0, 45.3), 118_483_120),
    "paper/t8b_conv_naive_b": ((50.6, 45.2), 132_042_928),
    "paper/t8c_placement_first_b": ((49.1, 44.1), 110_803_120),
    "paper/t8c_placement_last_b": ((50.9, 45.4), 110_803_120),
    "paper/t8d_count_2_b": ((50.7, 45.2), 110_803_120),
    "paper/t8d_count_all_b": ((50.4, 45.1), 110_803_120),
    "vitae/cascade_mask_rcnn_vit_b_100ep": (None, 148_829_022),
    "vitae/mask_rcnn_vit_b_100ep": ((51.1, 45.5), 118_563_824),
    "vitae/mask_rcnn_vit_b_conv_100ep": (None, 126_192_624),
    "vitae/mask_rcnn_vit_b_lvis_100ep": (None, 124_607_810),
    "vitae/mask_rcnn_vitae_b_100ep": ((51.6, 45.8), 121_334_768),
    "vitae/mask_rcnn_vitae_b_vitdet_100ep": (None, 116_662_704),
    "vitae/mask_rcnn_vitae_s_100ep": ((45.6, 40.1), 47_722_768),
}


def net_of(name: str) -> DictConfig:
    return recipe(name).model.backbone.net


def test_every_recipe_has_a_row() -> None:
    assert sorted(NAMES) == sorted(ROWS)


def check_parameters_and_header(name: str) -> None:
    ap, parameters = ROWS[name]
    assert count(model_of(name)) == parameters
    text = header(name)
    assert f"Parameters {parameters / 1e6:.2f} M" in text
    assert f"python train_net.py --config-file configs/{name}.py" in text
    if ap is None:
        assert "box AP" not in text.split("Published")[1].split("Parameters")[0]
    else:
        assert f"Published box AP {ap[0]}, mask AP {ap[1]}" in text
    assert len(text_of(name).splitlines()) <= 45


def check_initial_weights(name: str) -> None:
    stem = name.replace("/", "_").removesuffix("_100ep")
    assert recipe(name).train.init_checkpoint == f"weights/{stem}_init.pth"


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name: str) -> None:
    """All that was published for a recipe."""
    check_parameters_and_header(name)
    check_lengths(name)
    if not name.startswith("paper/t4_s"):
        check_initial_weights(name)
    if name.startswith(("vitae", "easycv", "mm")):
        check_norms_of_pyramid_and_heads(name)
    if name.startswith("paper/t"):
        check_relative_positions_and_drop_path(name)
    if name.startswith("paper") and "lvis" in name:
        check_lvis(name)
    if name.startswith(("paper/t6_system", "paper/t7_lvis_system")):
        check_system_level(name)


def test_families_are_whole() -> None:
    """Of the parts of `test_recipe` that some recipes have, so many do."""
    starts = ("vitae", "easycv", "mm"), ("paper/t",), ("paper/t6_system", "paper/t7_lvis_system")
    assert [sum(name.startswith(start) for name in NAMES) for start in starts] == [15, 41, 5]
    assert sum(name.startswith("paper") and "lvis" in name for name in NAMES) == 6


def test_all_names_of_a_header_lead_somewhere() -> None:
    for name in NAMES:
        for found in re.findall(r"as ([\w/]+\.py)", header(name)):
            assert (ROOT / "configs" / Path(name).parent / found).is_file(), (name, found)


# --- ViTAE, EasyCV, mmdetection ------------------------------------------------------------------

EPOCH = 117_266  # images of train2017 that have an object


def check_lengths(name: str) -> None:
    train, schedule = recipe(name).train, recipe(name).schedule
    of_images = name.startswith(("vitae", "easycv")) and "lvis" not in name
    if of_images and "vitdet_100ep" not in name.removeprefix("easycv/"):
        assert train.num_images == 100 * EPOCH
        assert list(schedule.milestones) == [88 * EPOCH, 96 * EPOCH]
        old = name.startswith("vitae") or "v06" in name
        assert schedule.warmup_factor == (0.067 if old else 0.001)
    else:
        iterations = [int(n) for n in re.findall(r"(\d+) iterations x 64 images", header(name))]
        assert [train.num_images] == [n * 64 for n in iterations]
        assert all(f" {milestone // 64} (" in header(name) for milestone in schedule.milestones)


def check_norms_of_pyramid_and_heads(name: str) -> None:
    """LN or GN(1), and their epsilon: nothing that a shape tells."""
    model = model_of(name)
    own = "vitdet_100ep" in name and name.startswith("vitae")  # detectron2's pyramid and heads
    kind = nn.GroupNorm if name.startswith("easycv") else ChannelLayerNorm
    eps = {"vitae": 1e-5, "easycv": 1e-5 if "v06" in name else 1e-6, "mmdetection": 1e-5}
    expected = 1e-6 if own else eps[name.split("/", maxsplit=1)[0]]
    between = [model.get_submodule("backbone.simfp_2.1")]
    norms = [
        module
        for name_, module in model.named_modules()
        if isinstance(module, nn.GroupNorm | ChannelLayerNorm) and "residual" not in name_
    ]
    different = (name.startswith("vitae") and not own) or "v06" in name
    if different:
        assert [(type(norm), norm.eps) for norm in between] == [(ChannelLayerNorm, 1e-6)]
        norms = [norm for norm in norms if norm is not between[0]]
    assert {(type(norm), norm.eps) for norm in norms} == {(kind, expected)}
    in_rpn = any(".rpn_head." in n and ".norm." in n for n, _ in model.named_parameters())
    assert in_rpn is different
    trunk = 1e-5 if name.startswith("mm") else 1e-6
    first = model.get_submodule("backbone.net")
    cells = [
        m for n, m in first.named_modules() if n.endswith(("norm1", "norm2")) and "RC" not in n
    ]
    assert {m.eps for m in cells if isinstance(m, nn.LayerNorm)} == {trunk}


def test_aggregations_of_the_first_easycv() -> None:
    kinds = {"attn": None, "conv": "naive", "basicblock": "basic", "bottleneck": "bottleneck"}
    for aggregation, kind in kinds.items():
        net = net_of(f"easycv/mask_rcnn_vit_b_v06_{aggregation}_100ep")
        assert net.final_norm
        assert not net.pretrain_use_cls_token
        blocks = (net.global_block_indexes, net.residual_block_indexes)
        if kind is None:
            assert blocks == ([2, 5, 8, 11], [])
        else:
            assert blocks == ([], [2, 5, 8, 11])
            assert (net.propagation, net.propagation_norm) == (kind, "BN")


def test_rules_of_the_optimizers() -> None:
    vitae = recipe("vitae/mask_rcnn_vitae_s_100ep").optimizer
    assert (vitae.lr, vitae.layer_decay_rate, vitae.num_layers) == (1e-4, 0.7, None)
    assert "optimizer.num_layers=12" in header("vitae/mask_rcnn_vitae_s_100ep")
    assert recipe("easycv/mask_rcnn_vit_b_v06_attn_100ep").optimizer.layer_decay_rate is None
    assert recipe("easycv/mask_rcnn_vitdet_b_100ep").optimizer.layer_decay_rate == 0.7
    for name, low in (
        ("vitae/mask_rcnn_vit_b_100ep", True),
        ("easycv/mask_rcnn_vitdet_b_100ep", False),
    ):
        assert recipe(name).model.roi_heads.proposal_matcher.allow_low_quality_matches is low


# --- the paper -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "b", "l"),
    [
        ("{t}a_propagation_none", [], []),
        ("{t}c_placement_first", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("{t}c_placement_last", [8, 9, 10, 11], [20, 21, 22, 23]),
        ("{t}d_count_2", [5, 11], [11, 23]),
        ("{t}d_count_all", list(range(12)), list(range(24))),
        ("t1_pyramid_simple", [2, 5, 8, 11], [5, 11, 17, 23]),
    ],
)
def test_placements_are_those_of_the_tables(row: str, b: list[int], l: list[int]) -> None:  # noqa: E741
    for size, table, blocks in (("b", "t8", b), ("l", "t2", l)):
        name = f"paper/{row.format(t=table)}_{size}"
        assert list(net_of(name).global_block_indexes) == blocks
        assert not net_of(name).get("residual_block_indexes")


@pytest.mark.parametrize("kind", ["naive", "basic", "bottleneck"])
def test_convolutions_stand_where_the_global_blocks_were(kind: str) -> None:
    for size, table, blocks in (("b", "t8", [2, 5, 8, 11]), ("l", "t2", [5, 11, 17, 23])):
        net = net_of(f"paper/{table}b_conv_{kind}_{size}")
        assert (net.global_block_indexes, net.residual_block_indexes) == ([], blocks)
        assert (net.propagation, net.propagation_norm) == (kind, "LN")


def test_parameters_of_table_3() -> None:
    """ViT-L with four convolution (bottleneck) blocks: 1.04 times that without; global: as many."""
    none = ROWS["paper/t2a_propagation_none_l"][1]
    assert round(none / 1e6) == 331
    assert round(ROWS["paper/t2b_conv_bottleneck_l"][1] / none, 2) == 1.04
    assert ROWS["paper/t2d_count_all_l"][1] == ROWS["paper/t1_pyramid_simple_l"][1] == none


def test_shifted_windows_alternate() -> None:
    for size, table, depth in (("b", "t8", 12), ("l", "t2", 24)):
        net = net_of(f"paper/{table}a_propagation_shifted_{size}")
        assert list(net.shifted_block_indexes) == list(range(1, depth, 2))
        assert list(net.global_block_indexes) == []


def test_pyramids_of_table_1() -> None:
    def backbone(row: str, size: str) -> DictConfig:
        return recipe(f"paper/t1_pyramid_{row}_{size}").model.backbone

    for size, blocks in (("b", [2, 5, 8]), ("l", [5, 11, 17])):
        assert list(backbone("none", size).scale_factors) == [1.0]
        stages = backbone("fpn_4stage", size)
        assert stages.net.out_block_indexes == blocks
        assert stages.in_feature == [f"block{i}" for i in blocks] + ["last_feat"]
        assert stages.top_down
        last = backbone("fpn_last", size)
        assert (last.in_feature, last.top_down) == ("last_feat", True)
        assert not backbone("simple", size).get("top_down")
    rpn = recipe("paper/t1_pyramid_none_b").model.proposal_generator
    assert (rpn.in_features, rpn.head.num_anchors) == (["p4"], 15)


def check_relative_positions_and_drop_path(name: str) -> None:
    ablation = not name.startswith(("paper/t6", "paper/t7", "paper/t10"))
    assert net_of(name).use_rel_pos is not ablation
    drop_path = {"b": 0.1, "l": 0.4, "h": 0.4 if "lvis" in name else 0.5}[name[-1]]
    assert net_of(name).drop_path_rate == drop_path


def test_hyperparameters_of_table_11() -> None:
    expected = {  # lr, weight decay, epochs, layer-wise lr decay
        "paper/t4_scratch_b": (1.6e-4, 0.2, 300, None),
        "paper/t4_scratch_l": (1.6e-4, 0.2, 200, None),
        **{f"paper/t4_in{k}k_{s}": (8e-5, 0.1, 50, None) for k in (1, 21) for s in "bl"},
        "paper/t1_pyramid_simple_b": (1e-4, 0.1, 100, 0.7),
        "paper/t1_pyramid_simple_l": (1e-4, 0.1, 100, 0.8),
    }
    for name, (lr, decay, epochs, rate) in expected.items():
        optimizer, train = recipe(name).optimizer, recipe(name).train
        got: tuple[Any, ...] = (optimizer.lr, optimizer.weight_decay, optimizer.layer_decay_rate)
        assert got == (lr, decay, rate), name
        assert train.num_images / 64 == pytest.approx(184375 * epochs / 100, abs=1)
        assert bool(train.init_checkpoint) is ("scratch" not in name)


def check_lvis(name: str) -> None:
    """App. A.2: 0.02 as lowest score, repeat factors from 0.001, up to 300 detections."""
    cfg = recipe(name)
    assert cfg.dataloader.train.dataset.name == "lvis_v1_train"
    assert (cfg.dataloader.train.repeat_threshold, cfg.dataloader.evaluator.max_dets) == (
        0.001,
        300,
    )
    heads = cfg.model.roi_heads
    for predictor in heads.get("box_predictors") or [heads.box_predictor]:
        assert (predictor.test_score_thresh, predictor.test_topk_per_image) == (0.02, 300)
        assert predictor.use_fed_loss
    optimizer = cfg.optimizer
    rate = {"7_l": (2e-4, 0.8), "7_h": (1e-4, 0.9)}.get(f"{name[7]}_{name[-1]}", (1.6e-4, None))
    assert (optimizer.lr, optimizer.layer_decay_rate, optimizer.weight_decay) == (*rate, 0.1)
    epochs = 100 if "t7" in name else 50
    assert cfg.train.num_images / 64 == 156250 * epochs / 100


def check_system_level(name: str) -> None:
    cfg = recipe(name)
    assert (cfg.model.backbone.square_pad, cfg.model.backbone.net.img_size) == (1280, 1280)
    _, scale, crop = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert (scale.target_height, tuple(crop.crop_size)) == (1280, (1280, 1280))
    (resize,) = instantiate(cfg.dataloader.test.mapper.augmentations)
    assert (list(resize.short_edge_length), resize.max_size) == ([1280], 1280)
    assert cfg.model.roi_heads.use_soft_nms
    assert (cfg.model.roi_heads.method, cfg.model.roi_heads.iou_threshold) == ("linear", 0.5)
    assert len(cfg.model.roi_heads.box_heads) == 3


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_retinanet_has_five_levels(size: str) -> None:
    model: Any = model_of(f"paper/fig5_retinanet_{size}")
    shapes = model.backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {
        f"p{i}": 2**i for i in range(3, 8)
    }
    assert model.head_in_features == list(shapes)
