"""The benchmarks run at small size, their tables have the rows, and their comparisons can fail."""

import sys
from pathlib import Path

import attention
import backbone
import common
import detector
import peers
import pytest
import torch

TINY = peers.MODELS["tiny"](64)
PACKAGES = {"segment-anything": "segment_anything", "transformers": "transformers"}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a benchmark in this process; return the cells of its table, as printed and written."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "EXACT_MALLOC", {})

    def call(module, *words):
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


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_compute_what_ours_does(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"{name} is not installed")
    mine, theirs = peers.build(peers.OURS, TINY), peers.build(name, TINY)
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert peers.check(name, theirs.tokens(x), mine.tokens(x)) < 1e-5
        if name == "detectron2":  # other weights are noticed, and no number
            dict(theirs.net.named_parameters())["blocks.0.attn.rel_pos_h"].normal_()
            for tokens in (theirs.tokens(x), mine.tokens(x) * torch.nan):
                with pytest.raises(SystemExit, match=r"them: outputs differ by .* of the largest"):
                    peers.check("them", tokens, mine.tokens(x))


def test_backbone(run, monkeypatch):
    monkeypatch.setattr(backbone, "measured", lambda *_: 1.5)
    words = ["--model", "tiny", "--size", "64", "--peers", "detectron2", "timm"]
    table = run(backbone, *words, "--backward")
    assert [line[0] for line in table[2:]] == [*backbone.PRODUCTS, "vitdet", "detectron2", "timm"]
    assert table[0][-2:] == ["peak MiB", "difference"]
    assert table[4][3] == "1.00"
    assert all(line[-2] == "2" for line in table[4:])
    assert all(float(line[-1]) < 1e-4 for line in table[5:])


def test_attention(run):
    rows = run(attention, "--dtype", "bfloat16", "--sizes", "2x5x5", "1x8x4", "--backward")[2:]
    for name in ("no bias", "eager", "blocks", "sdpa"):
        assert [row[0] for row in rows if row[1] == name] == ["2x5x5", "1x8x4"]
    assert all(float(row[6]) < 0.05 for row in rows if row[1] != "no bias")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--train"]])
def test_detector(run, monkeypatch, mode):
    monkeypatch.setattr(detector, "measured", lambda *_: [1.0])
    table = run(detector, "--tiny", *mode)
    assert [line[0] for line in table[2:]] == ["vitdet", "detectron2"]
    assert table[2][3] == "1.00"

    models = {name: detector.detector(name, True) for name in ("vitdet", "detectron2")}
    theirs = models["detectron2"].roi_heads
    if mode:
        batch = detector.training_images(1, True)
        assert "agree within" in detector.compare_losses(models, batch)
        with torch.no_grad():
            theirs.box_predictor.bbox_pred.weight.mul_(1.5)
        with pytest.raises(SystemExit, match=r"loss_box_reg: .* for "):
            detector.compare_losses(models, batch)
        return
    batch = detector.images(1, True)
    found = [detector.run(model, batch, "float32") for model in models.values()]
    assert len(found[0][0]) > 10  # there is something to compare
    assert "detections are the same" in detector.compare_detections(*found)
    with torch.no_grad():
        theirs.mask_head.predictor.weight.neg_()
    other = detector.run(models["detectron2"], batch, "float32")
    with pytest.raises(SystemExit, match=r"only \d+ of \d+ detections are the same"):
        detector.compare_detections(found[0], other)
