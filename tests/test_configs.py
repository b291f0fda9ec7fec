"""Every recipe under configs/: it builds, it reloads, and it has the numbers that were published.

The expected values stand here and in published.csv a second time on purpose: a slip in a recipe
shows as a difference. Sources: facebookresearch/detectron2 projects/ViTDet, baaivision/EVA
EVA-02/det, ViTAE-Transformer/ViTDet, alibaba/EasyCV, open-mmlab/mmdetection projects/ViTDet,
microsoft/VisionLongformerForObjectDetection, and the tables of ViTDet (arXiv 2203.16527).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from tests.recipes import (
    CONFIGS,
    NAMES,
    PUBLISHED,
    TABLES,
    count,
    each,
    model_of,
    recipe,
    rows,
)
from vitdet import heads, plain_recipes
from vitdet.config import (
    build_model,
    config_text,
    instantiate,
    load_config,
    save_config,
)
from vitdet.utils.checks import InputError

MASK = "cascade_mask_rcnn_eva02"


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


def test_every_recipe_is_found():
    families = Counter(name.rpartition("/")[0] for name in NAMES)
    assert families == {
        **{"COCO": 18, "LVIS": 17, "O365": 1, "easycv": 7, "mmdetection": 1, "paper": 44},
        **{"vil": 25, "vitae": 7, "own": 8, "mini": 5, "mini/variants": 12},
    }
    assert {name for name in NAMES if not name.startswith(("own/", "mini/"))} == set(PUBLISHED)


def test_the_old_path_of_a_row_is_its_name(tmp_path):
    with pytest.raises(InputError, match=r"paper/t4_in1kb\.py\. Did you mean .*/t4_in1k_b\.py\?"):
        load_config(CONFIGS / "paper/t4_in1kb.py")
    with pytest.raises(InputError, match=r"paper\.py is a table of recipes\. Name a row, as .*/t1"):
        load_config(CONFIGS / "paper.py")
    with pytest.raises(InputError, match=r"expected a recipe, got .*none/x\.py\. Recipes lie"):
        load_config(tmp_path / "none/x.py")
    changed = load_config(CONFIGS / "COCO/cascade_mask_rcnn_vitdet_b_100ep.py", ["train.seed=3"])
    assert (changed.train.seed, len(changed.model.roi_heads.box_heads)) == (3, 3)


@pytest.mark.parametrize("name", each(NAMES))
def test_recipe(name: str, tmp_path: Path):
    cfg = recipe(name)
    assert sorted(cfg) == ["dataloader", "model", "optimizer", "schedule", "train"]
    assert {value.device.type for value in model_of(name).parameters()} == {"meta"}
    save_config(cfg, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert config_text(again) == config_text(cfg)
    ends = [*cfg.schedule.get("milestones", []), cfg.train.num_images]
    assert [cfg.schedule.warmup, *ends] == sorted({cfg.schedule.warmup, *ends})
    assert cfg.schedule.num_images == cfg.train.num_images
    if name in PUBLISHED:
        assert count(model_of(name)) == PUBLISHED[name].parameters
        family, _, stem = name.partition("/")
        stem = re.sub(r"_\d+ep$", "", stem)
        weights = f"weights/{'coco' if family == 'vil' else family.lower()}_{stem}_init.pth"
        assert cfg.train.init_checkpoint == ("" if "scratch" in name else weights)


@pytest.mark.parametrize("family", [name for name in TABLES if "/" not in name and name != "own"])
def test_rows_say_what_was_published(family: str):
    for name, row in rows(family).items():
        published = PUBLISHED[f"{family}/{name}"]
        assert f"{row.millions:.2f}" == f"{published.parameters / 1e6:.2f}", name
        # the row of Objects365 joins two files: boxes of one, masks of the other
        expected = "/".join(filter(None, (published.box_ap, published.mask_ap)))
        assert row.published == (expected if "coco_det_sys" not in row.source else "64.1/55.4")


# {pattern of names: {key in the recipe: value}}; `net` is the transformer, `head` a box predictor
LARGE = {"net.embed_dim": 1024, "net.depth": 24, "net.num_heads": 16}
BASE = {"net.embed_dim": 768, "net.depth": 12, "net.num_heads": 12}
EIGHT = [2, 5, 8, 11, 14, 17, 20, 23]
SOFT = {"use_soft_nms": True, "method": "linear", "class_wise": True, "iou_threshold": 0.6}
VALUES: tuple[tuple[str, dict[str, Any]], ...] = (
    # data, heads and training of all that come from detectron2 and its descendants
    (
        r"(?!.*_pe_)(COCO|LVIS|paper|vitae|easycv|mm).*",
        {
            "model.pixel_mean": [123.675, 116.28, 103.53],
            "model.pixel_std": [58.395, 57.12, 57.375],
        },
    ),
    (
        r"(COCO|LVIS|paper|vitae|easycv|mm).*",
        {
            "model.input_format": "RGB",
            "train.clip_grad_norm": None,
            "dataloader.train.mapper.recompute_boxes": True,
            "dataloader.test.batch_size": 1,
            "optimizer.betas": [0.9, 0.999],
        },
    ),
    (r"(COCO|LVIS|paper|mm).*", {"train.precision": "fp16", "train.ddp.fp16_compression": True}),
    (r"vitae/(?!.*vitdet).*", {"train.precision": "fp32", "train.ddp.fp16_compression": False}),
    (
        r"(COCO|paper/(?!.*lvis)|easycv|mm|vitae/(?!.*lvis)|vil).*",
        {
            "dataloader.train.dataset.name": "coco_2017_train",
            "dataloader.evaluator.dataset.name": "coco_2017_val",
            "dataloader.evaluator.max_dets": 100,
            "dataloader.train.repeat_threshold": None,
        },
    ),
    (
        r"LVIS/(?!.*eva02).*|paper/.*lvis.*|vitae/.*lvis.*",
        {
            "dataloader.train.dataset.name": "lvis_v1_train",
            "dataloader.evaluator.dataset.name": "lvis_v1_val",
            "dataloader.evaluator.max_dets": 300,
            "dataloader.train.repeat_threshold": 0.001,
            "model.roi_heads.num_classes": 1203,
            "head.test_score_thresh": 0.02,
            "head.test_topk_per_image": 300,
            "head.use_sigmoid_ce": True,
            "head.use_fed_loss": True,
            "train.eval_every": 30000 * 64,
        },
    ),
    (r"COCO/(?!.*eva02).*", {"head.test_score_thresh": 0.05, "head.test_topk_per_image": 100}),
    # backbones
    (
        r"(COCO|LVIS)/.*vitdet.*|paper/(?!fig).*",
        {"net.window_size": 14, "net.patch_size": 16, "net.norm_eps": 1e-6},
    ),
    (r"(COCO|LVIS)/.*vitdet.*|paper/t(6|7|10).*", {"net.use_rel_pos": True}),
    (r"paper/t[1248][a-d_].*", {"net.use_rel_pos": False}),
    (r"(COCO|LVIS)/.*vitdet_b.*", BASE | {"net.global_block_indexes": [2, 5, 8, 11]}),
    (r"(COCO|LVIS)/.*vitdet_l.*", LARGE | {"net.global_block_indexes": [5, 11, 17, 23]}),
    (
        r"(COCO|LVIS)/.*vitdet_h.*",
        {
            **{"net.embed_dim": 1280, "net.depth": 32, "net.num_heads": 16},
            "net.global_block_indexes": [7, 15, 23, 31],
        },
    ),
    (r"(COCO|LVIS|paper)/.*(vitdet_b_.*|_b)", {"net.drop_path_rate": 0.1}),
    (r"(COCO|LVIS)/.*vitdet_l_.*|paper/(?!fig).*_l", {"net.drop_path_rate": 0.4}),
    (r"COCO/.*vitdet_h_.*|paper/(fig5|t6).*_h", {"net.drop_path_rate": 0.5}),
    (r"LVIS/.*vitdet_h_.*|paper/t7.*_h", {"net.drop_path_rate": 0.4}),
    (r".*swin_b.*", {"net.embed_dim": 128, "net.depths": [2, 2, 18, 2], "net.window_size": 7}),
    (r".*swin_l.*", {"net.embed_dim": 192, "net.num_heads": [6, 12, 24, 48]}),
    (r"COCO.*swin.*", {"net.drop_path_rate": 0.4}),
    (r"LVIS.*swin.*", {"net.drop_path_rate": 0.3}),
    (r".*mvitv2_b.*", {"net.last_block_indexes": [1, 4, 20, 23], "net.drop_path_rate": 0.4}),
    (r".*mvitv2_l.*", {"net.last_block_indexes": [1, 7, 43, 47], "net.drop_path_rate": 0.5}),
    (r".*mvitv2_h.*", {"net.last_block_indexes": [3, 11, 71, 79], "net.drop_path_rate": 0.6}),
    # rules of the optimizer: weight decay, that of norms (None: the same), names without any
    (
        r"(COCO|LVIS)/.*(vitdet_[bl]|mvitv2).*",
        {
            "optimizer.weight_decay": 0.1,
            "optimizer.weight_decay_norm": 0.0,
            "optimizer.no_decay": ["pos_embed"],
        },
    ),
    (r"(COCO|LVIS)/.*vitdet_h.*", {"optimizer.weight_decay_norm": None, "optimizer.no_decay": []}),
    (
        r".*swin.*",
        {
            "optimizer.weight_decay": 0.05,
            "optimizer.no_decay": ["relative_position_bias_table"],
        },
    ),
    (r"paper/t4_scratch.*", {"optimizer.weight_decay": 0.2, "optimizer.layer_decay_rate": None}),
    (
        r"(COCO|LVIS|O365)/.*eva02.*|mini/mask_rcnn_eva02.*",
        {"optimizer.weight_decay_norm": None, "optimizer.no_decay": []},
    ),
    (r"vitae/(?!.*vitdet).*", {"optimizer.no_decay": ["pos_embed", "cls_token", "rel_pos_"]}),
    (r"vitae/mask_rcnn_vitae_s.*", {"optimizer.num_layers": None}),
    (r"vitae/mask_rcnn_vit_b_100ep", {"low": True}),
    (r"easycv/mask_rcnn_vit_b_v06.*", {"low": True, "net.final_norm": True}),
    (r"(easycv/mask_rcnn_vitdet|COCO/mask).*", {"low": False}),
    # EVA-02
    (
        r"(COCO|LVIS|O365)/.*eva02.*",
        {
            **{"net.mlp_ratio": 4 * 2 / 3, "net.rope_pretrain_grid": 16, "net.patch_size": 16},
            "optimizer.weight_decay": 0.1,
            "head.test_nms_thresh": 0.5,
        },
    ),
    (r".*eva02_b_.*", BASE | {"net.drop_path_rate": 0.1, "optimizer.layer_decay_rate": 0.7}),
    (r".*eva02_l.*", LARGE | {"optimizer.layer_decay_rate": 0.8}),
    (r".*eva02_b_bsl", {"net.global_block_indexes": [2, 5, 8, 11], "net.window_size": 16}),
    (r".*eva02_l_bsl", {"net.global_block_indexes": [5, 11, 17, 23], "net.window_size": 16}),
    (r".*eva02_b_sys", {"net.global_block_indexes": [1, 3, 5, 7, 9, 11], "net.window_size": 32}),
    (r".*eva02_l_sys", {"net.global_block_indexes": EIGHT, "net.window_size": 32}),
    (
        r".*eva02_l_sys_o365|O365.*",
        {"net.global_block_indexes": EIGHT, "net.window_size": 16},
    ),
    (r".*eva02_l_sys.*", {"net.checkpoint_blocks": list(range(24))}),
    (r".*eva02_l_(bsl|sys)|O365.*", {"net.drop_path_rate": 0.4}),
    (
        r".*eva02_l_sys_o365",
        {"net.drop_path_rate": 0.3, "train.ema_decay": 0.9999, "train.eval_weights": "ema"},
    ),
    (r".*eva02_._bsl", {"model.roi_heads.use_soft_nms": None}),
    (
        r"COCO/.*eva02.*sys.*",
        {f"model.roi_heads.{key}": value for key, value in SOFT.items()}
        | {
            "model.roi_heads.override_score_thresh": 0.0,
            "model.roi_heads.maskness_thresh": None,
            "head.test_topk_per_image": 1000,
        },
    ),
    (
        r"LVIS/.*eva02.*sys.*",
        {f"model.roi_heads.{key}": value for key, value in SOFT.items()}
        | {
            "model.roi_heads.override_score_thresh": None,
            "model.roi_heads.maskness_thresh": 0.5,
            "head.test_topk_per_image": 1000,
            "head.test_score_thresh": 0.02,
        },
    ),
    (r"LVIS/.*eva02_l_sys_o365", {"dataloader.evaluator.max_dets": 1000}),
    (r"LVIS/.*eva02_l_sys", {"dataloader.evaluator.max_dets": 300}),
    (
        r"O365/.*",
        {
            "dataloader.train.dataset.names": ["objects365_v2_train", "objects365_v2_val"],
            "dataloader.evaluator.dataset.name": "objects365_v2_val",
            "dataloader.train.mapper.use_masks": False,
            "model.roi_heads.num_classes": 365,
            "model.roi_heads.mask_head": None,
        },
    ),
    # Perception Encoder
    (
        r".*_pe_.*",
        {
            **{"model.pixel_mean": [127.0] * 3, "model.pixel_std": [127.0] * 3},
            **{"net.embed_dim": 1536, "net.depth": 50, "net.num_heads": 16, "net.rope": "pe"},
            **{"net.mlp_ratio": 8960 / 1536, "net.window_size": 32, "net.rope_pretrain_grid": 32},
            **{"net.global_block_indexes": [12, 24, 36, 49], "net.pretrain_img_size": 512},
            **{"net.pos_embed_resize": "tile", "net.norm_eps": 1e-5, "net.drop_path_rate": 0.5},
            **{"optimizer.weight_decay_norm": None, "optimizer.no_decay": []},
            **{"optimizer.weight_decay": 0.1, "net.checkpoint_blocks": list(range(50))},
        },
    ),
    (r".*_pe_core.*", {"net.layer_scale": None}),
    (r".*_pe_spatial.*", {"net.layer_scale": True}),
    # the paper: where blocks are global, and what stands for them
    (r"paper/t[28]a_propagation_none_.", {"net.global_block_indexes": []}),
    (r"paper/t[28]c_placement_first_.", {"net.global_block_indexes": [0, 1, 2, 3]}),
    (r"paper/t8c_placement_last_b", {"net.global_block_indexes": [8, 9, 10, 11]}),
    (r"paper/t2c_placement_last_l", {"net.global_block_indexes": [20, 21, 22, 23]}),
    (r"paper/t8d_count_2_b", {"net.global_block_indexes": [5, 11]}),
    (r"paper/t2d_count_2_l", {"net.global_block_indexes": [11, 23]}),
    (r"paper/t8d_count_all_b", {"net.global_block_indexes": list(range(12))}),
    (r"paper/t2d_count_all_l", {"net.global_block_indexes": list(range(24))}),
    (r"paper/t8a_propagation_shifted_b", {"net.shifted_block_indexes": list(range(1, 12, 2))}),
    (r"paper/t2a_propagation_shifted_l", {"net.shifted_block_indexes": list(range(1, 24, 2))}),
    *(
        (
            rf"paper/t[28]b_conv_{kind}_.",
            {"net.global_block_indexes": [], "net.propagation": kind, "net.propagation_norm": "LN"},
        )
        for kind in ("naive", "basic", "bottleneck")
    ),
    (r"paper/t8b_conv.*", {"net.residual_block_indexes": [2, 5, 8, 11]}),
    (r"paper/t2b_conv.*", {"net.residual_block_indexes": [5, 11, 17, 23]}),
    (
        r"paper/t1_pyramid_none_.",
        {
            "model.backbone.scale_factors": [1.0],
            "model.proposal_generator.in_features": ["p4"],
            "model.proposal_generator.head.num_anchors": 15,
        },
    ),
    (r"paper/t1_pyramid_fpn_.*", {"model.backbone.top_down": True}),
    (r"paper/t1_pyramid_fpn_4stage_b", {"net.out_block_indexes": [2, 5, 8]}),
    (
        r"paper/t1_pyramid_fpn_4stage_l",
        {"model.backbone.in_feature": ["block5", "block11", "block17", "last_feat"]},
    ),
    (
        r"paper/(t6|t7).*",
        {"model.roi_heads.use_soft_nms": True, "model.roi_heads.iou_threshold": 0.5},
    ),
    # EasyCV's first generation
    (r"easycv/.*v06_attn.*", {"net.global_block_indexes": [2, 5, 8, 11]}),
    (r"easycv/.*v06_(conv|b).*", {"net.global_block_indexes": [], "net.propagation_norm": "BN"}),
    (r"easycv/.*v06_conv.*", {"net.propagation": "naive"}),
    (r"easycv/.*v06_basicblock.*", {"net.propagation": "basic"}),
    # Vision Longformer
    (
        r"vil/.*",
        {
            **{"net.patch_size": [4, 2, 2, 2], "net.img_size": 1333, "net.norm_embed": True},
            **{"optimizer.weight_decay": 0.05, "optimizer.weight_decay_norm": None},
            "optimizer.no_decay": [],
            "train.eval_every": 7330 * 16,
        },
    ),
    (r"vil/mask.*", {"train.clip_grad_norm": 0.5, "dataloader.train.mapper.use_masks": True}),
    (r"vil/retina.*", {"train.clip_grad_norm": 1.0, "dataloader.train.mapper.use_masks": False}),
    (r"vil/.*tiny_1x", {"net.drop_path_rate": 0.05}),
    (r"vil/.*tiny.*", {"net.embed_dim": [48, 96, 192, 384], "net.depth": [1, 1, 9, 1]}),
    (r"vil/.*small.*", {"net.embed_dim": [96, 192, 384, 768], "net.depth": [1, 2, 8, 1]}),
    (r"vil/.*medium_d.*", {"net.depth": [1, 4, 16, 1], "net.num_heads": [3, 3, 6, 12]}),
    (r"vil/.*base_d.*", {"net.depth": [1, 8, 24, 1], "net.drop_path_rate": 0.3}),
    (r"vil/.*_vil_(tiny|small|medium|base).*", {"net.use_abs_pos": [False] * 4}),
    (r"vil/.*srformer64.*", {"net.attention_size": [16, 8, 4, 2]}),
    (r"vil/.*srformer32_small.*", {"net.attention": ["srformer"] * 3 + ["full"]}),
    (r"vil/.*srformer32_partial.*", {"net.attention": ["srformer"] * 2 + ["full"] * 2}),
    (r"vil/.*global_small.*", {"net.num_global_tokens": [256, 256, 64, 16]}),
    (r"vil/.*global_partial.*", {"net.num_global_tokens": [256, 256, 1, 0]}),
    (r"vil/.*performer_small.*", {"net.attention": ["performer"] * 4}),
    (r"vil/.*performer_partial.*", {"net.attention_size": [256] * 4, "net.drop_path_rate": 0.05}),
    (r"vil/.*ape_partial.*", {"net.attention": ["vil", "vil", "full", "full"]}),
)


def value_of(cfg: DictConfig, key: str) -> Any:
    backbone = cfg.model.backbone
    first, _, rest = key.partition(".")
    if key == "low":
        return cfg.model.roi_heads.proposal_matcher.allow_low_quality_matches
    if first == "head":
        found = cfg.model.roi_heads
        cfg, key = (found.get("box_predictors") or [found.box_predictor])[-1], rest
    elif first == "net":
        cfg, key = backbone.get("net") or backbone.bottom_up, rest
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "expected"), VALUES, ids=[pattern for pattern, _ in VALUES])
def test_published_values(pattern: str, expected: dict[str, Any]):
    found = [name for name in NAMES if re.fullmatch(pattern, name)]
    assert found
    for name in found:
        values = {key: value_of(recipe(name), key) for key in expected}
        assert values == expected, name


SIZES = (  # pixels in training and evaluation, large-scale jitter
    (r"(COCO|LVIS)/(?!.*eva02_._sys).*|paper/t[1248].*|(easycv|vitae|mm).*", 1024),
    (r"(COCO|LVIS|O365)/.*eva02_(._sys.*|l)", 1536),
    (r"paper/t[67].*", 1280),
)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "pixels"), SIZES)
def test_sizes(pattern: str, pixels: int):
    for name in [name for name in NAMES if re.fullmatch(pattern, name)]:
        data, backbone = recipe(name).dataloader, recipe(name).model.backbone
        flip, scale, crop = instantiate(data.train.mapper.augmentations)
        (resize,) = instantiate(data.test.mapper.augmentations)
        assert flip.horizontal
        assert (scale.min_scale, scale.max_scale, scale.target_height) == (0.1, 2.0, pixels)
        assert (tuple(crop.crop_size), crop.pad) == ((pixels, pixels), False)
        assert (list(resize.short_edge_length), resize.max_size) == ([pixels], pixels)
        assert backbone.square_pad == pixels, name
    for name in ("vil/mask_rcnn_vil_small_3x", "vil/mask_rcnn_vil_small_1x"):
        _, resize = instantiate(recipe(name).dataloader.train.mapper.augmentations)
        several = [640, 672, 704, 736, 768, 800] if name.endswith("3x") else [800]
        assert (list(resize.short_edge_length), resize.max_size) == (several, 1333)


def test_the_published_flags_work_on_every_recipe_of_eva02():
    """EVA's README evaluates with these, in this spelling."""
    flags = ["use_soft_nms=True", "class_wise=True", "method=linear", "iou_threshold=0.6"]
    flags += ["override_score_thresh=0.0", "maskness_thresh=0.5"]
    path = CONFIGS / f"COCO/{MASK}_b_bsl.py"
    cfg = load_config(path, [f"model.roi_heads.{flag}" for flag in flags])
    module: Any = build_model(cfg.model, "meta").roi_heads
    assert type(module) is heads.CascadeROIHeads
    assert (module.use_soft_nms, module.iou_threshold, module.maskness_thresh) == (True, 0.6, 0.5)
    assert module.override_score_thresh == 0.0
    plain: Any = model_of(f"COCO/{MASK}_b_bsl").roi_heads
    assert (type(plain), plain.plain) == (heads.CascadeROIHeads, True)


@pytest.mark.slow
def test_a_recipe_from_elsewhere_may_build_what_these_build():
    """Put a part that a recipe builds anew into PARTS, and take out what none builds any more."""
    found: dict[str, set[str]] = {place: set() for place in plain_recipes.PARTS}
    for name in [*NAMES, "common/models/cascade_mask_rcnn_eva01"]:  # of no recipe yet
        for key, node in calls(recipe(name)):
            place = plain_recipes._place(tuple(key.split(".")[1:]))
            found[place].add(_convert_target_to_string(target(node)))
    for place, names in plain_recipes.PARTS.items():
        assert found[place] ^ names == set(), place
