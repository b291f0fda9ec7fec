"""The wrapper and its files find what the models find; what differs is seen, and not written."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.modeling.roi_heads import Res5ROIHeads, fast_rcnn
from torch import nn
from torchvision.ops import batched_nms

import vitdet.export as exporting
from tests.export.tiny_models import KINDS, images, model
from vitdet import heads, postprocess
from vitdet.export import compare, export, table
from vitdet.export import graph as graphs
from vitdet.export.graph import Graph, example_image, exportable
from vitdet.utils.checks import InputError

ABOUT = {"class_names": ["dark", "light"], "category_ids": [1, 3], "resize": [{"size": 64}]}
IMAGE = torch.zeros(3, 64, 64, dtype=torch.uint8)
Found = list[torch.Tensor]


def boxes(count, side=60.0):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * side
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * side], 1)


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# --- the wrapper --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "boxes inside", "no masks"])
def test_detector(kind):
    """Detections are those of the model's own code, on images of several sizes, also none."""
    masks = {"boxes inside": "boxes", "no masks": "none"}.get(kind, "pasted")
    made = model(kind if kind in KINDS else "mask")
    graph = Graph(made, masks=masks)

    def run(image):
        with exportable(graph), torch.no_grad():
            return list(graph(image))

    report = compare(graph, run, images())
    assert report.faults == []
    assert report.matched == report.detections > 10
    assert report.at_the_edge == report.extra == 0
    assert report.largest["box"] < 1e-4
    assert report.largest["score"] < 1e-6
    assert report.largest.get("mask", 0.0) < 1e-3
    found = run(images()[1])
    assert len(found) == len(graph.outputs)
    if masks == "boxes":
        assert found[3].shape == (len(found[0]), 8, 8)
    if kind in ("mask", "soft", "dense"):  # nothing is found
        scores = made if kind == "dense" else made.roi_heads.box_predictor
        scores.test_score_thresh = 1.0
        shapes = [tuple(each.shape) for each in run(images()[1])]
        assert shapes == [(0, 4), (0,), (0,), *[(0, 50, 64)] * (kind != "dense")]


def test_sizes():
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


def test_all_comes_back():
    """Kernels and functions are replaced for an export only."""
    graph = Graph(model("mask"))
    block, before = graph.model.backbone.net.blocks[1], fast_rcnn.batched_nms
    with exportable(graph):
        assert block.attn.backend == "eager"
        assert heads.soft_nms is not postprocess.soft_nms
    assert (block.attn.backend, heads.soft_nms) == ("auto", postprocess.soft_nms)
    assert fast_rcnn.batched_nms is before


def test_refused_models():
    made = model("mask")
    own = made.roi_heads
    made.roi_heads = Res5ROIHeads.__new__(Res5ROIHeads)
    nn.Module.__init__(made.roi_heads)
    with pytest.raises(InputError, match=r"GeneralizedRCNN with Res5ROIHeads.* --part backbone"):
        Graph(made)
    made.roi_heads = own
    own.box_predictor.test_topk_per_image = -1
    with pytest.raises(InputError, match="a limit of detections an image is needed"):
        Graph(made)
    with pytest.raises(InputError, match=r"--size 65 64: .* 1 to 64 \(.*square_pad"):
        Graph(made, "backbone", (65, 64))


def test_nms_of_many_classes():
    """As exact with 1203 classes as class by class; boxes may be outside the image."""
    where, scores = boxes(300) - 40, torch.rand(300, generator=torch.Generator().manual_seed(3))
    for classes in (torch.arange(300) % 1203, 903 + torch.arange(300) // 4):
        got = graphs._batched_nms(where, scores, classes, 0.5, groups=1203)
        assert torch.equal(got, batched_nms(where.double(), scores.double(), classes, 0.5))
    none = torch.zeros(0, dtype=torch.long)
    assert len(graphs._batched_nms(where[:0], scores[:0], none, 0.5, groups=3)) == 0


@pytest.mark.parametrize("by_class", [False, True], ids=["", "by_class"])
@pytest.mark.parametrize("method", ["linear", "gaussian", "hard"])
def test_soft_nms(method, by_class):
    """The first places and scores are those of the project's own, also of fewer than may be."""
    where, scores = boxes(60), torch.rand(60, generator=torch.Generator().manual_seed(4))
    classes = torch.arange(60) % 3 if by_class else None
    rules = {"method": method, "iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.2}
    expected, new = postprocess.soft_nms(where, scores, classes, **rules)
    for most in (5, 100):
        places, got = graphs._soft_nms(where, scores, classes, **rules, most=most)
        assert len(places) == min(most, len(expected)) >= 5
        assert torch.equal(places, expected[:most])
        torch.testing.assert_close(got, new[:most])


# --- the comparison -----------------------------------------------------------------------------


def found():
    """Three detections: boxes, scores, classes, masks."""
    where = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60], [1, 0, 21, 20]])
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    for mask, box in zip(masks, where.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = True
    return [where, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), masks]


