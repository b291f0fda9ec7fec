"""The EVA-02 recipes: their numbers, the published names, and how they evaluate.

The expected values stand here a second time on purpose. Source: baaivision/EVA, EVA-02/det, README
and projects/ViTDet/configs.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from test_configs import CHECKPOINTS

from tests.recipes import NAMES, ROOT, count, header, model_of, recipe, shapes, text_of
from vitdet import heads
from vitdet.config import build_model, instantiate, load_config
from vitdet.optim import parameter_table
from vitdet.utils.checks import InputError

MASK = "cascade_mask_rcnn_eva02"
FOUR = {"b": [2, 5, 8, 11], "l": [5, 11, 17, 23]}
EIGHT = [2, 5, 8, 11, 14, 17, 20, 23]


class Row(NamedTuple):
    """What was published for one recipe; `names` are those of its rows in the README."""

    names: tuple[str, ...]
    ap: tuple[str, ...]  # as the header writes it
    pixels: int
    window: int
    blocks: list[int]
    drop_path: float
    layer_decay: float
    lr: float
    batch: int
    iterations: int
    start: str = ""  # what the README calls the initial weights
    warmup: int = 1000


ROWS = {
    f"COCO/{MASK}_b_bsl": Row(
        *(("eva02_B_coco_bsl",), ("box AP 55.5, mask AP 47.1", "55.5017 / 47.0794"), 1024, 16),
        *(FOUR["b"], 0.1, 0.7, 5e-5, 128, 60_000, "eva02_B_pt_in21k_p14to16"),
    ),
    f"COCO/{MASK}_l_bsl": Row(
        *(("eva02_L_coco_bsl",), ("box AP 59.2, mask AP 50.8", "59.1550 / 50.7923"), 1024, 16),
        *(FOUR["l"], 0.4, 0.8, 6e-5, 144, 60_000, "eva02_L_pt_m38m_p14to16"),
    ),
    f"COCO/{MASK}_b_sys": Row(
        *(("eva02_B_coco_sys",), ("box AP 58.9, mask AP 50.7", "58.9331 / 50.6875"), 1536, 32),
        *([1, 3, 5, 7, 9, 11], 0.1, 0.7, 5e-5, 128, 60_000, "eva02_B_pt_in21k_p14to16"),
    ),
    f"COCO/{MASK}_l_sys": Row(
        *(("eva02_L_coco_sys",), ("box AP 62.3, mask AP 53.8", "62.2848 / 53.8006"), 1536, 32),
        *(EIGHT, 0.4, 0.8, 5e-5, 128, 60_000, "eva02_L_pt_m38m_p14to16"),
    ),
    f"COCO/{MASK}_l_sys_o365": Row(
        ("eva02_L_coco_det_sys_o365", "eva02_L_coco_seg_sys_o365"),
        ("box AP 64.1, mask AP 54.3", "box AP 63.9, mask AP 55.4", "64.1442", "55.3584"),
        *(1536, 16, EIGHT, 0.3, 0.8, 4e-5, 64, 40_000, "eva02_L_m38m_to_o365", 400),
    ),
    f"LVIS/{MASK}_b_bsl": Row(
        *(("eva02_B_lvis_bsl",), ("box AP 47.1, mask AP 41.4", "47.1304 / 41.3575"), 1024, 16),
        *(FOUR["b"], 0.1, 0.7, 1e-4, 128, 50_000, "eva02_B_pt_in21k_p14to16"),
    ),
    f"LVIS/{MASK}_l_bsl": Row(
        *(("eva02_L_lvis_bsl",), ("box AP 55.3, mask AP 48.6", "55.2866 / 48.5964"), 1024, 16),
        *(FOUR["l"], 0.4, 0.8, 1e-4, 128, 40_000, "eva02_L_pt_in21k_p14to16"),
    ),
    f"LVIS/{MASK}_l_sys": Row(
        *(("eva02_L_lvis_sys",), ("box AP 60.1, mask AP 53.5", "60.0506 / 53.5098"), 1536, 32),
        *(EIGHT, 0.4, 0.8, 1e-4, 128, 40_000, "eva02_L_pt_in21k_p14to16"),
    ),
    f"LVIS/{MASK}_l_sys_o365": Row(
        *(("eva02_L_lvis_sys_o365",), ("box AP 65.2, mask AP 57.3", "65.2244 / 57.3209")),
        *(1536, 16, EIGHT, 0.3, 0.8, 4e-5, 64, 70_000, "eva02_L_in21k_to_o365", 700),
    ),
    "O365/cascade_rcnn_eva02_l": Row(
        *(("eva02_L_m38m_to_o365", "eva02_L_in21k_to_o365"), ("no AP",), 1536, 16, EIGHT),
        *(0.4, 0.8, 6e-5, 160, 400_000, "eva02_L_pt_m38m_p14to16.pt (to go on to COCO)", 5000),
    ),
}


def from_o365(name: str) -> bool:
    return name.endswith("sys_o365")


def is_system(name: str) -> bool:
    return "_sys" in name


def test_all_twelve_rows_have_a_recipe():
    found = {n for n in NAMES if "eva02" in n and not n.startswith(("mini/", "own/"))}
    assert found == set(ROWS)
    assert len({row for each in ROWS.values() for row in each.names}) == 12


def check_backbone(name: str):
    row, net = ROWS[name], recipe(name).model.backbone.net
    size = dict(embed_dim=768, depth=12, num_heads=12)
    if "_l" in name:
        size = dict(embed_dim=1024, depth=24, num_heads=16)
    expected: dict[str, Any] = dict(img_size=row.pixels, patch_size=16, norm_eps=1e-6, **size)
    expected |= dict(window_size=row.window, drop_path_rate=row.drop_path, mlp_ratio=4 * 2 / 3)
    expected |= dict(rope_pretrain_grid=16, rope_interpolate=True, pretrain_img_size=224)
    expected |= dict(global_block_indexes=row.blocks, residual_block_indexes=[], qkv_bias=True)
    checkpointed = is_system(name) and "_l" in name
    expected |= dict(checkpoint_blocks=list(range(24)) if checkpointed else [])
    assert {key: net[key] for key in expected} == expected
    assert recipe(name).model.backbone.square_pad == row.pixels
    assert row.pixels // 16 % row.window == 0  # no window is padded


def check_optimizer(name: str):
    row, optimizer = ROWS[name], recipe(name).optimizer
    assert (optimizer.lr, optimizer.betas) == (row.lr, [0.9, 0.999])
    rules = dict(weight_decay=0.1, weight_decay_norm=None, no_decay=[])
    assert {key: optimizer[key] for key in rules} == rules
    assert optimizer.layer_decay_rate == row.layer_decay
    table = parameter_table(model_of(name), **rules, layer_decay_rate=row.layer_decay)
    assert {setting.weight_decay for setting in table.values()} == {0.1}
    depth = recipe(name).model.backbone.net.depth
    first = table["backbone.net.pos_embed"].lr_multiplier
    assert first == pytest.approx(row.layer_decay ** (depth + 1))
    assert {table[key].lr_multiplier for key in table if "backbone.net" not in key} == {1.0}


def check_learning_rate(name: str):
    """Against the schedulers that EVA trained with: after the step 90 % a hundredth is left."""
    row, cfg = ROWS[name], recipe(name)
    steps = [row.iterations * 8 // 10, row.iterations * 9 // 10]
    after: Any = MultiStepParamScheduler([1.0, 0.1, 0.01], row.iterations, steps)
    if from_o365(name):
        after = CosineParamScheduler(start_value=1, end_value=1)
    published = WarmupParamScheduler(after, 0.001, row.warmup / row.iterations)
    assert cfg.train.num_images == row.iterations * row.batch
    assert cfg.dataloader.train.total_batch_size == row.batch
    multiplier = instantiate(cfg.schedule)
    near = {point + step for point in (0, row.warmup, *steps) for step in (-1, 0, 1)}
    for iteration in sorted({*near, 60, row.iterations - 1}):
        if 0 <= iteration < row.iterations:
            theirs = published(iteration / row.iterations)
            assert multiplier(iteration / row.iterations) == pytest.approx(theirs, rel=1e-5), (
                iteration
            )


def check_data(name: str):
    row, cfg = ROWS[name], recipe(name)
    train, test = cfg.dataloader.train, cfg.dataloader.test
    flip, scale, crop = instantiate(train.mapper.augmentations)
    assert flip.horizontal
    assert (scale.min_scale, scale.max_scale, scale.target_height) == (0.1, 2.0, row.pixels)
    assert tuple(crop.crop_size) == (row.pixels, row.pixels)
    (resize,) = instantiate(test.mapper.augmentations)
    assert (list(resize.short_edge_length), resize.max_size) == ([row.pixels], row.pixels)
    if name.startswith("O365"):
        assert train.dataset.names == ["objects365_v2_train", "objects365_v2_val"]
        assert test.dataset.name == cfg.dataloader.evaluator.dataset.name == "objects365_v2_val"
        assert (train.mapper.use_masks, train.mapper.recompute_boxes) == (False, False)
    else:
        stem = "lvis_v1" if name.startswith("LVIS") else "coco_2017"
        assert (train.dataset.name, test.dataset.name) == (f"{stem}_train", f"{stem}_val")
        assert (train.mapper.use_masks, train.mapper.recompute_boxes) == (True, True)
    assert train.repeat_threshold == (0.001 if name.startswith("LVIS") else None)
    assert (cfg.train.precision, cfg.train.clip_grad_norm) == ("fp16", None)


def check_inference_recipe(name: str):
    cfg, node = recipe(name), recipe(name).model.roi_heads
    lvis = name.startswith("LVIS")
    module: Any = model_of(name).roi_heads
    assert type(module) is heads.CascadeROIHeads
    assert module.use_soft_nms is is_system(name)
    last = module.box_predictor[-1]
    assert (last.test_score_thresh, last.test_nms_thresh) == (0.02 if lvis else 0.05, 0.5)
    if is_system(name):
        expected = dict(method="linear", class_wise=True, iou_threshold=0.6, min_score=1e-3)
        expected |= dict(override_score_thresh=None if lvis else 0.0)
        expected |= dict(maskness_thresh=0.5 if lvis else None)
        assert {key: getattr(module, key) for key in expected} == expected
        assert last.test_topk_per_image == 1000
    else:
        assert module.plain
        assert module.maskness_thresh is None
        assert last.test_topk_per_image == (300 if lvis else 100)
    found = {True: 300, False: 100}[lvis]
    assert cfg.dataloader.evaluator.max_dets == (1000 if lvis and from_o365(name) else found)
    assert node.num_classes == (365 if name.startswith("O365") else 1203 if lvis else 80)
    average = (0.9999, "ema") if from_o365(name) else (None, "model")
    assert (cfg.train.ema_decay, cfg.train.eval_weights) == average


def test_the_published_flags_work_on_every_recipe():
    """EVA's README evaluates with these, in this spelling."""
    flags = ["use_soft_nms=True", "class_wise=True", "method=linear", "iou_threshold=0.6"]
    flags += ["override_score_thresh=0.0", "maskness_thresh=0.5"]
    path = ROOT / f"configs/COCO/{MASK}_b_bsl.py"
    cfg = load_config(path, [f"model.roi_heads.{flag}" for flag in flags])
    module: Any = build_model(cfg.model, "meta").roi_heads
    assert (module.use_soft_nms, module.iou_threshold, module.maskness_thresh) == (True, 0.6, 0.5)
    assert module.override_score_thresh == 0.0


