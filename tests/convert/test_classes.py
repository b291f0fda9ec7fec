"""A head for other classes: rows go by name, the rest starts anew and is listed."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import converter
from vitdet import checkpoint
from vitdet.config import build_model, load_config, set_num_classes
from vitdet.convert.classes import carry, match, read_classes, with_classes
from vitdet.convert.names import shapes_of
from vitdet.utils.checks import InputError

from .manifests import random

OLD = ("Person", "Car", "Street Lights", "Cell Phone")
NEW = ("cell phone", "zebra", "car")
BOXES = "roi_heads.box_predictor"
MASKS = "roi_heads.mask_head.predictor"


# --- lists ---------------------------------------------------------------------------------------


def written(folder, content):
    path = folder / "list.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_names_of_a_coco_file_are_in_the_order_of_their_ids(tmp_path):
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "cow"}]
    path = written(tmp_path, {"images": [], "categories": categories})
    assert list(read_classes(path).items()) == [(3, "dog"), (7, "cat"), (90, "cow")]
    assert read_classes(written(tmp_path, ["b", "a"])) == {1: "b", 2: "a"}


WRONG_LISTS = [
    ({"images": []}, "got none"),
    ("person", "got none"),
    ([], 'a list of names, or COCO\'s "categories" with an "id" and a "name" each, got none'),
    (["a", 3], "got the id 2, the name 3"),
    (["a", " "], "the name ' '"),
    (["a", "b", "a"], "expected each once, got 'a' and 'a'"),
    ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "ids: .* got '1' and '1'"),
    ({"categories": [{"name": "a"}]}, "got the id None, the name 'a'"),
    ({"categories": ["a"]}, "got the id None"),
    (b"[1, 2", r"list\.json: expected JSON, got Expecting"),
    (b"\xff\xfe[", r"list\.json: expected JSON"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_LISTS)
def test_wrong_lists(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_classes(written(tmp_path, content))


def test_names_are_equal_or_paired_by_a_table():
    found = match(("cat", "Dog", "cell phone"), ("cell_phone", "dog", "cat"))
    assert found.as_dict() == {
        "carried": {"cat": "cat"},
        "initialised": ["cell_phone", "dog"],
        "left_out": ["Dog", "cell phone"],
    }
    found = match(("cat", "Dog", "cell phone", "TV"), ("cell_phone", "dog", "tv-set"), {})
    assert found.rows == (2, 1, None)
    table = {"tv-set": "TV", "cellular": "cell phone"}
    assert match(("cell  phone", "TV"), ("cellular", "tv_set"), table).rows == (0, 1)
    # two new classes may begin from one old one, when the table says so
    assert match(("cat",), ("kitten", "cat"), {"kitten": "cat"}).rows == (0, 0)


@pytest.mark.parametrize(
    ("source", "target", "table", "message"),
    [
        (("a", "a"), ("a",), None, "classes of the file: expected each once, got 'a' and 'a'"),
        (("a",), ("a", "a"), None, "new classes: expected each once"),
        (("a b", "A_b"), ("a",), {}, r"once without regard to case and underscores, got 'a b' and"),
        (("a",), ("a",), {"b": "a"}, "expected one of the new classes, got 'b'"),
        (("a",), ("a",), {"a": "b"}, "expected one of the file's classes, got 'b'"),
        (("a",), ("b",), {"b": "a", "B": "a"}, "class table: expected each once"),
    ],
)
def test_ambiguous_names(source, target, table, message):
    with pytest.raises(InputError, match=message):
        match(source, target, table)


# --- rows ----------------------------------------------------------------------------------------


def detector(classes, *, cascade=False, agnostic=False):
    """Return modules with the names and shapes of a detector's head and a bit of backbone."""
    boxes = 4 if agnostic else 4 * classes
    predictors = [
        nn.ModuleDict({"cls_score": nn.Linear(2, classes + 1), "bbox_pred": nn.Linear(2, boxes)})
        for _ in range(3 if cascade else 1)
    ]
    mask_head = nn.ModuleDict({"predictor": nn.Conv2d(2, 1 if agnostic else classes, 1)})
    box = nn.ModuleList(predictors) if cascade else predictors[0]
    heads = nn.ModuleDict({"box_predictor": box, "mask_head": mask_head})
    return nn.ModuleDict({"backbone": nn.Linear(2, 2), "roi_heads": heads})


