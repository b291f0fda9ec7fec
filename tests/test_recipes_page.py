"""docs/recipes.md lists every recipe with published numbers, and says what they are."""

import importlib.util
import re

import pytest

from tests.recipes import PUBLISHED, ROOT

PAGE = (ROOT / "docs/recipes.md").read_text()


def row(name):
    """Return the line of the page that begins with the recipe."""
    link = rf"`{re.escape(name)}`|\[[^]]+\]\(\.\./configs/{re.escape(name)}\.py\)"
    found = re.findall(rf"^\| (?:{link}) .*$", PAGE, re.MULTILINE)
    assert len(found) == 1, f"{name}: {len(found)} lines"
    return found[0]


def flops():
    spec = importlib.util.spec_from_file_location("flops", ROOT / "benchmarks/flops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_has_a_row_with_its_numbers():
    for name, published in PUBLISHED.items():
        line = row(name)
        assert f"| {published.parameters / 1e6:.2f} |" in line, name
        for number in filter(None, (published.box_ap, published.mask_ap)):
            assert re.search(rf"\| {re.escape(number)}(?: \(maskness\))? \|", line), (name, number)


@pytest.mark.parametrize(
    "name",
    [
        "COCO/cascade_mask_rcnn_eva02_b_bsl",
        "vitae/mask_rcnn_vitae_s_100ep",
        "easycv/faster_rcnn_vitdet_b_100ep",
        "paper/fig5_retinanet_b",
        "paper/t1_pyramid_none_b",
    ],
)
def test_multiply_adds_are_counted(name):
    parameters, total = flops().count(ROOT / "configs" / f"{name}.py")
    assert f"| {parameters / 1e6:.2f} | {total:.2f} |" in row(name)


def test_counted_multiply_adds_are_those_of_the_paper():
    """Table 9: ViT-B 0.8 T with Mask R-CNN, 1.1 T with Cascade Mask R-CNN."""
    for kind, expected in (("mask", 0.8), ("cascade_mask", 1.1)):
        name = f"COCO/{kind}_rcnn_vitdet_b_100ep"
        parameters, total = flops().count(ROOT / "configs" / f"{name}.py")
        assert round(total, 1) == expected
        assert f"| {parameters / 1e6:.2f} | {total:.2f} |" in row(name)
