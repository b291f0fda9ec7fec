"""docs/recipes.md lists every recipe with published numbers, and says what they are."""

import re

import flops
import pytest

from tests.recipes import PUBLISHED, ROOT

PAGE = (ROOT / "docs/recipes.md").read_text()


def row(name):
    """Return the line of the page that begins with the recipe."""
    link = rf"`{re.escape(name)}`|\[[^]]+\]\(\.\./configs/{re.escape(name)}\.py\)"
    found = re.findall(rf"^\| (?:{link}) .*$", PAGE, re.MULTILINE)
    assert len(found) == 1, f"{name}: {len(found)} lines"
    return found[0]


def test_every_recipe_has_a_row_with_its_numbers():
    for name, published in PUBLISHED.items():
        line = row(name)
        assert f"| {published.parameters / 1e6:.2f} |" in line, name
        for number in filter(None, (published.box_ap, published.mask_ap)):
            assert re.search(rf"\| {re.escape(number)}(?: \(maskness\))? \|", line), (name, number)


@pytest.mark.parametrize(
    ("name", "of_the_paper"),  # Table 9: T of ViT-B
    [
        ("COCO/mask_rcnn_vitdet_b_100ep", 0.8),
        ("COCO/cascade_mask_rcnn_vitdet_b_100ep", 1.1),
        ("COCO/cascade_mask_rcnn_eva02_b_bsl", None),
        ("vitae/mask_rcnn_vitae_s_100ep", None),
        ("paper/fig5_retinanet_b", None),
        ("paper/t1_pyramid_none_b", None),
    ],
)
def test_multiply_adds_are_counted(name, of_the_paper):
    parameters, total = flops.count(ROOT / "configs" / f"{name}.py")
    assert f"| {parameters / 1e6:.2f} | {total:.2f} |" in row(name)
    assert of_the_paper in (None, round(total, 1))
