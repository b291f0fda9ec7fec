"""A head for other classes: rows go by name, the rest starts anew and is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import converter
from vitdet import checkpoint
from vitdet.config import build_model, load_config, set_num_classes
from vitdet.convert.classes import carry, check_count, match, read_classes, read_table, with_classes
from vitdet.convert.names import shapes_of
from vitdet.utils.checks import InputError

OLD = ("Person", "Car", "Street Lights", "Cell Phone")
NEW = ("cell phone", "zebra", "car")
TABLE = {"cell phone": "Cell Phone"}
PREDICTOR = "roi_heads.box_predictor"
MASKS = "roi_heads.mask_head.predictor"


# --- lists ----------------------------------------------------------------------------------------


def written(folder: Path, content: object) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps(content))
    return path


def test_names_of_a_coco_file_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "cow"}]
    path = written(tmp_path, {"images": [], "categories": categories})
    assert list(read_classes(path).items()) == [(3, "dog"), (7, "cat"), (90, "cow")]
    assert read_classes(written(tmp_path, ["b", "a"])) == {1: "b", 2: "a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, r'expected a list of names, or "categories", got the keys images'),
        ("person", "got str"),
        ([], "expected a name for every class, got no class"),
        (["a", 3], "expected a name for every class, got 3"),
        (["a", " "], "expected a name for every class, got ' '"),
        (["a", "b", "a"], "expected each name once, got 'a' and 'a'"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "got 1 twice"),
        ({"categories": [{"name": "a"}]}, 'expected an "id" and a "name" in every category'),
        ({"categories": ["a"]}, 'expected an "id" and a "name" in every category'),
        ({"categories": [{"id": 1}]}, "expected a name for every class, got None"),
    ],
)
def test_wrong_lists(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_classes(written(tmp_path, content))
    assert "\n" not in str(error.value)


def test_files_that_hold_no_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a file, got nothing there"):
        read_classes(tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[1, 2")
    with pytest.raises(InputError, match=r"list\.json: expected JSON, got Expecting"):
        read_classes(tmp_path / "list.json")
    (tmp_path / "list.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(InputError, match=r"list\.json: expected JSON"):
        read_classes(tmp_path / "list.json")
    with pytest.raises(InputError, match=r"expected \{new class: class of the file\}, got list"):
        read_table(written(tmp_path, ["a"]))
    with pytest.raises(InputError, match="got other values than text"):
        read_table(written(tmp_path, {"a": 1}))


def test_names_must_be_equal_without_a_table() -> None:
    found = match(("cat", "Dog", "cell phone"), ("cell_phone", "dog", "cat"))
    assert found.rows == (None, None, 0)
    assert found.as_dict() == {
        "carried": {"cat": "cat"},
        "initialised": ["cell_phone", "dog"],
        "left_out": ["Dog", "cell phone"],
    }


def test_a_table_pairs_and_loosens_names() -> None:
    found = match(("cat", "Dog", "cell phone", "TV"), ("cell_phone", "dog", "tv-set"), {})
    assert found.rows == (2, 1, None)
    table = {"tv-set": "TV", "cellular": "cell phone"}
    assert match(("cell  phone", "TV"), ("cellular", "tv_set"), table).rows == (0, 1)
    # two new classes may begin from one old one, when the table says so
    assert match(("cat",), ("kitten", "cat"), {"kitten": "cat"}).rows == (0, 0)


@pytest.mark.parametrize(
    ("source", "target", "table", "message"),
    [
        (("a", "a"), ("a",), None, "classes of the file: expected each name once, got 'a' and 'a'"),
        (("a",), ("a", "a"), None, "new classes: expected each name once"),
        (("a b", "A_b"), ("a",), {}, r"once without regard to case and underscores, got 'a b' and"),
        (("a",), ("a", "A"), {}, "new classes: expected each name once without regard"),
        (("a",), ("a",), {"b": "a"}, "expected one of the new classes, got 'b'"),
        (("a",), ("a",), {"a": "b"}, "expected one of the file's classes, got 'b'"),
        (("a",), ("b",), {"b": "a", "B": "a"}, "class table: expected each name once"),
    ],
)
def test_ambiguous_names(
    source: tuple[str, ...], target: tuple[str, ...], table: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        match(source, target, table)


# --- rows -----------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """The names of a box predictor, the width 2."""

    def __init__(self, classes: int, agnostic: bool = False) -> None:
        super().__init__()
        self.cls_score = nn.Linear(2, classes + 1)
        self.bbox_pred = nn.Linear(2, 4 if agnostic else 4 * classes)


def detector(classes: int, *, cascade: bool = False, agnostic: bool = False) -> nn.Module:
    """Return modules with the names and shapes of a detector's head and a bit of backbone."""
    predictors = [Predictor(classes, agnostic) for _ in range(3 if cascade else 1)]
    mask_head = nn.ModuleDict({"predictor": nn.Conv2d(2, 1 if agnostic else classes, 1)})
    box = nn.ModuleList(predictors) if cascade else predictors[0]
    heads = nn.ModuleDict({"box_predictor": box, "mask_head": mask_head})
    return nn.ModuleDict({"backbone": nn.Linear(2, 2), "roi_heads": heads})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return shapes_of(model.state_dict())