@pytest.fixture
def judged(monkeypatch):
    """Compare two lists of detections, at most 10, above 0.05."""
    graph = Graph(model("mask"))

    def compared(wanted, got):
        monkeypatch.setattr(exporting, "outputs_of", lambda *_: wanted)
        return compare(graph, lambda _: got, [IMAGE])

    return compared


def test_equal_also_in_another_order(judged):
    wanted = found()
    wanted[1] = torch.tensor([0.9, 0.9, 0.9])
    report = judged(wanted, [each[[2, 0, 1]] for each in wanted])
    assert report.faults == []
    assert (report.detections, report.matched, report.extra, report.at_the_edge) == (3, 3, 0, 0)
    assert report.largest == {"box": 0.0, "score": 0.0, "mask": 0.0}


@pytest.mark.parametrize(
    ("part", "place", "value", "fault"),
    [
        (0, (1, 2), 60.6, "largest box difference 0.6 > 0.5"),
        (0, (1, 2), float("nan"), "of one alone 2 > 0"),
        (1, (1,), 0.802, "largest score difference 0.002 > 0.001"),
        (1, (1,), float("nan"), "largest score difference nan > 0.001"),
        (2, (1,), 0, "detections of one alone 2 > 0"),
        (3, (0, 0), True, r"largest mask difference 0.0991 > 0.01"),
    ],
)
def test_differences(judged, part, place, value, fault):
    got = found()
    got[part][place] = value
    report = judged(found(), got)
    assert len(report.faults) == 1
    assert re.search(fault, report.faults[0])
    assert report.faults[0] in table(report)[-1]


def test_detections_of_one_alone_and_at_the_edge(judged):
    """By rounding a score falls on either side of the threshold, and the last of equal ones go."""
    report = judged(found(), [each[:2] for each in found()])
    assert report.faults == ["detections of one alone 1 > 0"]
    assert (report.extra, report.matched) == (1, 2)
    none = [each[:0] for each in found()]
    assert judged(found(), none).extra == 3
    nothing = ["nothing was found on any image, so nothing was compared"]
    assert judged(none, none).faults == nothing
    wanted = found()
    for score, faults in ((0.0505, 0), (0.0515, 1)):
        wanted[1][2] = score
        assert len(judged(wanted, [each[:2] for each in wanted]).faults) == faults
    where = torch.arange(11.0)[:, None] * 5 + torch.tensor([0.0, 0, 4, 4])
    scores = torch.linspace(0.9, 0.5, 11)
    scores[10] = scores[9] - 1e-4
    whole = [where, scores, torch.zeros(11, dtype=torch.long), torch.ones(11, 64, 64).bool()]
    report = judged([x[:10] for x in whole], [x[[*range(9), 10]] for x in whole])
    assert (report.faults, report.at_the_edge) == ([], 2)


def test_one_pixel_is_rounding(judged):
    """On a small mask a pixel is more than a hundredth; two are a difference."""
    wanted, got = found(), found()
    for parts in (wanted, got):
        parts[3][:] = False
        parts[3][:, 5:10, 5:10] = True
    got[3][0, 5, 5] = False
    assert judged(wanted, got).faults == []
    got[3][0, 5, 6] = False
    assert judged(wanted, got).largest["mask"] == pytest.approx(2 / 25)


def test_levels_and_a_file_that_cannot_run():
    graph = Graph(model("no_square"), "backbone")

    def run(image):
        levels = list(graph(image))
        levels[1] = levels[1] + 2e-4
        return levels

    assert compare(graph, run, [IMAGE]).faults == ["largest level difference 0.0002 > 0.0001"]
    short = compare(graph, lambda x: [y[..., :1] for y in graph(x)], [IMAGE])
    assert "a level is (1, 32, 16, 1) and not (1, 32, 16, 16)" in short.faults

    def fails(_):
        raise InputError("sizes do not agree\n at some place")

    expected = "an image of 64x64 cannot be run: sizes do not agree at some place"
    assert compare(graph, fails, [IMAGE]).faults == [expected]