def test_xformers_asked_for_and_not_installed_is_told_before_anything_runs(monkeypatch):
    """The published code imports it under `except: pass` and fails in the first forward pass."""
    monkeypatch.setitem(sys.modules, "xformers", None)
    path = ROOT / f"configs/COCO/{MASK}_b_bsl.py"
    cfg = load_config(path, ["model.backbone.net.attention_backend=xformers"])
    text = r"expected the package xformers, got no such package\. Run `pip install xformers`"
    with pytest.raises(InputError, match=text):
        build_model(cfg.model, "meta")


def test_objects365_has_boxes_alone():
    name = "O365/cascade_rcnn_eva02_l"
    assert not any("mask" in key for key in model_of(name).state_dict())


def check_header(name: str):
    row = ROWS[name]
    said, millions = header(name), count(model_of(name)) / 1e6
    for expected in (
        *row.names,
        *row.ap,
        f"Parameters {millions:.2f} M",
        f"{row.iterations} iterations x {row.batch} images = "
        f"{row.iterations * row.batch / 1e6:.2f} M",
        f"at {row.pixels} pixels",
        f"Start {row.start}",
        f"{row.warmup} iterations",
    ):
        assert expected in said, expected
    assert said.count(f"python train_net.py --config-file configs/{name}.py") == 2
    assert "--eval-only train.init_checkpoint=" in said
    assert is_system(name) is ("Inference soft-NMS" in said or "averaged weights" in said)
    assert len(text_of(name).splitlines()) <= 45