def test_rows_of_classifier_regressor_and_mask_predictor() -> None:
    before, target = state(detector(4)), shapes(detector(3))
    classes = match(OLD, NEW, {})
    assert classes.rows == (3, None, 1)
    after, initialised = carry(before, target, classes)
    assert {name: tuple(value.shape) for name, value in after.items()} == target
    for kind in ("weight", "bias"):
        score, old = after[f"{PREDICTOR}.cls_score.{kind}"], before[f"{PREDICTOR}.cls_score.{kind}"]
        assert torch.equal(score[0], old[3])
        assert torch.equal(score[2], old[1])
        assert torch.equal(score[3], old[4])  # background
        boxes, old = after[f"{PREDICTOR}.bbox_pred.{kind}"], before[f"{PREDICTOR}.bbox_pred.{kind}"]
        assert torch.equal(boxes[:4], old[12:16])
        assert torch.equal(boxes[8:], old[4:8])
        masks, old = after[f"{MASKS}.{kind}"], before[f"{MASKS}.{kind}"]
        assert torch.equal(masks[0], old[3])
        assert torch.equal(masks[2], old[1])
    assert torch.equal(after["backbone.weight"], before["backbone.weight"])
    assert sorted(initialised) == [
        f"{PREDICTOR}.bbox_pred.bias[4-7]",
        f"{PREDICTOR}.bbox_pred.weight[4-7]",
        f"{PREDICTOR}.cls_score.bias[1]",
        f"{PREDICTOR}.cls_score.weight[1]",
        f"{MASKS}.bias[1]",
        f"{MASKS}.weight[1]",
    ]


def test_cascade_with_shared_regressor() -> None:
    model, target = detector(4, cascade=True, agnostic=True), detector(3, cascade=True)
    before = state(model)
    target = shapes(detector(3, cascade=True, agnostic=True))
    after = carry(before, target, match(OLD, NEW, {}))[0]
    for stage in range(3):
        name = f"{PREDICTOR}.{stage}.cls_score.weight"
        assert torch.equal(after[name][[0, 2, 3]], before[name][[3, 1, 4]])
        name = f"{PREDICTOR}.{stage}.bbox_pred.weight"
        assert torch.equal(after[name], before[name])
    assert torch.equal(after[f"{MASKS}.weight"], before[f"{MASKS}.weight"])


def test_one_class_is_told_from_a_shared_head_by_the_target() -> None:
    before = state(detector(1))
    classes = match(("car",), ("car", "dog"))
    after = carry(before, shapes(detector(2)), classes)[0]
    assert torch.equal(
        after[f"{PREDICTOR}.bbox_pred.bias"][:4], before[f"{PREDICTOR}.bbox_pred.bias"]
    )
    same = carry(before, shapes(detector(2, agnostic=True)), classes)[0]
    name = f"{PREDICTOR}.bbox_pred.bias"
    assert torch.equal(same[name], before[name])
    assert torch.equal(same[f"{MASKS}.bias"], before[f"{MASKS}.bias"])


def test_retinanet_has_rows_for_every_anchor() -> None:
    before = {"head.cls_score.weight": torch.arange(8.0).view(8, 1)}  # 2 anchors, 4 classes
    after, initialised = carry(before, {"head.cls_score.weight": (6, 1)}, match(OLD, NEW, {}))
    assert after["head.cls_score.weight"].flatten().tolist() == [3, 0, 1, 7, 0, 5]
    assert initialised == ["head.cls_score.weight[1,4]"]


