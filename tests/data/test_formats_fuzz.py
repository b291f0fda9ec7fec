"""Whatever stands in a file of labels: it is read, or one line says what is wrong."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitdet.data.checking import check_data
from vitdet.data.datasets import coco_dataset
from vitdet.data.formats import find_data
from vitdet.data.prepare import prepare_data
from vitdet.data.repair import write_repaired
from vitdet.utils.checks import InputError

JUNK = [
    *(None, "x", "", -1, 0, 1, 0.5, 1e30, float("nan"), float("inf"), True, 10**30),
    *([], {}, [None], [[]], {"a": 1}, [1, 2, 3, 4], "../../x", "a.png"),
]
TURNS = 150
CONTENT: dict[str, Any] = {
    "images": [
        {"id": i, "file_name": f"{i}.png", "width": 40 + i, "height": 30} for i in range(1, 5)
    ],
    "annotations": [
        {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [5, 5, 10, 8], "area": 80}
        | {"iscrowd": 0, "segmentation": [[5, 5, 15, 5, 15, 13, 5, 13]]}
        for i in range(1, 5)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "supercategory": "none"}],
}


def _places(node: Any) -> list[tuple[Any, Any]]:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    found = [(node, key) for key in keys]
    for key in keys:
        if isinstance(node[key], dict | list):
            found += _places(node[key])
    return found


def _broken(draw: random.Random) -> Any:
    content = copy.deepcopy(CONTENT)
    for _ in range(draw.choice([1, 1, 2, 4])):
        node, key = draw.choice(_places(content))
        if isinstance(node, dict) and draw.random() < 0.2:
            del node[key]
        else:
            node[key] = copy.deepcopy(draw.choice(JUNK))
    return content


def _one_line(do: Callable[[], Any]) -> bool:
    """Whether it is done; what stops it must be an error of one line."""
    said = ""
    try:
        do()
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    return not said


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(1, 5):
        Image.effect_noise((40 + i, 30), 90).convert("RGB").save(folder / f"{i}.png")
    return folder


def test_training_on_broken_json(data: Path, tmp_path: Path) -> None:
    draw, done = random.Random(0), 0
    for turn in range(TURNS):
        (data / "labels.json").write_text(json.dumps(_broken(draw)))

        def prepare(turn: int = turn) -> None:
            prepared = prepare_data(data, tmp_path / str(turn) / "data")
            coco_dataset(*prepared.train)
            coco_dataset(*prepared.val, check="drop")

        done += _one_line(prepare)
    assert 0 < done < TURNS


def test_checking_and_repairing_broken_json(data: Path, tmp_path: Path) -> None:
    draw, done = random.Random(1), 0
    for turn in range(TURNS):
        (data / "labels.json").write_text(json.dumps(_broken(draw)))

        def check(turn: int = turn) -> None:
            checked = check_data(find_data(data))
            copied = tmp_path / str(turn)
            write_repaired(checked, copied)
            assert check_data(find_data(copied)).faults == []

        done += _one_line(check)
    assert 0 < done < TURNS


WORDS = [
    "0",
    "1",
    "2",
    "-1",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "1e400",
    "x",
    "",
    "\x00",
    "0x1",
    "é",
    "9" * 50,
]


def test_broken_text_labels(data: Path) -> None:
    draw, done = random.Random(2), 0
    (data / "classes.txt").write_text("cat\ndog\n")
    for _ in range(TURNS):
        count = draw.choice([4, 5, 5, 5, 6, 7, 9])
        words = ["0"] + ["0.5"] * (count - 1)
        words[draw.randrange(count)] = draw.choice(WORDS)
        (data / "1.txt").write_text(" ".join(words) + "\n")
        done += _one_line(lambda: check_data(find_data(data)))
    assert 0 < done < TURNS


XML = (
    "<annotation><filename>1.png</filename><size><width>41</width><height>30</height></size>"
    "<object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>2</ymin>"
    "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
)


def test_broken_xml(data: Path) -> None:
    draw, done = random.Random(3), 0
    pieces = XML.replace("<", "\n<").replace(">", ">\n").split("\n")
    for _ in range(TURNS):
        broken = list(pieces)
        place = draw.randrange(len(broken))
        broken[place] = draw.choice(["", "x", "nan", "-5", "1e999", "<a/>", "<a>", "&x;", "\x01"])
        (data / "1.xml").write_text("".join(broken))
        done += _one_line(lambda: check_data(find_data(data)))
    assert 0 < done < TURNS