@pytest.mark.parametrize("name", ROWS)
def test_recipe(name: str):
    """All that was published for a recipe."""
    check_backbone(name)
    check_optimizer(name)
    check_learning_rate(name)
    check_data(name)
    check_inference_recipe(name)
    check_header(name)


def test_no_two_recipes_share_initial_weights():
    names = [name for name in NAMES if "eva02" in name and not name.startswith("own/")]
    assert len({recipe(name).train.init_checkpoint for name in names}) == len(names)


def test_building_prints_nothing(capsys):
    """The published constructor of the rotary tables prints."""
    for name in ROWS:
        build_model(recipe(name).model, "meta")
    assert capsys.readouterr() == ("", "")


def published() -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """{row: {name: (shape, dtype)}} of the published files."""
    path = CHECKPOINTS / "eva02_det.json"
    if not path.is_file():
        return {}
    found = {}
    for entry in json.loads(path.read_text())["checkpoints"]:
        tensors = dict(entry["tensors"])
        for group in entry["blocks"]:
            for i in group["indexes"]:
                tensors |= {f"{group['prefix']}{i}.{k}": v for k, v in group["tensors"].items()}
        assert len(tensors) == entry["count"]
        found[entry["name"]] = {
            k: (tuple(size), getattr(torch, kind)) for k, (size, kind) in tensors.items()
        }
    return found


PUBLISHED = published()


@pytest.mark.skipif(not PUBLISHED, reason=f"no eva02_det.json in {CHECKPOINTS}")
@pytest.mark.parametrize("name", ROWS)
def test_published_names_and_shapes(name: str):
    """All but the rotary tables, which are computed."""
    files = [PUBLISHED[row] for row in ROWS[name].names if row in PUBLISHED]
    assert files
    for tensors in files:
        learned = {key: value for key, value in tensors.items() if ".rope" not in key}
        assert len(learned) < len(tensors)
        assert shapes(model_of(name)) == learned