def test_counts_of_the_federated_loss_are_not_carried_over() -> None:
    name = f"{PREDICTOR}.fed_loss_cls_weights"
    before = state(detector(4)) | {name: torch.ones(4)}
    target = shapes(detector(3))
    after, _ = carry(before, target, match(OLD, NEW, {}))
    assert name not in after
    after, initialised = carry(before, target | {name: (3,)}, match(OLD, NEW, {}))
    assert name not in after
    assert name in initialised


def test_rows_that_were_open_stay_open() -> None:
    first, left = carry(state(detector(4)), shapes(detector(3)), match(OLD, NEW, {}))
    back = match(NEW, ("car", "zebra"))
    _, left = carry(first, shapes(detector(2)), back, [*left, "backbone.x"])
    assert "backbone.x" in left
    assert f"{PREDICTOR}.cls_score.bias[1]" in left
    assert f"{PREDICTOR}.bbox_pred.bias[4-7]" in left
    assert len(left) == 7


def test_there_and_back_is_the_identity() -> None:
    before = state(detector(4, cascade=True))
    new = ("Cell Phone", "a", "Person", "Street Lights", "b", "Car")
    there, left = carry(before, shapes(detector(6, cascade=True)), match(OLD, new))
    again, left = carry(there, shapes(detector(4, cascade=True)), match(new, OLD), left)
    assert left == []
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_wrong_heads() -> None:
    classes = match(OLD, NEW, {})
    with pytest.raises(InputError, match="expected a detector with a classifier, got names like w"):
        carry({"w": torch.ones(1)}, {"w": (1,)}, classes)
    with pytest.raises(InputError, match=r"expected rows for 4 classes, got the shape \(6, 2\)"):
        carry(state(detector(5)), shapes(detector(3)), classes)
    with pytest.raises(InputError, match=r"x\.pth: expected 5 names, as its head has .* 4 names"):
        check_count(shapes(detector(5)), OLD, "x.pth")
    check_count({"w": (1,)}, OLD, "x.pth")
    with pytest.raises(InputError, match="expected 365 names"):
        check_count({"roi_head.bbox_head.2.fc_cls.weight": (366, 4)}, OLD, "x.pth")


def test_shapes_with_another_number_of_classes() -> None:
    for cascade, agnostic in ((False, False), (True, True), (True, False)):
        have = shapes(detector(3, cascade=cascade, agnostic=agnostic))
        want = shapes(detector(7, cascade=cascade, agnostic=agnostic))
        assert with_classes(have, 3, 7) == want
        assert with_classes(want, 7, 1) == shapes(detector(1, cascade=cascade, agnostic=agnostic))
    assert with_classes({"head.cls_score.bias": (9 * 3,)}, 3, 5) == {"head.cls_score.bias": (45,)}
    fed = f"{PREDICTOR}.fed_loss_cls_weights"
    assert with_classes({fed: (3,)}, 3, 5) == {fed: (5,)}


# --- loading --------------------------------------------------------------------------------------


def test_loading_keeps_the_models_own_values_in_open_rows() -> None:
    weights, initialised = carry(state(detector(4)), shapes(detector(3)), match(OLD, NEW, {}))
    model = detector(3)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.load_weights(model, weights, source="x", initialised=initialised)
    loaded = model.state_dict()
    for name, rows in ((f"{PREDICTOR}.cls_score.weight", [1]), (f"{MASKS}.weight", [1])):
        others = [row for row in range(len(own[name])) if row not in rows]
        assert torch.equal(loaded[name][rows], own[name][rows])
        assert torch.equal(loaded[name][others], weights[name][others])
    boxes = f"{PREDICTOR}.bbox_pred.weight"
    assert torch.equal(loaded[boxes][4:8], own[boxes][4:8])
    assert not torch.equal(loaded[boxes][:4], own[boxes][:4])
    # the file's tensors are not touched
    assert not weights[boxes][4:8].any()


@pytest.mark.parametrize(
    "entry", ["backbone.bias[2]", "backbone.bias[0-5]", "backbone.bias[1-0]", "absent[0]"]
)
def test_rows_that_are_not_there(entry: str) -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2)})
    with pytest.raises(InputError, match="expected rows of a tensor in the file, got "):
        checkpoint.load_weights(model, model.state_dict(), source="x", initialised=[entry])


# --- the command ----------------------------------------------------------------------------------

