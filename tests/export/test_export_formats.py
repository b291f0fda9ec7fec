"""Files of every format: they run, say what they are, and are refused when they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.export.tiny_models import images, model
from vitdet.export import formats
from vitdet.export.formats import FORMATS
from vitdet.export.run import Origin, Settings, export
from vitdet.utils.checks import InputError

ORIGIN = Origin(["dark", "light"], "model: {}\n", '[{"size": 64}]', "model_final.pth")


def exported(tmp_path: Path, kind: str, settings: Settings, **options: Any) -> Path:
    """Export a tiny model; the report has to hold."""
    out = tmp_path / f"model{FORMATS[settings.format].suffix}"
    given = images()
    if settings.size is not None:
        given = [image[:, : settings.size[0], : settings.size[1]] for image in given[:2]]
    made = model(kind, **options)
    report = export(made, out, settings, given, ORIGIN)
    assert report.faults == []
    assert not made.training
    assert settings.part == "backbone" or report.matched > 5
    return out


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("mask", "cascade", "soft", "bgr")]


@pytest.mark.parametrize("kind", ["no_square", "dense", *SLOW])
def test_onnx_of_any_size(tmp_path: Path, kind: str) -> None:
    out = exported(tmp_path, kind, Settings("onnx"))
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    names = ["boxes", "scores", "classes", *["masks"] * (kind != "dense")]
    assert [each.name for each in session.get_outputs()] == names
    assert session.get_inputs()[0].shape == [3, "height", "width"]
    image = np.zeros((3, 33, 47), np.uint8)
    boxes, scores, classes, *masks = session.run(None, {"image": image})
    assert len(boxes) == len(scores) == len(classes)
    assert [mask.shape[1:] for mask in masks] == [(33, 47)] * (kind != "dense")
    assert {node.domain for node in onnx.load(str(out)).graph.node} == {""}
    report = json.loads((tmp_path / "model.onnx.parity.json").read_text())
    assert report["holds"]
    assert len(report["sizes"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx",
        "model.onnx.parity.json",
    ]


def test_onnx_of_a_window_that_does_not_divide(tmp_path: Path) -> None:
    """Padding to windows, relative positions and embeddings follow the size of the image."""
    net = model("no_square")
    for block, window in zip(net.backbone.net.blocks, (3, 0), strict=True):
        block.window_size = window
    net.backbone.net.blocks[0].attn.rel_pos_h = torch.nn.Parameter(torch.randn(5, 16))
    net.backbone.net.blocks[0].attn.rel_pos_w = torch.nn.Parameter(torch.randn(5, 16))
    wide = [*images(), torch.cat(images()[:1] * 3, 2), torch.cat(images()[:1] * 2, 1)[:, :97]]
    report = export(net, tmp_path / "a.onnx", Settings("onnx", part="backbone"), wide)
    assert report.faults == []
    assert len(report.sizes) == 5


def test_onnx_of_one_size(tmp_path: Path) -> None:
    one = Settings("onnx", size=(48, 40), input="float32", masks="none")
    out = exported(tmp_path, "no_square", one)
    session = onnxruntime.InferenceSession(str(out))
    assert session.get_inputs()[0].shape == [3, 48, 40]
    assert session.get_inputs()[0].type == "tensor(float)"


@pytest.mark.parametrize("kind", ["mask", "no_square"])
def test_onnx_of_the_backbone(tmp_path: Path, kind: str) -> None:
    out = exported(tmp_path, kind, Settings("onnx", part="backbone", opset=18))
    session = onnxruntime.InferenceSession(str(out))
    assert [each.name for each in session.get_outputs()] == ["p2", "p3", "p4", "p5", "p6"]
    levels = session.run(None, {"image": np.zeros((3, 40, 64), np.uint8)})
    assert levels[0].shape == (1, 32, 16, 16)
    assert onnx.load(str(out)).opset_import[0].version == 18


def test_external_data(tmp_path: Path) -> None:
    """From some size on weights stand in a file beside, and belong to it under its name."""
    part = "backbone"
    out = exported(tmp_path, "mask", Settings("onnx", part=part, external_from=1000))
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size > 100_000
    found = {
        entry.value
        for tensor in onnx.load(str(out), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert found == {"model.onnx.data"}
    exported(tmp_path, "mask", Settings("onnx", part=part))  # again, without
    assert not data.exists()
    onnxruntime.InferenceSession(str(out))


@pytest.mark.parametrize(("name", "part"), [("torchscript", "detector"), ("onnx", "backbone")])
def test_note(tmp_path: Path, name: str, part: str) -> None:
    out = exported(tmp_path, "mask", Settings(name, part=part))
    check_note(FORMATS[name].note(out), part)


def check_note(note: dict[str, str], part: str) -> None:
    assert note["producer"].startswith("vitdet ")
    assert note["part"] == part
    assert json.loads(note["class_names"]) == ["dark", "light"]
    assert note["recipe"] == "model: {}\n"
    assert note["weights"] == "model_final.pth"
    before = json.loads(note["preprocessing"])
    assert before["channels"] == "RGB"
    assert before["resize"] == '[{"size": 64}]'
    assert before["largest"] == [64, 64]
    assert before["mean"] == [120.0, 120.0, 120.0]
    outputs = json.loads(note["outputs"])
    assert next(iter(outputs)) == ("boxes" if part == "detector" else "p2")
    assert json.loads(note["input"])["image"]["type"] == "uint8"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("no_square", Settings("torchscript")),
        pytest.param("soft", Settings("torchscript", masks="boxes"), marks=pytest.mark.slow),
        ("mask", Settings("torchscript", size=(50, 64), part="backbone")),
    ],
)
def test_torchscript(tmp_path: Path, kind: str, settings: Settings) -> None:
    out = exported(tmp_path, kind, settings)
    run = FORMATS["torchscript"].load(out)
    if settings.size is not None:
        with pytest.raises(RuntimeError, match="expanded size"):
            run(images()[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask", "cascade", "soft", "dense"])
def test_torch_export(tmp_path: Path, kind: str) -> None:
    """The whole detector, of any size that fits into the square."""
    out = exported(tmp_path, kind, Settings("torch-export"))
    check_note(FORMATS["torch-export"].note(out), "detector")
    run = FORMATS["torch-export"].load(out)
    boxes, *_ = run(torch.full((3, 40, 30), 110, dtype=torch.uint8))
    assert boxes.shape[1] == 4


@pytest.mark.slow
def test_torch_export_of_the_backbone(tmp_path: Path) -> None:
    out = exported(tmp_path, "no_square", Settings("torch-export", part="backbone", size=(50, 60)))
    program = torch.export.load(str(out))
    assert len(program.graph_signature.user_outputs) == 5


def changed_write(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a format write the model with one weight changed."""
    kind = FORMATS[name]

    def write(graph: Any, path: Path, order: formats.Order) -> None:
        weight = graph.model.backbone.net.blocks[1].mlp.fc1.weight
        with torch.no_grad():
            weight[:4] *= -1
            kind.write(graph, path, order)
            weight[:4] *= -1

    monkeypatch.setitem(FORMATS, name, kind._replace(write=write))