# --- files --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no_square", "soft", "cascade", "dense"])
def test_any_size(tmp_path, kind):
    """Images of any size, also such that there are fewer proposals than where it was followed."""
    out, made = tmp_path / "model.onnx", model(kind)
    report = export(made, out, [*images(), images()[0][:, :3, :5].contiguous()], about=ABOUT)
    assert report.faults == []
    assert report.detections == report.matched > 20
    session = session_of(out)
    names = ["boxes", "scores", "classes", *["masks"] * (kind != "dense")]
    assert [each.name for each in session.get_outputs()] == names
    assert session.get_inputs()[0].shape == [3, "height", "width"]
    found = session.run(None, {"image": np.zeros((3, 33, 47), np.uint8)})
    assert len({len(each) for each in found}) == 1
    assert [each.shape[1:] for each in found[3:]] == [(33, 47)] * (kind != "dense")
    assert {node.domain for node in onnx.load(str(out)).graph.node} == {""}
    kept = json.loads((tmp_path / "model.onnx.parity.json").read_text())
    assert (kept["faults"], kept["limits"]["score"], len(kept["sizes"])) == ([], 1e-3, 4)
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.parity.json"}
    note = session.get_modelmeta().custom_metadata_map
    assert (note["producer"], note["part"]) == ("vitdet", "detector")
    assert json.loads(note["class_names"]) == ["dark", "light"]
    before = json.loads(note["preprocessing"])
    assert (before["channels"], before["resize"]) == ("RGB", [{"size": 64}])
    assert before["largest"] == (None if kind == "no_square" else [64, 64])


def test_a_window_that_does_not_divide(tmp_path):
    """Padding to windows, relative positions and embeddings follow the size of the image."""
    net = model("no_square")
    for block, window in zip(net.backbone.net.blocks, (3, 0), strict=True):
        block.window_size = window
    net.backbone.net.blocks[0].attn.rel_pos_h = nn.Parameter(torch.randn(5, 16))
    net.backbone.net.blocks[0].attn.rel_pos_w = nn.Parameter(torch.randn(5, 16))
    wide = [*images(), torch.cat(images()[:1] * 3, 2), torch.cat(images()[:1] * 2, 1)[:, :97]]
    report = export(net, tmp_path / "a.onnx", wide, part="backbone")
    assert report.faults == []
    assert len(set(report.sizes)) == 5
    assert report.largest["level"] < 1e-5
    given = {"image": np.zeros((3, 40, 64), np.uint8)}
    levels = session_of(tmp_path / "a.onnx").run(None, given)
    assert [each.shape[1] for each in levels] == [32] * 5


@pytest.mark.slow
def test_one_size_and_external_data(tmp_path, monkeypatch):
    """From some size on weights stand in a file beside, and belong to it under its name."""
    out, given = tmp_path / "a.onnx", [image[:, :48, :40] for image in images()[:2]]
    data = tmp_path / "a.onnx.data"
    options = {"size": (48, 40), "masks": "none", "opset": 18}
    monkeypatch.setattr(exporting, "EXTERNAL_FROM", 1000)
    assert export(model("no_square"), out, given, **options).faults == []
    entry = session_of(out).get_inputs()[0]
    assert (entry.shape, entry.type) == ([3, 48, 40], "tensor(uint8)")
    written = onnx.load(str(out), load_external_data=False)
    assert written.opset_import[0].version == 18
    assert data.stat().st_size > 100_000
    entries = [entry for tensor in written.graph.initializer for entry in tensor.external_data]
    assert {entry.value for entry in entries if entry.key == "location"} == {data.name}
    monkeypatch.undo()
    assert not export(model("mask"), out, images(), part="backbone").faults  # again, without
    assert not data.exists()
    session_of(out)


@pytest.mark.parametrize(
    ("options", "name", "text"),
    [
        ({}, "a.pt", r"--out .*a\.pt: the name must end in \.onnx"),
        ({}, "no/a.onnx", r"no folder .*no\. Make it first"),
        ({}, "b.onnx", r"b\.onnx: this is a folder"),
        ({"size": (0, 4)}, "a.onnx", "--size 0 4: HEIGHT and WIDTH are pixels, 1 to 64"),
        ({"score": 1.0}, "a.onnx", r"no object is found on the 3 images .* --images FOLDER"),
        ({"full": 1, "part": "backbone"}, "a.onnx", r"No space left on device"),
        ({"package": 1}, "a.onnx", r"onnx and onnxruntime is not installed\. Run `pip install onn"),
    ],
)
def test_what_stops_an_export(tmp_path, options, name, text, monkeypatch):
    """Nothing of a file is left."""

    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "b.onnx").mkdir()
    made = model("mask")
    made.roi_heads.box_predictor.test_score_thresh = options.pop("score", 0.05)
    if options.pop("full", 0):
        monkeypatch.setattr(exporting, "_finish", full)
    if options.pop("package", 0):
        monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises((InputError, OSError), match=text):
        export(made, tmp_path / name, images(), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["b.onnx"]


def test_a_file_that_onnxruntime_does_not_take(tmp_path):
    """As of some sizes of a Vision Longformer."""
    node = onnx.helper.make_node("Add", ["image"], ["x"])  # of one addend
    made = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    (tmp_path / "a.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(InputError, match="onnxruntime cannot take the file that torch wrote: "):
        exporting.load(tmp_path / "a.onnx")
