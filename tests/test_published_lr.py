"""The learning rate of every published recipe: start, full, after each step; and by layer.

The numbers stand here a second time, on purpose. Sources: detectron2 projects/ViTDet/configs; EVA
EVA-02/det/projects/ViTDet/configs; perception_models apps/detection/projects/ViTDet/configs;
ViTAE-Transformer/ViTDet configs and logs; EasyCV configs/detection/vitdet; mmdetection
projects/ViTDet; Vision Longformer's YAML files; ViTDet (arXiv 2203.16527), A.2 and Table 11.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.recipes import PUBLISHED, each, model_of, recipe
from vitdet.config import instantiate
from vitdet.optim import adamw

EPOCH = 117_266 / 64  # iterations: the images of train2017 with an object, 64 a step


class Row(NamedTuple):
    """Iterations and the rate from each on; the first is the start, the second full rate.

    `lowest` is the full rate of the layer that learns slowest, None where all learn alike.
    """

    recipes: str  # a regular expression
    batch: int
    points: tuple[tuple[float, float], ...]
    end: float
    lowest: float | None = None


def steps(full, warmup, first, second, start=1e-3):
    rates = (start * full, full, full / 10, full / 100)
    return tuple(zip((0, warmup, first, second), rates, strict=True))


COCO = (163_889, 177_546)
LVIS = (138_889, 150_463)
OLD = dict(start=0.067)
VITAE = steps(1e-4, 250, 88 * EPOCH, 96 * EPOCH, **OLD)
EASY = steps(1e-4, 250, 88 * EPOCH, 96 * EPOCH)
_T_B = "t1_.*_b|t6_system_b|t8.*_b|fig5_retinanet_b"
_T_L = "t1_.*_l|t2.*_l|t6_system_l|fig5_retinanet_l"
ROWS = (
    # detectron2
    Row(r"COCO/.*vitdet_b_100ep", 64, steps(1e-4, 250, *COCO), 184_375, 9.68890e-7),
    Row(r"COCO/.*vitdet_l_100ep", 64, steps(1e-4, 250, *COCO), 184_375, 3.77789e-7),
    Row(r"COCO/.*vitdet_h_75ep", 64, steps(1e-4, 187.5, 122_916, 133_159), 138_281, 3.09032e-6),
    Row(r"LVIS/.*vitdet_b_100ep", 64, steps(2e-4, 250, *LVIS), 156_250, 1.93778e-6),
    Row(r"LVIS/.*vitdet_l_100ep", 64, steps(2e-4, 250, *LVIS), 156_250, 7.55579e-7),
    Row(r"LVIS/.*vitdet_h_100ep", 64, steps(1e-4, 250, *LVIS), 156_250, 3.09032e-6),
    Row(r"COCO/.*swin_[bl]_.*50ep", 64, steps(4e-5, 125, 81_944, 88_773), 92_187),
    Row(r"LVIS/.*swin_[bl]_.*50ep", 64, steps(1e-4, 250, 69_444, 75_231), 78_125),
    Row(r"COCO/.*mvitv2_b_.*100ep", 64, steps(8e-5, 250, *COCO), 184_375),
    Row(r"COCO/.*mvitv2_l_.*50ep", 64, steps(8e-5, 125, 81_944, 88_773), 92_187),
    Row(r"COCO/.*mvitv2_h_.*36ep", 64, steps(1.6e-4, 250, 52_500, 62_500), 67_500),
    Row(r"LVIS/.*mvitv2_b_.*100ep", 64, steps(1e-4, 250, *LVIS), 156_250),
    Row(r"LVIS/.*mvitv2_l_.*50ep", 64, steps(4e-5, 250, 69_444, 75_231), 78_125),
    Row(r"LVIS/.*mvitv2_h_.*50ep", 64, steps(2e-5, 250, 69_444, 75_231), 78_125),
    # EVA-02
    Row(r"COCO/.*eva02_b_.*", 128, steps(5e-5, 1000, 48_000, 54_000), 60_000, 4.84445e-7),
    Row(r"COCO/.*eva02_l_bsl", 144, steps(6e-5, 1000, 48_000, 54_000), 60_000, 2.26674e-7),
    Row(r"COCO/.*eva02_l_sys", 128, steps(5e-5, 1000, 48_000, 54_000), 60_000, 1.88895e-7),
    Row(r"COCO/.*eva02_l_sys_o365", 64, ((0, 4e-8), (400, 4e-5)), 40_000, 1.51116e-7),
    Row(r"LVIS/.*eva02_b_bsl", 128, steps(1e-4, 1000, 40_000, 45_000), 50_000, 9.68890e-7),
    Row(r"LVIS/.*eva02_l_(bsl|sys)", 128, steps(1e-4, 1000, 32_000, 36_000), 40_000, 3.77789e-7),
    Row(r"LVIS/.*eva02_l_sys_o365", 64, ((0, 4e-8), (700, 4e-5)), 70_000, 1.51116e-7),
    Row(r"O365/.*eva02_l", 160, steps(6e-5, 5000, 320_000, 360_000), 400_000, 2.26674e-7),
    # Perception Encoder
    Row(r".*_pe_.*_75ep", 64, steps(5e-5, 187.5, 122_916, 133_159), 138_281, 2.31920e-7),
    Row(r"COCO/.*_pe_.*_36ep", 64, steps(5e-5, 90, 59_000, 63_916), 66_375, 2.31920e-7),
    # EasyCV, mmdetection, ViTAE
    Row(r"easycv/.*_vitdet_b_100ep", 64, EASY, 100 * EPOCH, 9.68890e-7),
    Row(r"easycv/.*_v06_.*_100ep", 64, VITAE, 100 * EPOCH),
    Row(r"mmdetection/.*_b_100ep", 64, steps(1e-4, 250, *COCO), 184_375, 9.68890e-7),
    Row(r"vitae/.*_(vit_b|vit_b_conv|vitae_b)_100ep", 64, VITAE, 100 * EPOCH, 9.68890e-7),
    Row(r"vitae/.*_vitae_s_100ep", 64, VITAE, 100 * EPOCH, 1.62841e-7),  # 17 layers, as in its log
    Row(r"vitae/.*_vitae_b_vitdet_100ep", 64, steps(1e-4, 250, *COCO), 184_375, 9.68890e-7),
    Row(r"vitae/.*_lvis_100ep", 64, steps(2e-4, 250, *LVIS, **OLD), 156_250, 1.93778e-6),
    # Vision Longformer
    Row(r"vil/mask_.*_1x", 16, steps(2.5e-4, 1000, 60_000, 80_000, 0.01), 90_000),
    Row(r"vil/retinanet_.*_1x", 16, steps(1e-4, 1000, 60_000, 80_000, 0.01), 90_000),
    Row(r"vil/.*_3x", 16, steps(1e-4, 1000, 180_000, 240_000, 0.01), 270_000),
    # tables of the paper
    Row(rf"paper/({_T_B})", 64, steps(1e-4, 250, *COCO), 184_375, 9.68890e-7),
    Row(rf"paper/({_T_L})", 64, steps(1e-4, 250, *COCO), 184_375, 3.77789e-7),
    Row(r"paper/(t6|fig5).*_h", 64, steps(1e-4, 187.5, 122_916, 133_159), 138_281, 3.09032e-6),
    Row(r"paper/t7_.*_l", 64, steps(2e-4, 250, *LVIS), 156_250, 7.55579e-7),
    Row(r"paper/t7_.*_h", 64, steps(1e-4, 250, *LVIS), 156_250, 3.09032e-6),
    Row(r"paper/t4_in.*", 64, steps(8e-5, 250, 81_944, 88_773), 92_187),
    Row(r"paper/t10_.*", 64, steps(1.6e-4, 250, 69_444, 75_231), 78_125),
    Row(r"paper/t4_scratch_b", 64, steps(1.6e-4, 250, 491_667, 532_638), 553_125),
    Row(r"paper/t4_scratch_l", 64, steps(1.6e-4, 250, 327_778, 355_092), 368_750),
)


def row_of(name):
    (found,) = [row for row in ROWS if re.fullmatch(row.recipes, name)]
    return found


def test_every_row_has_a_recipe():
    assert {row_of(name).recipes for name in PUBLISHED} == {row.recipes for row in ROWS}


@pytest.mark.parametrize("name", each(sorted(PUBLISHED)))
def test_rates(name):
    """At every milestone, and of the first and the last layer."""
    cfg, row = recipe(name), row_of(name)
    multiplier = instantiate(cfg.schedule)
    assert cfg.dataloader.train.total_batch_size == row.batch
    assert cfg.train.num_images == round(row.end * row.batch)

    def rate(iteration):
        return cfg.optimizer.lr * multiplier(round(iteration * row.batch) / cfg.train.num_images)

    for (start, expected), (following, _) in zip(
        row.points, [*row.points[1:], (row.end, 0.0)], strict=True
    ):
        assert rate(start) == pytest.approx(expected, rel=1e-9), start
        if start > 0:  # no warm-up: the rate stays to the last iteration before the next point
            assert rate(following - 1) == pytest.approx(expected, rel=1e-9), following
    (_, first), (end, full) = row.points[:2]
    assert rate(end / 2) == pytest.approx((first + full) / 2, rel=1e-9)
    assert rate(end - 1) == pytest.approx(full - (full - first) / end, rel=1e-9)
    rules = {key: cfg.optimizer[key] for key in cfg.optimizer if key != "_target_"}
    groups = adamw(model_of(name), **rules).param_groups
    rates = [group["initial_lr"] for group in groups]
    assert max(rates) == pytest.approx(full, rel=1e-9)
    assert min(rates) == pytest.approx(full if row.lowest is None else row.lowest, rel=1e-5)
