"""The benchmarks run at small size, their tables have the rows, and their comparisons can fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import attention
import backbone
import common
import detector
import gpu
import numpy as np
import peers
import pytest
import torch
import views

from vitdet.utils.run_lengths import decode

TINY = peers.MODELS["tiny"](64)
PACKAGES = {"segment-anything": "segment_anything", "transformers": "transformers"}


@pytest.fixture
def run(monkeypatch, tmp_path: Path, capsys) -> Callable[..., list[list[str]]]:
    """Run a benchmark in this process; return the cells of its table, as printed and written."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "EXACT_MALLOC", {})

    def call(module: ModuleType, *words: str) -> list[list[str]]:
        words = (*words, "--device", "cpu", "--repeat", "1", "--threads", "1", "--write")
        monkeypatch.setattr(sys, "argv", [str(module.__file__), *words])
        module.main()
        (written,) = tmp_path.glob("*.md")
        text = written.read_text()
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert "\n".join(lines) in capsys.readouterr().out
        assert f"Made by `python benchmarks/{Path(str(module.__file__)).name} " in text
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return call


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# --- common --------------------------------------------------------------------------------------


def test_contenders_run_in_turn_and_ratios_are_taken_round_by_round() -> None:
    order: list[str] = []
    now = iter(range(100))
    todo = {name: lambda name=name: order.append(name) for name in "ab"}
    times = common.in_turn(todo, 2, clock=lambda: float(next(now)))
    assert order == ["a", "b"] * 3
    assert times["a"].seconds == times["b"].seconds == (1.0, 1.0)
    slow, fast = common.Times((2.0, 8.0, 9.0)), common.Times((1.0, 2.0, 9.0))
    assert (slow.median, fast.median) == (8.0, 2.0)
    assert slow.ratio(fast) == 2.0
    assert slow.ratio_range(fast) == "1.00 to 4.00"
    assert fast.range(factor=1e3, digits=0) == "1000 to 9000"


@pytest.mark.parametrize("convolution", [False, True])
def test_the_matrix_product_is_one(convolution: bool) -> None:
    product = common.MatrixProduct(6, 4, 8, convolution=convolution)
    expected = product._x @ product._weight
    torch.testing.assert_close(product().t() if convolution else product(), expected)
    counted = common.count_flops(lambda: product._x @ product._weight)
    assert product.flops == counted == 2 * 6 * 4 * 8


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_is_what_a_tensor_takes() -> None:
    # in a process of its own: in this one malloc may hand out what an earlier test has freed
    code = f"""
import json, sys, torch
sys.path.insert(0, {str(Path(common.__file__).parent)!r})
import common
print(json.dumps(common.peak_memory(lambda: torch.ones(64 * common.MIB, dtype=torch.uint8))))
"""
    assert 60 * common.MIB < common.in_own_process("-c", code) < 80 * common.MIB


def test_a_process_of_its_own_answers_in_json() -> None:
    code = "import json, os; print('first'); print(json.dumps([1, os.environ['OF_THE_TEST']]))"
    assert common.in_own_process("-c", code, environment={"OF_THE_TEST": "a"}) == [1, "a"]


def test_growth_is_a_power_of_the_tokens(capsys) -> None:
    found = {64: (1.0, 10.0), 128: (16.0, 40.0)}
    lines = common.growth_table({"a": "A"}, (64, 128, 256), lambda _, side: found.get(side), "s, M")
    assert lines[0] == "|  | 64 px: s, M | 128 px: s, M | 256 px: s, M | power: s, M |"
    assert lines[2] == "| A | 1.00, 10 | 16.00, 40 | does not fit | 2.00, 1.00 |"
    assert capsys.readouterr().out == "\n".join(lines) + "\n"


