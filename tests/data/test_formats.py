"""Whatever stands in a file of labels: it is read, or one line says what is wrong."""

import copy
import json
import random

import pytest
from folders import OBJECT, content, xml
from PIL import Image

from vitdet.data.clean import check_data, write_repaired
from vitdet.data.datasets import coco_dataset
from vitdet.data.formats import find_data
from vitdet.data.prepare import prepare_data
from vitdet.utils.checks import InputError

TURNS = 40
JUNK = [
    *(None, "x", "", -1, 0, 1, 0.5, 1e30, float("nan"), float("inf"), True, 10**30),
    *([], {}, [None], [[]], {"a": 1}, [1, 2, 3, 4], "../../x", "a.png"),
]
WORDS = ["0", "1", "2", "-1", "0.5", "1.5", "nan", "inf", "1e400", "x", "", "\x00", "é", "9" * 50]
XML = xml(f"<filename>1.png</filename>{OBJECT}")["Annotations/a.xml"]
POLYGON = {"area": 72, "segmentation": [[1, 2, 10, 2, 10, 10]]}


def _places(node):
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    inside = [node[key] for key in keys if isinstance(node[key], dict | list)]
    return [(node, key) for key in keys] + [place for each in inside for place in _places(each)]


def _json(draw):
    values = content(*(f"{i}.png" for i in range(1, 5)))
    for each in values["annotations"]:
        each.update(copy.deepcopy(POLYGON))
    for _ in range(draw.choice([1, 1, 2, 4])):
        node, key = draw.choice(_places(values))
        if isinstance(node, dict) and draw.random() < 0.2:
            del node[key]
        else:
            node[key] = copy.deepcopy(draw.choice(JUNK))
    return json.dumps(values)


def _line(draw):
    words = ["0"] + ["0.5"] * (draw.choice([4, 5, 5, 5, 6, 7, 9]) - 1)
    words[draw.randrange(len(words))] = draw.choice(WORDS)
    return " ".join(words) + "\n"


def _xml(draw):
    assert isinstance(XML, bytes)
    pieces = XML.decode().replace("<", "\n<").replace(">", ">\n").split("\n")
    junk = ["", "x", "nan", "-5", "1e999", "<a/>", "<a>", "&x;", "\x01"]
    pieces[draw.randrange(len(pieces))] = draw.choice(junk)
    return "".join(pieces)


def _train(data, out):
    prepared = prepare_data(data, out / "data")
    coco_dataset(*prepared.train)
    coco_dataset(*prepared.val, check="drop")


def _repair(data, out):
    write_repaired(check_data(find_data(data)), out)
    assert check_data(find_data(out)).faults == []


def _check(data, _):
    check_data(find_data(data))


@pytest.mark.parametrize(
    ("name", "broken", "do"),
    [
        ("labels.json", _json, _train),
        ("labels.json", _json, _repair),
        ("1.txt", _line, _check),
        ("1.xml", _xml, _check),
    ],
)
def test_broken_labels(tmp_path, name, broken, do):
    data, draw, errors = tmp_path / "data", random.Random(0), []
    data.mkdir()
    for i in range(1, 5):
        Image.effect_noise((40, 20), 90).convert("RGB").save(data / f"{i}.png")
    if name == "1.txt":
        (data / "classes.txt").write_text("cat\ndog\n")
    for turn in range(TURNS):
        (data / name).write_text(broken(draw))
        try:
            do(data, tmp_path / str(turn))
        except InputError as error:
            errors.append(str(error))
    assert 0 < len(errors) < TURNS
    assert "\n" not in "".join(errors)