@pytest.mark.parametrize(("name", "part"), [("torchscript", "detector"), ("onnx", "backbone")])
def test_another_weight_is_no_export(
    tmp_path: Path, name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One changed row of weights is found, the file is not there, and what was there stays."""
    changed_write(name, monkeypatch)
    out = tmp_path / f"a{FORMATS[name].suffix}"
    out.write_text("of before")
    report = export(model("mask"), out, Settings(name, part=part), images())
    assert not report.holds
    assert any("difference" in fault or "alone" in fault for fault in report.faults)
    assert out.read_text() == "of before"
    failed = tmp_path / f"{out.name}.failed.parity.json"
    assert json.loads(failed.read_text())["faults"] == report.faults
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, failed.name]
    monkeypatch.undo()
    assert export(model("mask"), out, Settings(name, part=part), images()).holds
    assert not failed.exists()


@pytest.mark.parametrize(
    ("settings", "name", "text"),
    [
        (Settings("tflite"), "a.onnx", "--format: expected one of onnx, torchscript, torch-export"),
        (Settings("onnx"), "a.pt", r"--out .*a.pt: expected a name in .onnx, got .pt"),
        (Settings("onnx"), "no/a.onnx", "expected an existing folder, got none. Create it first"),
        (Settings("onnx", opset=11), "a.onnx", "--opset: expected 17 to 20, got 11"),
        (Settings("onnx", part="neck"), "a.onnx", "--part: expected one of detector, backbone"),
        (Settings("onnx", masks="all"), "a.onnx", "--masks: expected one of pasted, boxes, none"),
        (Settings("onnx", input="int8"), "a.onnx", "--input: expected one of uint8, float32"),
        (Settings("onnx", size=(0, 4)), "a.onnx", "--size: expected HEIGHT and WIDTH in pixels"),
        (Settings("onnx", size=(20, 20)), "a.onnx", "image to compare on: expected 20 x 20, got"),
        (Settings("onnx", size=(65, 20)), "a.onnx", "--size: expected at most 64 x 64"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: Settings, name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        export(model("mask"), tmp_path / name, settings, images())
    assert list(tmp_path.iterdir()) == []


def test_size_that_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--format torch-export: .*Add --size HEIGHT WIDTH"):
        export(model("no_square"), tmp_path / "a.pt2", Settings("torch-export"), images())
    large = [torch.zeros(3, 70, 10, dtype=torch.uint8)]
    with pytest.raises(InputError, match="image to compare on: expected at most 64 x 64, got 70"):
        export(model("mask"), tmp_path / "a.onnx", Settings("onnx"), large)


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    text = r"--format onnx: expected the packages onnx, onnxruntime, .*vitdet\[export\]"
    with pytest.raises(InputError, match=text):
        export(model("mask"), tmp_path / "a.onnx", Settings("onnx"), images())


def test_operators_of_others_are_refused() -> None:
    node = onnx.helper.make_node("Special", [], ["x"], domain="com.example")
    made = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(InputError, match=r"operators only, got operators of com\.example"):
        formats._check_operators(made)