# --- peers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_compute_what_ours_does(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"{name} is not installed")
    mine, theirs = peers.build(peers.OURS, TINY), peers.build(name, TINY)
    with torch.no_grad():
        x = pictures()
        assert peers.check(name, theirs.tokens(x), mine.tokens(x)) < 1e-5
        if name == "detectron2":  # other weights are noticed
            dict(theirs.net.named_parameters())["blocks.0.attn.rel_pos_h"].normal_()
            with pytest.raises(SystemExit, match=r"them: outputs differ by .* of the largest"):
                peers.check("them", theirs.tokens(x), mine.tokens(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_no_agreement(value: float) -> None:
    with pytest.raises(SystemExit, match="outputs differ by"):
        peers.check("them", torch.tensor([1.0, value]), torch.tensor([1.0, 2.0]))
    with pytest.raises(SystemExit, match=r"outputs differ: \(2,\) for \(1,\)"):
        peers.check("them", torch.ones(2), torch.ones(1))


# --- whole benchmarks ----------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_backbone(run, monkeypatch, backward: bool) -> None:
    monkeypatch.setattr(backbone, "measured", lambda *_, **__: {"peak": 1.5})
    words = ["--model", "tiny", "--size", "64", "--peers", "detectron2", "timm"]
    table = run(backbone, *words, *["--backward"] * backward)
    assert [line[0] for line in table[2:]] == [*backbone.PRODUCTS, "vitdet", "detectron2", "timm"]
    assert table[0][-2:] == ["peak MiB", "difference"]
    assert table[4][3] == "1.00"
    assert all(line[-2] == "2" for line in table[4:])
    assert all(float(line[-1]) < 1e-4 for line in table[5:])


def test_backbone_stops_where_gradients_differ() -> None:
    todo = {name: peers.build(name, TINY) for name in (peers.OURS, "detectron2")}
    assert backbone.compare(todo, pictures(), True)["detectron2"] < 1e-4
    # the same map of tokens, and half of its gradient
    half = peers.Peer(
        todo["detectron2"].net,
        lambda x: (y := todo["detectron2"].tokens(x)).detach() / 2 + y / 2,
    )
    with pytest.raises(SystemExit, match="detectron2, gradient of the images: outputs differ"):
        backbone.compare(todo | {"detectron2": half}, pictures(), True)


def test_flops_of_the_backbone_by_hand() -> None:
    C, blocks = TINY.embed_dim, 0.0
    for i in range(TINY.depth):
        whole = i in TINY.global_blocks
        windows, side = (1, 4) if whole else (4, 3)  # a map of 4 x 4 is four windows of 3 x 3
        L = side**2
        linear = windows * L * 4 * C**2 + 16 * 8 * C**2
        blocks += linear + windows * (2 * L * L * C + 2 * L * side * C)
    assert backbone.flops(TINY, 1, False) == 2 * (16 * 3 * 16**2 * C + blocks)
    assert backbone.flops(TINY, 2, False) == 2 * backbone.flops(TINY, 1, False)


@pytest.mark.parametrize("backward", [False, True])
def test_attention(run, backward: bool) -> None:
    words = ["--dtype", "bfloat16", "--sizes", "2x5x5", "1x8x4", *["--backward"] * backward]
    rows = run(attention, *words)[2:]
    for name in ("no bias", "eager", "blocks", "sdpa"):
        assert [row[0] for row in rows if row[1] == name] == ["2x5x5", "1x8x4"]
    assert all(float(row[6]) < 0.05 for row in rows if row[1] != "no bias")


def test_without_a_gpu_it_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device; --tiny runs the same steps on a CPU"):
        gpu.main()


@pytest.mark.slow
def test_detector(run, monkeypatch) -> None:
    monkeypatch.setattr(detector, "measured", lambda *_: [1.0])
    table = run(detector, "--tiny")
    assert [line[0] for line in table[2:]] == ["vitdet", "detectron2"]
    assert table[2][3] == "1.00"

    models = {name: detector.detector(name, True) for name in ("vitdet", "detectron2")}
    batch = detector.images(1, True)
    found = [detector.run(model, batch, "float32") for model in models.values()]
    assert len(found[0][0]) > 10  # there is something to compare
    assert "detections are the same" in detector.compare_detections(*found)
    with torch.no_grad():
        models["detectron2"].roi_heads.mask_head.predictor.weight.neg_()
    other = detector.run(models["detectron2"], batch, "float32")
    with pytest.raises(SystemExit, match=r"only \d+ of \d+ detections are the same"):
        detector.compare_detections(found[0], other)


@pytest.mark.slow
def test_training_step(run, monkeypatch) -> None:
    monkeypatch.setattr(detector, "measured", lambda *_: [1.0, 2.0])
    table = run(detector, "--tiny", "--train")
    assert [line[0] for line in table[2:]] == ["vitdet", "detectron2"]
    assert [line[-2:] for line in table[2:]] == [["1", "2"]] * 2

    models = {name: detector.detector(name, True) for name in ("vitdet", "detectron2")}
    batch = detector.training_images(1, True)
    assert "agree within" in detector.compare_losses(models, batch)
    with torch.no_grad():
        models["detectron2"].roi_heads.box_predictor.bbox_pred.weight.mul_(1.5)
    with pytest.raises(SystemExit, match=r"loss_box_reg: .* for "):
        detector.compare_losses(models, batch)


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
