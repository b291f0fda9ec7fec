"""Every recipe under configs/: it builds, it reloads, and it has the numbers that were published.

The expected values stand here and in published.csv a second time on purpose: a slip in a recipe
shows as a difference. Sources: facebookresearch/detectron2 projects/ViTDet, baaivision/EVA
EVA-02/det, ViTAE-Transformer/ViTDet, alibaba/EasyCV, open-mmlab/mmdetection projects/ViTDet,
microsoft/VisionLongformerForObjectDetection, and the tables of ViTDet (arXiv 2203.16527).
"""

import re
from collections import Counter

import pytest
import yaml
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from tests.recipes import (
    CONFIGS,
    NAMES,
    PUBLISHED,
    ROOT,
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


def calls(node, key=""):
    """Every LazyCall in a config, with its place."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        for name in node:
            yield from calls(node[name], f"{key}.{name}")
    elif isinstance(node, ListConfig):
        for i, item in enumerate(node):
            yield from calls(item, f"{key}.{i}")


def target(node):
    found = node["_target_"]
    return locate(found) if isinstance(found, str) else found


def test_every_recipe_is_found():
    families = Counter(name.rpartition("/")[0] for name in NAMES)
    assert families == {
        **{"COCO": 18, "LVIS": 17, "O365": 1, "easycv": 7, "mmdetection": 1, "paper": 44},
        **{"vil": 25, "vitae": 7, "own": 10, "mini": 5, "mini/variants": 12},
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
def test_recipe(name, tmp_path):
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
def test_rows_say_what_was_published(family):
    for name, row in rows(family).items():
        published = PUBLISHED[f"{family}/{name}"]
        assert f"{row.millions:.2f}" == f"{published.parameters / 1e6:.2f}", name
        # the row of Objects365 joins two files: boxes of one, masks of the other
        expected = "/".join(filter(None, (published.box_ap, published.mask_ap)))
        assert row.published == (expected if "coco_det_sys" not in row.source else "64.1/55.4")


# {pattern of names: {key in the recipe: value}}
VALUES = yaml.safe_load((ROOT / "tests/published_values.yaml").read_text())


def value_of(cfg, key):
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
@pytest.mark.parametrize("pattern", VALUES)
def test_published_values(pattern):
    expected = VALUES[pattern]
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
def test_sizes(pattern, pixels):
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
    module = build_model(cfg.model, "meta").roi_heads
    assert type(module) is heads.CascadeROIHeads
    assert (module.use_soft_nms, module.iou_threshold, module.maskness_thresh) == (True, 0.6, 0.5)
    assert module.override_score_thresh == 0.0
    plain = model_of(f"COCO/{MASK}_b_bsl").roi_heads
    assert (type(plain), plain.plain) == (heads.CascadeROIHeads, True)


@pytest.mark.slow
def test_a_recipe_from_elsewhere_may_build_what_these_build():
    """Put a part that a recipe builds anew into PARTS, and take out what none builds any more."""
    found = {place: set() for place in plain_recipes.PARTS}
    for name in [*NAMES, "common/models/cascade_mask_rcnn_eva01"]:  # of no recipe yet
        for key, node in calls(recipe(name)):
            place = plain_recipes._place(tuple(key.split(".")[1:]))
            found[place].add(_convert_target_to_string(target(node)))
    for place, names in plain_recipes.PARTS.items():
        assert found[place] ^ names == set(), place
