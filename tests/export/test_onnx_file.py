"""ONNX files: they run, say what they are, and are refused when they differ."""

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
from vitdet.export import onnx_file
from vitdet.export.onnx_file import export
from vitdet.utils.checks import InputError

ABOUT = {
    "class_names": ["dark", "light"],
    "category_ids": [1, 3],
    "recipe": "model: {}\n",
    "resize": [{"size": 64}],
}


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", ["no_square", "soft", "cascade", "agnostic", "dense"])
def test_any_size(tmp_path: Path, kind: str) -> None:
    """Images of any size, also such that there are fewer proposals than where it was followed."""
    out, made = tmp_path / "model.onnx", model(kind)
    report = export(made, out, [*images(), images()[0][:, :3, :5].contiguous()], about=ABOUT)
    assert report.faults == []
    assert report.detections == report.matched > 20
    session = session_of(out)
    names = ["boxes", "scores", "classes", *["masks"] * (kind != "dense")]
    assert [each.name for each in session.get_outputs()] == names
    assert session.get_inputs()[0].shape == [3, "height", "width"]
    found: Any = session.run(None, {"image": np.zeros((3, 33, 47), np.uint8)})
    assert len({len(each) for each in found}) == 1
    assert [each.shape[1:] for each in found[3:]] == [(33, 47)] * (kind != "dense")
    assert {node.domain for node in onnx.load(str(out)).graph.node} == {""}
    kept = json.loads((tmp_path / "model.onnx.parity.json").read_text())
    assert kept["holds"]
    assert len(kept["sizes"]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx",
        "model.onnx.parity.json",
    ]
    note = session.get_modelmeta().custom_metadata_map
    assert note["producer"].startswith("vitdet ")
    assert note["part"] == "detector"
    assert json.loads(note["class_names"]) == ["dark", "light"]
    assert json.loads(note["category_ids"]) == [1, 3]
    assert note["recipe"] == "model: {}\n"
    before = json.loads(note["preprocessing"])
    assert before["channels"] == "RGB"
    assert before["resize"] == [{"size": 64}]
    assert before["largest"] == (None if kind == "no_square" else [64, 64])
    assert before["mean"] == [120.0, 120.0, 120.0]
    assert list(json.loads(note["outputs"])) == names
    assert json.loads(note["input"])["image"]["type"] == "uint8"


def test_a_window_that_does_not_divide(tmp_path: Path) -> None:
    """Padding to windows, relative positions and embeddings follow the size of the image."""
    net: Any = model("no_square")
    for block, window in zip(net.backbone.net.blocks, (3, 0), strict=True):
        block.window_size = window
    net.backbone.net.blocks[0].attn.rel_pos_h = torch.nn.Parameter(torch.randn(5, 16))
    net.backbone.net.blocks[0].attn.rel_pos_w = torch.nn.Parameter(torch.randn(5, 16))
    wide = [*images(), torch.cat(images()[:1] * 3, 2), torch.cat(images()[:1] * 2, 1)[:, :97]]
    report = export(net, tmp_path / "a.onnx", wide, part="backbone")
    assert report.faults == []
    assert len(report.sizes) == 5
    levels: Any = session_of(tmp_path / "a.onnx").run(
        None, {"image": np.zeros((3, 40, 64), np.uint8)}
    )
    assert [each.shape[1] for each in levels] == [32] * 5


def test_one_size(tmp_path: Path) -> None:
    out, given = tmp_path / "a.onnx", [image[:, :48, :40] for image in images()[:2]]
    options: Any = {"size": (48, 40), "masks": "none", "opset": 18}
    assert export(model("no_square"), out, given, **options).faults == []
    entry = session_of(out).get_inputs()[0]
    assert (entry.shape, entry.type) == ([3, 48, 40], "tensor(uint8)")
    assert onnx.load(str(out)).opset_import[0].version == 18