def state(classes, **kind):
    return random(detector(classes, **kind))


def shapes(classes, **kind):
    return shapes_of(detector(classes, **kind).state_dict())


def test_rows_of_classifier_regressor_and_mask_predictor():
    before, target = state(4), shapes(3)
    after, initialised = carry(before, target, match(OLD, NEW, {}))
    assert shapes_of(after) == target
    for kind in ("weight", "bias"):
        score, old = after[f"{BOXES}.cls_score.{kind}"], before[f"{BOXES}.cls_score.{kind}"]
        assert torch.equal(score[[0, 2, 3]], old[[3, 1, 4]])  # the last is the background
        boxes, old = after[f"{BOXES}.bbox_pred.{kind}"], before[f"{BOXES}.bbox_pred.{kind}"]
        assert torch.equal(boxes[:4], old[12:16])
        assert torch.equal(boxes[8:], old[4:8])
        masks, old = after[f"{MASKS}.{kind}"], before[f"{MASKS}.{kind}"]
        assert torch.equal(masks[[0, 2]], old[[3, 1]])
    assert torch.equal(after["backbone.weight"], before["backbone.weight"])
    rows = {f"{BOXES}.bbox_pred": "4-7", f"{BOXES}.cls_score": "1", MASKS: "1"}
    expected = {f"{name}.{k}[{row}]" for name, row in rows.items() for k in ("weight", "bias")}
    assert set(initialised) == expected

    # what is open stays open on the next way, and in a model that loads it
    back = match(NEW, ("car", "zebra"))
    _, left = carry(after, shapes(2), back, [*initialised, "backbone.x"])
    assert set(left) == expected | {"backbone.x"}
    model = detector(3)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.load_weights(model, after, source="x", initialised=initialised)
    loaded, name = model.state_dict(), f"{BOXES}.bbox_pred.weight"
    assert torch.equal(loaded[name][4:8], own[name][4:8])
    assert torch.equal(loaded[name][:4], after[name][:4])
    assert not after[name][4:8].any()  # the file's tensors are not touched
    for odd in ("backbone.bias[2]", "backbone.bias[1-0]", "absent[0]"):
        with pytest.raises(InputError, match="expected rows of a tensor in the file, got "):
            checkpoint.load_weights(model, after, source="x", initialised=[odd])


def test_cascade_with_shared_regressor_and_one_class():
    shared = {"cascade": True, "agnostic": True}
    before = state(4, **shared)
    after, _ = carry(before, shapes(3, **shared), match(OLD, NEW, {}))
    for stage in range(3):
        name = f"{BOXES}.{stage}.cls_score.weight"
        assert torch.equal(after[name][[0, 2, 3]], before[name][[3, 1, 4]])
        name = f"{BOXES}.{stage}.bbox_pred.weight"
        assert torch.equal(after[name], before[name])
    assert torch.equal(after[f"{MASKS}.weight"], before[f"{MASKS}.weight"])
    # one class is told from a shared head by the target
    before, classes, name = state(1), match(("car",), ("car", "dog")), f"{BOXES}.bbox_pred.bias"
    after, _ = carry(before, shapes(2), classes)
    assert torch.equal(after[name][:4], before[name])
    after, _ = carry(before, shapes(2, agnostic=True), classes)
    assert torch.equal(after[name], before[name])


def test_retinanet_and_the_federated_loss():
    before = {"head.cls_score.weight": torch.arange(8.0).view(8, 1)}  # 2 anchors, 4 classes
    after, initialised = carry(before, {"head.cls_score.weight": (6, 1)}, match(OLD, NEW, {}))
    assert after["head.cls_score.weight"].flatten().tolist() == [3, 0, 1, 7, 0, 5]
    assert initialised == ["head.cls_score.weight[1,4]"]
    name = f"{BOXES}.fed_loss_cls_weights"  # counts of the data set
    before = state(4) | {name: torch.ones(4)}
    for target in (shapes(3), shapes(3) | {name: (3,)}):
        after, initialised = carry(before, target, match(OLD, NEW, {}))
        assert name not in after
        assert (name in initialised) == (name in target)


def test_wrong_heads():
    classes = match(OLD, NEW, {})
    with pytest.raises(InputError, match="expected a detector with a classifier, got names like w"):
        carry({"w": torch.ones(1)}, {"w": (1,)}, classes)
    with pytest.raises(InputError, match=r"expected rows for 4 classes, got the shape \(6, 2\)"):
        carry(state(5), shapes(3), classes)


