"""The wrapper finds what the models find; files run, say what they are, or are not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.modeling.roi_heads import Res5ROIHeads, fast_rcnn
from torch import nn
from torchvision.ops import batched_nms

from tests.export.tiny_models import KINDS, images, model
from vitdet import heads, postprocess
from vitdet.export import graph as graphs
from vitdet.export import onnx_file
from vitdet.export.graph import Graph, example_image, exportable
from vitdet.export.onnx_file import export
from vitdet.export.parity import compare
from vitdet.utils.checks import InputError

ABOUT = {"class_names": ["dark", "light"], "category_ids": [1, 3], "resize": [{"size": 64}]}


def boxes(count: int, side: float = 60.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * side
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * side], 1)


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# --- the wrapper --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "boxes inside", "no masks"])
def test_detector(kind: str) -> None:
    """Detections are those of the model's own code, on images of several sizes."""
    masks = {"boxes inside": "boxes", "no masks": "none"}.get(kind, "pasted")
    graph = Graph(model(kind if kind in KINDS else "mask"), masks=masks)

    def run(image: torch.Tensor) -> list[torch.Tensor]:
        with exportable(graph), torch.no_grad():
            return list(graph(image))

    report = compare(graph, run, images())
    assert report.faults == []
    assert report.matched == report.detections > 10
    assert report.at_the_edge == report.extra == 0
    assert report.box < 1e-4
    assert report.score < 1e-6
    assert report.mask_iou > 0.999
    found = run(images()[1])
    assert len(found) == len(graph.outputs)
    if masks == "boxes":
        assert found[3].shape == (len(found[0]), 8, 8)


@pytest.mark.parametrize("kind", ["mask", "soft", "dense"])
def test_no_detection(kind: str) -> None:
    """Nothing above the threshold: empty outputs of the right shapes."""
    made: Any = model(kind)
    scores: Any = made if kind == "dense" else made.roi_heads.box_predictor
    scores.test_score_thresh = 1.0
    graph = Graph(made)
    with exportable(graph), torch.no_grad():
        found, scores, classes, *masks = graph(images()[1])
    assert found.shape == (0, 4)
    assert scores.shape == classes.shape == (0,)
    assert [each.shape for each in masks] == [(0, 50, 64)] * (kind != "dense")


