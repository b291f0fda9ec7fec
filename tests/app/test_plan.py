"""`vitdet plan`: its numbers, the way that it advises, statuses and errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vitdet import costs
from vitdet.app import cli, plan
from vitdet.config import build_model, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHAPES = CONFIGS / "mini/mask_rcnn_vitdet_shapes.py"
FIXED = ["--device", "cpu", "--rate", "100"]  # nothing is measured
MIB = 2**20


def planned(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert cli.main(["plan", *words, *FIXED]) == status
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


def test_numbers_are_those_of_the_costs(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, str(SHAPES), "train.precision=fp32", "--memory", "1")
    cfg = load_config(SHAPES)
    parameters, multiply_adds = costs.count(cfg.model)
    assert f"parameters   {parameters / 1e6:.2f} M" in text
    assert f"inference    {multiply_adds / 1e12:.3f} T multiply-adds an image of 128 x 128" in text
    assert "float32: 100 GFLOP/s, 1.00 GiB free" in text
    assert "batch        4 images a step, 4 a process" in text
    one, two = (costs.training_memory(cfg.model, batch=n) for n in (1, 2))
    state = 3 * 4 * parameters
    seconds = 4 * one.flops / 50e9
    expected = [f"{(one.peak + state) / 2**30:.3f}", f"{(two.peak - one.peak) / 2**30:.3f}"]
    assert row(text, "none") == [*expected, "4", "1", f"{seconds:.2f}"]
    assert text.splitlines()[-1] == "Fits: 4 of 4 images at once."


def test_the_memory_at_hand_decides(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less and less memory: all at once, blocks computed again, parts, nothing."""
    none, second, every = found = plan.ways(load_config(SHAPES), None, "cpu")
    monkeypatch.setattr(plan, "ways", lambda *_: found)  # the same for every amount of memory
    assert second.memory(4) < none.memory(4)
    assert (none.setting, every.name) == ("", "all")
    words = [str(SHAPES), "train.precision=fp32", "--memory"]

    between = (second.memory(4) + none.memory(4)) / 2
    text = planned(capsys, *words, str(between / 2**30))
    advice = 'Fits: 4 of 4 images at once with "model.backbone.net.checkpoint_blocks=[1, 3]".'
    assert text.splitlines()[-1] == advice
    assert row(text, "none")[2:4] == ["2", "2"]

    least = min(way.memory(1) for way in (none, second, every))
    text = planned(capsys, *words, str((least + MIB / 4) / 2**30))
    assert "Fits: 1 of 4 images at once" in text
    assert text.endswith("; 4 times as many processes, or 4 parts one after the other, for all.\n")

    text = planned(capsys, *words, str(least / 2 / 2**30), status=1)
    assert "Not even one image fits into 0.0" in text
    assert row(text, "none")[2:4] == ["none", "-"]


def test_the_advised_override_is_one() -> None:
    blocks = "model.backbone.net.checkpoint_blocks=[0, 1, 2, 3]"
    changed = load_config(SHAPES, [blocks])
    found = costs.training_memory(changed.model, batch=1)
    plain = load_config(SHAPES).model
    assert found.kept < costs.training_memory(plain, batch=1).kept
    assert found == costs.training_memory(plain, batch=1, checkpoint_blocks=range(4))


def test_processes_share_the_batch_and_overrides_count(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dataloader.train.total_batch_size=8", "train.ema_decay=0.99", "train.precision=bf16"]
    text = planned(capsys, str(SHAPES), *words, "--memory", "1", "--processes", "4")
    assert "batch        8 images a step, 2 a process" in text
    assert "bfloat16" in text
    assert "0.03 GiB with the optimizer's averages" in text  # 1.71 M numbers, four times
    assert re.search(r"^Fits: 2 of 2 images at once\.$", text, re.MULTILINE)


def test_a_backbone_that_recomputes_nothing_has_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    swin = load_config(CONFIGS / "COCO/cascade_mask_rcnn_swin_b_in21k_50ep.py").model
    assert costs.checkpointed(build_model(swin, device="meta")) == ""
    monkeypatch.setattr(costs, "checkpointed", lambda _: "")
    (way,) = plan.ways(load_config(SHAPES), None, "cpu")
    assert (way.name, way.setting) == ("none", "")


def test_least_batch_divides() -> None:
    way = plan.Way("none", "", fixed=10, image=10, flops=1.0)
    assert [way.largest(free, 6) for free in (19, 20, 45, 65, 69, 70, 700)] == [0, 1, 3, 3, 3, 6, 6]


def test_the_rate_is_measured_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0])  # the first is the warm-up
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setitem(plan._SIZES, "cpu", (10, 20, 30))
    assert plan.matrix_rate("cpu", None) == 2 * 10 * 20 * 30 / 1.0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["absent.py"], "--config-file: expected a file, got absent.py"),
        ([str(SHAPES), "modle=1"], "override 'modle': expected a key of the recipe"),
        ([str(SHAPES), "--processes", "3"], "a number that divides dataloader.train.total_batch"),
        ([str(SHAPES), "--processes", "0"], "--processes: expected"),
        ([str(SHAPES), "--memory", "-1"], "--memory: expected more than 0, got -1.0"),
        (
            [str(CONFIGS / "backbones/streampetr_eva02_l_800x320.py")],
            "expected a key 'dataloader'",
        ),
    ],
)
def test_errors_are_one_line(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *words]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert text in found.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(SHAPES), "--device", "cuda"]) == 2
    assert "--device: expected a GPU, got none here. Use --device cpu." in capsys.readouterr().err
