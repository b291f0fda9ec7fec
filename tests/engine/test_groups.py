from __future__ import annotations

import pytest
from tiny_recipe import recipe

from vitdet.config import build_model
from vitdet.engine.groups import group_lines
from vitdet.utils.checks import InputError


def cells(lines: list[str]) -> dict[str, tuple[str, str, str]]:
    """{name: (shape, lr, weight decay)} of a table."""
    rows = [line.rsplit(maxsplit=2) for line in lines[1:-1]]
    return {left.split()[0]: (left.split(maxsplit=1)[1], lr, wd) for left, lr, wd in rows}


def test_every_parameter_has_a_line(tmp_path):
    cfg = recipe(tmp_path)  # AdamW at 1e-3, layer decay 0.7 of 2 blocks
    lines = list(group_lines(cfg))
    names = [name for name, _ in build_model(cfg.model, "meta").named_parameters()]
    table = cells(lines)
    assert list(table) == names
    assert lines[0].split() == ["name", "shape", "lr", "weight", "decay"]
    assert table["backbone.net.pos_embed"] == ("1 x 17 x 32", "0.000343", "0")
    assert table["backbone.net.blocks.1.attn.qkv.weight"] == ("96 x 32", "0.0007", "0.1")
    assert table["backbone.net.blocks.0.norm1.bias"] == ("32", "0.00049", "0")
    assert table["roi_heads.box_predictor.cls_score.bias"] == ("3", "0.001", "0.1")
    assert len({len(line) for line in lines[:-1]}) == 1  # columns stand below each other
    total = sum(value.numel() for value in build_model(cfg.model, "meta").parameters())
    assert lines[-1].startswith(f"{len(names)} parameters with {total} numbers; {len(names)} with")
    assert lines[-1].endswith(", in 7 groups")  # of 3 layers, with and without decay; the rest


def test_frozen_parameters_are_named(tmp_path):
    cfg = recipe(tmp_path)
    cfg.model.backbone.freeze = True
    cfg.model.backbone["_target_"] = "test_groups.frozen_pyramid"
    lines = list(group_lines(cfg))
    table = cells(lines)
    assert table["backbone.net.pos_embed"] == ("1 x 17 x 32", "frozen", "-")
    assert table["roi_heads.box_predictor.cls_score.bias"] == ("3", "0.001", "0.1")
    trained = sum(lr != "frozen" for _, lr, _ in table.values())
    assert f"; {trained} with " in lines[-1]


def frozen_pyramid(freeze: bool, **options):
    from vitdet.pyramid import SimpleFeaturePyramid

    return SimpleFeaturePyramid(**options).requires_grad_(not freeze)


def test_no_optimizer_is_one_line(tmp_path):
    cfg = recipe(tmp_path)
    del cfg["optimizer"]
    with pytest.raises(InputError, match=r"print-groups: expected an optimizer, got only .*model"):
        list(group_lines(cfg))


def test_no_data_and_no_memory_are_needed(tmp_path):
    cfg = recipe(tmp_path)
    cfg.model.backbone.net.update(embed_dim=1280, depth=200, num_heads=16)  # 15 GB as numbers
    cfg.dataloader.train.dataset = cfg.dataloader.test.dataset = "???"
    lines = list(group_lines(cfg))
    assert len(cells(lines)) > 2000


def test_a_backbone_without_layers_is_an_input_error(tmp_path):
    cfg = recipe(tmp_path)
    cfg.optimizer.backbone = "spine"
    with pytest.raises(InputError, match=r"optimizer\.backbone: .* got 'spine'\. The model has ba"):
        list(group_lines(cfg))