def test_sizes() -> None:
    """Another size, or one beyond the square, stops; the example pads every way."""
    fixed = Graph(model("no_square"), size=(50, 64))
    assert fixed(images()[1])[0].shape[1] == 4
    for graph, image in ((fixed, images()[0]), (Graph(model("mask")), torch.zeros(3, 65, 10))):
        with pytest.raises(RuntimeError, match="expanded size"):
            graph(image.byte())
    assert example_image(fixed).shape == (3, 50, 64)
    height, width = example_image(Graph(model("no_square"))).shape[1:]
    assert height != width
    assert all(side % 16 and -(-side // 16) % 7 for side in (height, width))


def test_all_comes_back() -> None:
    """Kernels and functions are replaced for an export only, whatever happens in it."""
    graph: Any = Graph(model("mask"))
    blocks = graph.model.backbone.net.blocks

    def fails() -> None:
        with exportable(graph):
            assert {block.attn.backend for block in blocks} == {"eager"}
            assert heads.soft_nms is not postprocess.soft_nms
            raise ZeroDivisionError

    before = (fast_rcnn.batched_nms, fast_rcnn.FastRCNNOutputLayers.predict_boxes)
    with pytest.raises(ZeroDivisionError):
        fails()
    assert [block.attn.backend for block in blocks] == ["auto"] * 2
    assert heads.soft_nms is postprocess.soft_nms
    assert (fast_rcnn.batched_nms, fast_rcnn.FastRCNNOutputLayers.predict_boxes) == before


def test_refused_models() -> None:
    made: Any = model("mask")
    own = made.roi_heads
    made.roi_heads = Res5ROIHeads.__new__(Res5ROIHeads)
    nn.Module.__init__(made.roi_heads)
    with pytest.raises(
        InputError, match=r"got GeneralizedRCNN with Res5ROIHeads.* --part backbone"
    ):
        Graph(made)
    made.roi_heads = own
    own.box_predictor.test_topk_per_image = -1
    with pytest.raises(InputError, match="a limit of detections an image is needed"):
        Graph(made)
    with pytest.raises(InputError, match=r"--size 65 64: at most 64 x 64 .*square_pad=0"):
        Graph(made, "backbone", (65, 64))
    with pytest.raises(InputError, match=r"a detector with a backbone is needed, not .*Linear"):
        Graph(nn.Linear(2, 2), "backbone")


def test_paste() -> None:
    """The same pixels as detectron2, where rounding does not decide; also beyond the image."""
    masks = torch.rand(20, 28, 28, generator=torch.Generator().manual_seed(1))
    expected = paste_masks_in_image(masks, boxes(20) - 10, (70, 90))
    got = graphs.paste(masks, boxes(20) - 10, (70, 90))
    assert got.dtype == torch.bool
    assert got.shape == expected.shape
    assert int((got != expected).sum()) <= 2
    assert expected.any(2).any(1).all()


def test_nms_of_many_classes() -> None:
    """As exact with 1203 classes as class by class; boxes may be outside the image."""
    where, scores = boxes(300) - 40, torch.rand(300, generator=torch.Generator().manual_seed(3))
    for classes in (torch.arange(300) % 1203, 903 + torch.arange(300) // 4):
        got = graphs._batched_nms(where, scores, classes, 0.5, groups=1203)
        assert torch.equal(got, batched_nms(where.double(), scores.double(), classes, 0.5))
    none = torch.zeros(0, dtype=torch.long)
    assert len(graphs._batched_nms(where[:0], scores[:0], none, 0.5, groups=3)) == 0


@pytest.mark.parametrize("by_class", [False, True], ids=["", "by_class"])
@pytest.mark.parametrize("method", ["linear", "gaussian", "hard"])
def test_soft_nms(method: str, by_class: bool) -> None:
    """The first places and scores are those of the project's own, also of fewer than may be."""
    where, scores = boxes(60), torch.rand(60, generator=torch.Generator().manual_seed(4))
    classes = torch.arange(60) % 3 if by_class else None
    rules: Any = {"method": method, "iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.2}
    expected, new = postprocess.soft_nms(where, scores, classes, **rules)
    for most in (5, 100):
        places, got = graphs._soft_nms(where, scores, classes, **rules, most=most)
        assert len(places) == min(most, len(expected)) >= 5
        assert torch.equal(places, expected[:most])
        torch.testing.assert_close(got, new[:most])


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no_square", "soft", "cascade", "dense"])
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
    assert (kept["faults"], kept["limits"]["score"], len(kept["sizes"])) == ([], 1e-3, 4)
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.parity.json"}
    note = session.get_modelmeta().custom_metadata_map
    assert note["producer"].startswith("vitdet ")
    assert note["part"] == "detector"
    assert json.loads(note["class_names"]) == ["dark", "light"]
    before = json.loads(note["preprocessing"])
    assert (before["channels"], before["resize"]) == ("RGB", [{"size": 64}])
    assert before["largest"] == (None if kind == "no_square" else [64, 64])
    assert before["mean"] == [120.0, 120.0, 120.0]
    assert list(json.loads(note["outputs"])) == names


def test_a_window_that_does_not_divide(tmp_path: Path) -> None:
    """Padding to windows, relative positions and embeddings follow the size of the image."""
    net: Any = model("no_square")
    for block, window in zip(net.backbone.net.blocks, (3, 0), strict=True):
        block.window_size = window
    net.backbone.net.blocks[0].attn.rel_pos_h = nn.Parameter(torch.randn(5, 16))
    net.backbone.net.blocks[0].attn.rel_pos_w = nn.Parameter(torch.randn(5, 16))
    wide = [*images(), torch.cat(images()[:1] * 3, 2), torch.cat(images()[:1] * 2, 1)[:, :97]]
    report = export(net, tmp_path / "a.onnx", wide, part="backbone")
    assert report.faults == []
    assert len(report.sizes) == 5
    assert report.feature < 1e-5 < report.feature_size
    given = {"image": np.zeros((3, 40, 64), np.uint8)}
    levels: Any = session_of(tmp_path / "a.onnx").run(None, given)
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
    assert not export(model("mask"), out, images(), part="backbone").faults
    assert data.stat().st_size > 100_000
    parts = onnx.load(str(out), load_external_data=False).graph.initializer
    entries = [entry for tensor in parts for entry in tensor.external_data]
    assert {entry.value for entry in entries if entry.key == "location"} == {data.name}
    monkeypatch.undo()
    assert not export(model("mask"), out, images(), part="backbone").faults  # again, without
    assert not data.exists()
    session_of(out)


def test_another_weight_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    report = export(made, out, images())
    assert made.training
    assert any("difference" in fault or "alone" in fault for fault in report.faults)
    assert out.read_text() == "of before"
    failed = tmp_path / "a.onnx.failed.parity.json"
    assert json.loads(failed.read_text())["faults"] == report.faults
    assert {path.name for path in tmp_path.iterdir()} == {out.name, failed.name}
    monkeypatch.undo()
    assert not export(made, out, images()).faults
    assert not failed.exists()


@pytest.mark.parametrize(
    ("options", "name", "text"),
    [
        ({}, "a.pt", r"--out .*a\.pt: the name must end in \.onnx"),
        ({}, "no/a.onnx", r"no folder .*no\. Make it first"),
        ({}, "b.onnx", r"b\.onnx: this is a folder"),
        ({"opset": 11}, "a.onnx", "--opset 11: 17 to 20 can be written"),
        ({"size": (0, 4)}, "a.onnx", "--size 0 4: HEIGHT and WIDTH are pixels"),
        ({"size": (65, 20)}, "a.onnx", "--size 65 20: at most 64 x 64"),
        ({"score": 1.0}, "a.onnx", r"no object is found on the 3 images .* --images FOLDER"),
    ],
)
def test_wrong_settings(tmp_path: Path, options: Any, name: str, text: str) -> None:
    (tmp_path / "b.onnx").mkdir()
    made: Any = model("mask")
    made.roi_heads.box_predictor.test_score_thresh = options.pop("score", 0.05)
    with pytest.raises(InputError, match=text):
        export(made, tmp_path / name, images(), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["b.onnx"]


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


def test_files_and_packages_that_do_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of some sizes of a Vision Longformer, whose shapes onnxruntime does not take."""

    def write(kind: str, domain: str = "") -> None:
        node = onnx.helper.make_node(kind, ["image"], ["x"], domain=domain)
        made = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
        (tmp_path / "a.onnx").write_bytes(made.SerializeToString())

    write("Special", "com.example")
    with pytest.raises(InputError, match=r"operators of com\.example, which not every"):
        onnx_file._finish(tmp_path / "a.onnx", {})
    write("Add")  # of one addend
    with pytest.raises(InputError, match="onnxruntime cannot take the file that torch wrote: "):
        onnx_file.load(tmp_path / "a.onnx")
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    text = r"onnx and onnxruntime is not installed\. Run `pip install onnx onnxruntime`"
    with pytest.raises(InputError, match=text):
        export(model("mask"), tmp_path / "a.onnx", images())