def test_shapes_with_another_number_of_classes():
    for kind in ({}, {"cascade": True, "agnostic": True}):
        assert with_classes(shapes(3, **kind), 3, 7) == shapes(7, **kind)
    fed = {f"{BOXES}.fed_loss_cls_weights": (3,), "head.cls_score.bias": (9 * 3,)}
    assert [*with_classes(fed, 3, 5).values()] == [(5,), (45,)]


# --- the command ---------------------------------------------------------------------------------

MINI = Path(__file__).parents[2] / "configs/mini/mask_rcnn_vitdet_shapes.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a detector of 4 classes as training leaves it, and lists of classes."""
    folder = tmp_path_factory.mktemp("classes")
    cfg = load_config(MINI)
    set_num_classes(cfg, len(OLD))
    weights = build_model(cfg.model).state_dict()
    about = {"format": 1, "class_names": list(OLD)}
    checkpoint.write(folder / "trained.pth", {"model": weights, "vitdet": about})
    checkpoint.write(folder / "bare.pth", {"model": weights})
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(NEW)]
    lists = {"old": list(OLD), "new": {"categories": categories}, "one": ["Car"]}
    for name, content in (lists | {"table": {"cell phone": "Cell Phone"}}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def run(folder, output, line):
    source, *words = line.replace("@", f"{folder}/").split()
    files = ["--source-model", source, "--output-model", str(output)]
    return converter.main([*files, "--config-file", str(MINI), *words])


def test_command(trained, tmp_path, capsys):
    output, report = tmp_path / "new.pth", tmp_path / "report.json"
    words = "--target-classes @new.json --class-table @table.json"
    assert run(trained, output, f"@trained.pth {words} --report {report}") == 0
    printed = capsys.readouterr().out
    assert "classes      2 carried over (cell phone, car)" in printed
    assert "classes      1 start anew (zebra)" in printed
    assert "classes      2 left out (Person, Street Lights)" in printed
    content, old = checkpoint.read(output), checkpoint.read(trained / "trained.pth")["model"]
    assert content["vitdet"]["class_names"] == list(NEW)
    assert content["vitdet"]["class_ids"] == [10, 11, 12]
    weights, initialised = checkpoint.weights_of(content, source="x")
    score, backbone = f"{BOXES}.cls_score.weight", "backbone.net.blocks.0.attn.qkv.weight"
    assert torch.equal(weights[score][[0, 2, 3]], old[score][[3, 1, 4]])
    assert torch.equal(weights[backbone], old[backbone])
    assert f"{score}[1]" in initialised
    record = json.loads(report.read_text())
    assert record["classes"]["carried"] == {"cell phone": "Cell Phone", "car": "Car"}
    assert record["initialised"] == initialised
    assert set(record["used"]) == set(old)
    # through the converter again: what was open stays open
    again = tmp_path / "again.pth"
    assert run(trained, again, f"{output} model.roi_heads.num_classes=3") == 0
    assert checkpoint.read(again)["vitdet"]["initialised"] == initialised


def test_command_with_both_lists_and_one_new_class(trained, tmp_path):
    output = tmp_path / "one.pth"
    words = "--source-classes @old.json --target-classes @one.json"
    assert run(trained, output, f"@bare.pth {words}") == 0
    content, old = checkpoint.read(output), checkpoint.read(trained / "bare.pth")["model"]
    boxes = f"{BOXES}.bbox_pred.weight"
    assert torch.equal(content["model"][boxes], old[boxes][4:8])
    assert content["vitdet"]["initialised"] == []


WRONG = {
    "none in the file. Add --source-classes": "@bare.pth --target-classes @new.json",
    "file has 4 classes, model 1. Use a recipe, or lists, with its classes": (
        "@bare.pth --source-classes @one.json --target-classes @one.json"
    ),
    "--source-classes: expected --target-classes beside": "@bare.pth --source-classes @old.json",
    "class lists: expected a class in common": "@trained.pth --target-classes @new.json",
    "class list": "@trained.pth --target-classes @table.json",
    "expected {new class: class of the file}": "@trained.pth --target-classes @new.json "
    "--class-table @old.json",
    "No such file": "@trained.pth --target-classes @absent.json",
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_commands(trained, tmp_path, message, capsys):
    assert run(trained, tmp_path / "x.pth", WRONG[message]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