def test_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some size on weights stand in a file beside, and belong to it under its name."""
    out, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    monkeypatch.setattr(onnx_file, "EXTERNAL_FROM", 1000)
    assert export(model("mask"), out, images(), part="backbone").holds
    assert data.stat().st_size > 100_000
    found = {
        entry.value
        for tensor in onnx.load(str(out), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert found == {"model.onnx.data"}
    monkeypatch.undo()
    assert export(model("mask"), out, images(), part="backbone").holds  # again, without
    assert not data.exists()
    session_of(out)


@pytest.mark.parametrize("part", ["detector", "backbone"])
def test_another_weight_is_no_export(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One changed row of weights is found, the file is not there, and what was there stays."""
    write = onnx_file.write

    def changed(graph: Any, *rest: Any) -> None:
        weight = graph.model.backbone.net.blocks[1].mlp.fc1.weight
        with torch.no_grad():
            weight[:4] *= -1
            write(graph, *rest)
            weight[:4] *= -1

    monkeypatch.setattr(onnx_file, "write", changed)
    out = tmp_path / "a.onnx"
    out.write_text("of before")
    made: Any = model("mask").train()
    report = export(made, out, images(), part=part)
    assert not report.holds
    assert made.training
    assert any("difference" in fault or "alone" in fault for fault in report.faults)
    assert out.read_text() == "of before"
    failed = tmp_path / "a.onnx.failed.parity.json"
    assert json.loads(failed.read_text())["faults"] == report.faults
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, failed.name]
    monkeypatch.undo()
    assert export(made, out, images(), part=part).holds
    assert not failed.exists()


@pytest.mark.parametrize(
    ("options", "name", "text"),
    [
        ({}, "a.pt", r"--out .*a\.pt: the name must end in \.onnx"),
        ({}, "no/a.onnx", r"no folder .*no\. Make it first"),
        ({"opset": 11}, "a.onnx", "--opset 11: 17 to 20 can be written"),
        ({"size": (0, 4)}, "a.onnx", "--size 0 4: HEIGHT and WIDTH are pixels"),
        ({"size": (20, 20)}, "a.onnx", r"image to compare on: 64 x 64 is not \(20, 20\)"),
        ({"size": (65, 20)}, "a.onnx", "--size 65 20: at most 64 x 64"),
    ],
)
def test_wrong_settings(tmp_path: Path, options: Any, name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        export(model("mask"), tmp_path / name, images(), **options)
    assert list(tmp_path.iterdir()) == []


def test_images_that_prove_nothing(tmp_path: Path) -> None:
    """Too large for the square, or without an object: said before anything is written."""
    large = [torch.zeros(3, 70, 10, dtype=torch.uint8)]
    with pytest.raises(InputError, match="image to compare on: 70 x 10 does not fit into 64 x 64"):
        export(model("mask"), tmp_path / "a.onnx", large)
    made: Any = model("mask")
    made.roi_heads.box_predictor.test_score_thresh = 1.0
    with pytest.raises(InputError, match=r"no object is found on the 3 images .* --images FOLDER"):
        export(made, tmp_path / "a.onnx", images())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.onnx").mkdir()
    with pytest.raises(InputError, match=r"b\.onnx: this is a folder"):
        export(made, tmp_path / "b.onnx", images())


@pytest.mark.parametrize("where", ["write", "_finish", "_put"])
def test_full_disk(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the file's name, and nothing of the file is left."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_file, where, full)
    text = r"--out .*a\.onnx: it cannot be written \(No space left on device\)"
    with pytest.raises(InputError, match=text):
        export(model("mask"), tmp_path / "a.onnx", images(), part="backbone")
    assert list(tmp_path.iterdir()) == []


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    text = r"an export needs onnx and onnxruntime, .*`pip install onnx onnxruntime`"
    with pytest.raises(InputError, match=text):
        export(model("mask"), tmp_path / "a.onnx", images())


def test_operators_of_others_are_refused() -> None:
    node = onnx.helper.make_node("Special", [], ["x"], domain="com.example")
    made = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(InputError, match=r"operators of com\.example, which not every"):
        onnx_file._check_operators(made)


def test_a_file_that_the_runtime_refuses_is_one_line(tmp_path: Path) -> None:
    """As it does with some sizes of a Vision Longformer, whose shapes do not agree."""
    node = onnx.helper.make_node("Add", ["image"], ["x"])  # one addend
    made = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    (tmp_path / "a.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(InputError, match="onnxruntime cannot take the file that torch wrote: "):
        onnx_file.load(tmp_path / "a.onnx")