MINI = Path(__file__).parents[2] / "configs/mini/mask_rcnn_vitdet_shapes.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a detector of 4 classes as training leaves it, and lists of classes."""
    folder = tmp_path_factory.mktemp("classes")
    cfg = load_config(MINI)
    set_num_classes(cfg, len(OLD))
    torch.manual_seed(0)
    weights = build_model(cfg.model).state_dict()
    about = {"format": 1, "class_names": list(OLD)}
    checkpoint.write(folder / "trained.pth", {"model": weights, "vitdet": about})
    bare = {"model": weights}
    checkpoint.write(folder / "bare.pth", bare)
    (folder / "old.json").write_text(json.dumps(list(OLD)))
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(NEW)]
    (folder / "new.json").write_text(json.dumps({"categories": categories}))
    (folder / "table.json").write_text(json.dumps(TABLE))
    return folder


def run(folder: Path, source: str, output: Path, *words: str) -> int:
    options = ["--source-model", str(folder / source), "--output-model", str(output)]
    paths = [word.replace("@", f"{folder}/") for word in words]
    return converter.main([*options, "--config-file", str(MINI), *paths])


def test_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, report = tmp_path / "new.pth", tmp_path / "report.json"
    words = ["--target-classes", "@new.json", "--class-table", "@table.json"]
    assert run(trained, "trained.pth", output, *words, "--report", str(report)) == 0
    printed = capsys.readouterr().out
    assert "classes      2 carried over (cell phone, car)" in printed
    assert "classes      1 start anew (zebra)" in printed
    assert "classes      2 left out (Person, Street Lights)" in printed

    content = checkpoint.read(output)
    assert content["vitdet"]["class_names"] == list(NEW)
    assert content["vitdet"]["class_ids"] == [10, 11, 12]
    old = checkpoint.read(trained / "trained.pth")["model"]
    cfg = load_config(MINI)
    set_num_classes(cfg, len(NEW))
    model = build_model(cfg.model)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    weights, initialised = checkpoint.weights_of(content, source="x")
    checkpoint.load_weights(model, weights, source="x", initialised=initialised)
    score = f"{PREDICTOR}.cls_score.weight"
    loaded = model.state_dict()
    assert torch.equal(loaded[score][[0, 2, 3]], old[score][[3, 1, 4]])
    assert torch.equal(loaded[score][1], own[score][1])
    backbone = "backbone.net.blocks.0.attn.qkv.weight"
    assert torch.equal(loaded[backbone], old[backbone])

    record = json.loads(report.read_text())
    assert record["classes"]["carried"] == {"cell phone": "Cell Phone", "car": "Car"}
    assert record["initialised"] == initialised
    assert f"{score}[1]" in initialised
    assert set(record["used"]) == set(old)

    # through the converter again: what was open stays open
    again = tmp_path / "again.pth"
    options = ["--source-model", str(output), "--output-model", str(again)]
    changed = "model.roi_heads.num_classes=3"
    assert converter.main([*options, "--config-file", str(MINI), changed]) == 0
    assert checkpoint.read(again)["vitdet"]["initialised"] == initialised


def test_command_with_both_lists_and_one_new_class(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('["Car"]')
    output = tmp_path / "one.pth"
    words = ["--source-classes", "@old.json", "--target-classes", str(tmp_path / "one.json")]
    assert run(trained, "bare.pth", output, *words) == 0
    content, old = checkpoint.read(output), checkpoint.read(trained / "bare.pth")["model"]
    boxes = f"{PREDICTOR}.bbox_pred.weight"
    assert torch.equal(content["model"][boxes], old[boxes][4:8])
    assert content["vitdet"]["initialised"] == []


WRONG: dict[str, tuple[str, list[str]]] = {
    "expected the file's class names, got none in the file. Add --source-classes": (
        *("bare.pth", ["--target-classes", "@new.json"]),
    ),
    "expected 4 names, as its head has classes, got 3 names": (
        *("bare.pth", ["--source-classes", "@new.json", "--target-classes", "@old.json"]),
    ),
    "--source-classes: expected --target-classes beside it": (
        *("bare.pth", ["--source-classes", "@old.json"]),
    ),
    "class lists: expected a class in common": (
        *("trained.pth", ["--target-classes", "@new.json"]),
    ),
    "class list": ("trained.pth", ["--target-classes", "@table.json"]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_commands(
    trained: Path, tmp_path: Path, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, words = WRONG[message]
    assert run(trained, source, tmp_path / "x.pth", *words) == 2
    error: Any = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
