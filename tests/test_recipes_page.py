"""docs/recipes.md lists every recipe, with the numbers of its header."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from tests.recipes import NAMES, ROOT, header

PAGE = (ROOT / "docs/recipes.md").read_text()
NO_ROWS = {"mini", "own"}  # told of in the text, without published numbers
RECIPES = [
    f"{name}.py" for name in NAMES if name.count("/") == 1 and name.split("/")[0] not in NO_ROWS
]


def row(name: str) -> str:
    """Return the line of the page that begins with a link to the recipe."""
    found = re.findall(rf"^\| \[[^]]+\]\(\.\./configs/{re.escape(name)}\) .*$", PAGE, re.MULTILINE)
    assert len(found) == 1, f"{name}: {len(found)} lines"
    return found[0]


def flops() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flops", ROOT / "benchmarks/flops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_has_a_row_with_its_numbers() -> None:
    assert len(RECIPES) > 100
    for name in RECIPES:
        check_row_has_the_numbers(name)


def check_row_has_the_numbers(name: str) -> None:
    line, said = row(name), header(name.removesuffix(".py"))
    millions = re.search(r"Parameters (\d+\.\d\d) M", said)
    assert millions is not None, name
    assert f"| {millions[1]} |" in line, name
    published = re.search(r"Published box AP ([\d.]+\d)(?:, mask AP ([\d.]+\d))?", said)
    if published is not None:
        for number in filter(None, published.groups()):
            assert re.search(rf"\| {re.escape(number)}(?: \(maskness\))? \|", line), (name, number)


@pytest.mark.parametrize("folder", ["COCO", "EVA", "paper", "vil", "vitae"])
def test_every_section_has_a_command(folder: str) -> None:
    name = "COCO/cascade_mask_rcnn_eva02_l_sys" if folder == "EVA" else f"{folder}/"
    assert f"python train_net.py --config-file configs/{name}" in PAGE


@pytest.mark.parametrize(
    "name",
    [
        "COCO/mask_rcnn_vitdet_b_100ep.py",
        "COCO/cascade_mask_rcnn_eva02_b_bsl.py",
        "vitae/mask_rcnn_vitae_s_100ep.py",
        "easycv/faster_rcnn_vitdet_b_100ep.py",
        "paper/fig5_retinanet_b.py",
        "paper/t1_pyramid_none_b.py",
    ],
)
def test_multiply_adds_are_counted(name: str) -> None:
    parameters, total = flops().count(ROOT / "configs" / name)
    assert f"| {parameters / 1e6:.2f} | {total:.2f} |" in row(name)


def test_counted_multiply_adds_are_those_of_the_paper() -> None:
    """Table 9: ViT-B 0.8 T with Mask R-CNN, 1.1 T with Cascade Mask R-CNN."""
    for name, expected in (("mask", 0.8), ("cascade_mask", 1.1)):
        path = ROOT / f"configs/COCO/{name}_rcnn_vitdet_b_100ep.py"
        assert round(flops().count(path)[1], 1) == expected
