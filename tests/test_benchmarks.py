"""The benchmarks run at small size, their tables have the rows, and their comparisons can fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import common
import numpy as np
import peers
import pytest
import torch
import views

from vitdet.utils.run_lengths import decode

TINY = peers.MODELS["tiny"](64)
PACKAGES = {"segment-anything": "segment_anything", "transformers": "transformers"}


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[list[str]]]:
    """Run a benchmark in this process; return the cells of its table, as printed and written."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "EXACT_MALLOC", {})

    def call(module: ModuleType, *words: str) -> list[list[str]]:
        words = (*words, "--repeat", "1", "--threads", str(torch.get_num_threads()), "--write")
        monkeypatch.setattr(sys, "argv", [str(module.__file__), *words])
        # the memory of a process of its own is asked for in this one
        monkeypatch.setattr(module, "measured", lambda *_, **__: {"peak": 1.5, "seconds": 2.0})
        module.main()
        (written,) = tmp_path.glob("*.md")
        text = written.read_text()
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert "\n".join(lines) in capsys.readouterr().out
        assert f"Made by `python benchmarks/{Path(str(module.__file__)).name} " in text
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return call


def needed(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"{name} is not installed")


# --- common --------------------------------------------------------------------------------------


def test_contenders_run_in_turn_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    now = iter(range(100))
    todo = {name: lambda name=name: order.append(name) for name in "ab"}
    times = common.in_turn(todo, 2, clock=lambda: float(next(now)))
    assert order == ["a", "b"] * 3
    assert times["a"].seconds == times["b"].seconds == (1.0, 1.0)


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = common.Times((2.0, 8.0, 9.0)), common.Times((1.0, 2.0, 9.0))
    assert (slow.median, fast.median) == (8.0, 2.0)
    assert slow.ratio(fast) == 2.0
    assert slow.ratio_range(fast) == "1.00 to 4.00"
    assert fast.range(factor=1e3, digits=0) == "1000 to 9000"


@pytest.mark.parametrize("convolution", [False, True])
def test_the_matrix_product_is_one(convolution: bool) -> None:
    product = common.MatrixProduct(6, 4, 8, convolution=convolution)
    expected = product._x @ product._weight
    got = product().t() if convolution else product()
    torch.testing.assert_close(got, expected)
    assert (
        product.flops == common.count_flops(lambda: product._x @ product._weight) == 2 * 6 * 4 * 8
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_is_what_a_tensor_takes() -> None:
    peak = common.peak_memory(lambda: torch.ones(64 * common.MIB, dtype=torch.uint8))
    assert 60 * common.MIB < peak < 80 * common.MIB


def test_a_process_of_its_own_answers_in_json() -> None:
    code = "import json, os; print('first'); print(json.dumps([1, os.environ['OF_THE_TEST']]))"
    assert common.in_own_process("-c", code, environment={"OF_THE_TEST": "a"}) == [1, "a"]


def test_a_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    table = common.Table("what", "kind", "s", left=2)
    table.add("a", "b", 1.5)
    assert table.lines == ["| what | kind | s |", "| --- | --- | ---: |", "| a | b | 1.5 |"]
    assert capsys.readouterr().out == "\n".join(table.lines) + "\n"


# --- peers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_compute_what_ours_does(name: str) -> None:
    needed(name)
    mine, theirs = peers.build(peers.OURS, TINY), peers.build(name, TINY)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        assert peers.check(name, theirs.tokens(images), mine.tokens(images)) < 1e-5


def test_other_weights_are_noticed() -> None:
    mine, theirs = peers.build(peers.OURS, TINY), peers.build("detectron2", TINY)
    name, table = next((n, p) for n, p in theirs.net.named_parameters() if "rel_pos_h" in n)
    assert name == "blocks.0.attn.rel_pos_h"
    with torch.no_grad():
        table.normal_()
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with pytest.raises(SystemExit, match=r"them: outputs differ by .* of the largest entry"):
            peers.check("them", theirs.tokens(images), mine.tokens(images))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_no_agreement(value: float) -> None:
    with pytest.raises(SystemExit, match="outputs differ by"):
        peers.check("them", torch.tensor([1.0, value]), torch.tensor([1.0, 2.0]))
    with pytest.raises(SystemExit, match=r"outputs differ: \(2,\) for \(1,\)"):
        peers.check("them", torch.ones(2), torch.ones(1))


# --- whole benchmarks ----------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_backbone(run: Callable[..., list[list[str]]], backward: bool) -> None:
    import backbone

    words = ["--model", "tiny", "--size", "64", "--peers", "detectron2", "timm", "--device", "cpu"]
    table = run(backbone, *words, *["--backward"] * backward)
    assert [line[0] for line in table[2:]] == [*backbone.PRODUCTS, "vitdet", "detectron2", "timm"]
    assert table[0][-2:] == ["peak MiB", "difference"]
    assert table[4][3] == "1.00"
    assert all(line[-2] == "2" for line in table[4:])
    assert all(float(line[-1]) < 1e-4 for line in table[5:])


def test_backbone_stops_where_gradients_differ() -> None:
    import backbone

    todo = {name: peers.build(name, TINY) for name in (peers.OURS, "detectron2")}
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert backbone.compare(todo, images, True)["detectron2"] < 1e-4
    # the same map of tokens, and half of its gradient
    half = peers.Peer(
        todo["detectron2"].net,
        lambda x: (y := todo["detectron2"].tokens(x)).detach() / 2 + y / 2,
    )
    with pytest.raises(SystemExit, match="detectron2, gradient of the images: outputs differ"):
        backbone.compare(todo | {"detectron2": half}, images, True)


def test_flops_of_the_backbone_by_hand() -> None:
    import backbone

    C, blocks = TINY.embed_dim, 0.0
    for i in range(TINY.depth):
        whole = i in TINY.global_blocks
        windows, side = (1, 4) if whole else (4, 3)  # a map of 4 x 4 is four windows of 3 x 3
        L = side**2
        linear = windows * L * 4 * C**2 + 16 * 8 * C**2
        attention = windows * (2 * L * L * C + 2 * L * side * C)
        blocks += linear + attention
    assert backbone.flops(TINY, 1, False) == 2 * (16 * 3 * 16**2 * C + blocks)
    assert backbone.flops(TINY, 2, False) == 2 * backbone.flops(TINY, 1, False)


def test_growth(run: Callable[..., list[list[str]]]) -> None:
    import backbone

    words = ["--growth", "--model", "tiny", "--sides", "64", "128", "--peers", "detectron2"]
    table = run(backbone, *words, "--device", "cpu")
    assert [line[0] for line in table[2:]] == ["vitdet", "detectron2"]
    assert table[2][1:] == ["2.00, 2", "2.00, 2", "0.00, 0.00"]


@pytest.mark.slow
def test_detector(run: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    import detector

    monkeypatch.setattr(detector, "rows", _with_peaks(detector.rows, 1.0))
    table = run(detector, "--tiny", "--device", "cpu")
    assert [line[0] for line in table[2:]] == ["vitdet", "detectron2"]
    assert table[2][3] == "1.00"

    models = {name: detector.detector(name, True) for name in ("vitdet", "detectron2")}
    batch = detector.images(1, True)
    found = {name: detector.run(model, batch, "float32") for name, model in models.items()}
    assert len(found["vitdet"][0]) > 10  # there is something to compare
    assert "detections are the same" in detector.compare(*found.values())
    with torch.no_grad():
        models["detectron2"].roi_heads.mask_head.predictor.weight.neg_()
    other = detector.run(models["detectron2"], batch, "float32")
    with pytest.raises(SystemExit, match=r"only \d+ of \d+ detections are the same"):
        detector.compare(found["vitdet"], other)


@pytest.mark.slow
def test_train_step(run: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    import train_step

    monkeypatch.setattr(train_step, "rows", _with_peaks(train_step.rows, [1.0, 2.0]))
    table = run(train_step, "--tiny", "--device", "cpu")
    assert [line[0] for line in table[2:]] == ["vitdet", "detectron2"]
    assert [line[-2:] for line in table[2:]] == [["1", "2"]] * 2

    models = {name: train_step.detector(name, True) for name in ("vitdet", "detectron2")}
    batch = train_step.training_images(1, True)
    assert "agree within" in train_step.compare(models, batch)
    with torch.no_grad():
        models["detectron2"].roi_heads.box_predictor.bbox_pred.weight.mul_(1.5)
    with pytest.raises(SystemExit, match=r"loss_box_reg: .* for "):
        train_step.compare(models, batch)


def _with_peaks(rows: Callable[..., list[str]], peak: object) -> Callable[..., list[str]]:
    return lambda times, peaks, batch: rows(times, dict.fromkeys(peaks, peak), batch)


@pytest.mark.slow
def test_memory_is_asked_of_a_process_of_its_own() -> None:
    import backbone

    words = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--threads", "1"]
    sys_argv, sys.argv = sys.argv, ["backbone.py", *words, "--repeat", "1"]
    try:
        args = backbone.parse()
    finally:
        sys.argv = sys_argv
    found = backbone.measured("vitdet", args, 64, exact=False)
    assert set(found) == {"peak", "seconds"}
    assert 0 <= found["peak"] < 500


# --- views ---------------------------------------------------------------------------------------


def test_a_mosaic_has_every_image_and_object_in_its_place() -> None:
    images = [np.full((4, 4, 3), number, np.uint8) for number in range(64)]
    polygon = [[1, 1, 3, 1, 3, 4, 1, 4]]  # 2 x 3 pixels
    one = {"bbox": [1, 1, 2, 3], "segmentation": polygon, "category_id": 5, "iscrowd": 0}
    annotations = [[one] if number in (0, 19) else [] for number in range(64)]
    picture, entry, moved = views.mosaic(images, annotations, 7)
    assert entry == {"id": 7, "height": 32, "width": 32}
    assert (picture[8:12, 12:16] == 19).all()  # the fourth of the third row
    assert [each["bbox"] for each in moved] == [[1, 1, 2, 3], [13, 9, 2, 3]]
    assert {each["image_id"] for each in moved} == {7}
    mask = np.zeros((32, 32), bool)
    mask[9:12, 13:15] = True
    assert np.array_equal(decode(moved[1]["segmentation"]), mask)
