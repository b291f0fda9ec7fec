"""Thousands of damaged files: one clear line each, no code run, nothing left behind.

`VITDET_FUZZ_SEEDS=5000-6000` gives the nightly test another range.
"""

from __future__ import annotations

import os
import resource
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import converter
import vitdet.config
from vitdet import checkpoint
from vitdet.app import cli
from vitdet.backbones.vit import ViT
from vitdet.convert import TARGETS

from .damage import MAKERS, SIZES, damaged

RECIPE = f"""
from detectron2.config import LazyCall as L
from vitdet.backbones.vit import ViT

model = L(ViT)(**{SIZES!r})
"""
_MEMORY = 600_000_000  # bytes; the largest claims are of terabytes
Run = Callable[[range], tuple[Counter[tuple[str, int]], set[str]]]


def _words(seed: int, path: Path, recipe: Path, output: Path) -> list[str]:
    """Return a command line; the seed chooses its options."""
    words = ["--source-model", str(path), "--output-model", str(output)]
    words += ["--config-file", str(recipe)] if seed % 3 else []
    if seed % 3 == 0 or seed % 7 == 0:
        words += ["--target-format", list(TARGETS)[seed % len(TARGETS)]]
    options = ("--allow-inexact", "--backbone-only")
    words += [option for bit, option in enumerate(options) if seed >> bit + 3 & 1]
    return words + ["--resize-patch-embed"] * (seed % 3 != 0 and seed % 2)


def _answer(
    command: Callable[[], int], path: Path, capsys: pytest.CaptureFixture[str], *, one: bool
) -> tuple[int, str]:
    """Return the status and the one line of a command."""
    status, error = command(), capsys.readouterr().err
    assert status in (0, 1, 2), (path.name, status)
    assert error.count("\n") == int(status == 2 or (status == 1 and one)), (path.name, error)
    assert len(error) < 8000, path.name
    assert error[:-1].isprintable(), path.name
    assert not error or error.startswith("error: "), (path.name, error)
    return status, error.replace(str(path), "FILE")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that converts, and inspects some of, the files of a range of seeds."""
    recipe, out = tmp_path / "recipe.py", tmp_path / "out"
    recipe.write_text(RECIPE)
    out.mkdir()
    cfg = vitdet.config.load_config(recipe)
    with torch.device("meta"):
        model = ViT(**SIZES)  # once and not for every file
    monkeypatch.setattr(vitdet.config, "load_config", lambda *_, **__: cfg)
    monkeypatch.setattr(vitdet.config, "build_model", lambda *_, **__: model)

    def one(seed: int) -> tuple[str, int, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse and quantized tensors are made with warnings
            path, kind, ran = damaged(seed, tmp_path)
        output = out / ("x.safetensors" if seed % 5 == 0 else "x.pth")
        words = _words(seed, path, recipe, output)
        status, line = _answer(lambda: converter.main(words), path, capsys, one=True)
        assert [each.name for each in out.iterdir()] == [output.name] * (status == 0)
        if status == 0:
            content = checkpoint.read(output)
            weights: Any = content.get("model", content)
            assert all(isinstance(value, torch.Tensor) for value in weights.values())
            output.unlink()
        if seed % 4 == 0:
            words = ["inspect", str(path), "--no-recipes"]
            _answer(lambda: cli.main(words), path, capsys, one=False)
        assert not ran.exists(), path.name
        path.unlink()
        return kind, status, line

    def every(seeds: range) -> tuple[Counter[tuple[str, int]], set[str]]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answers = [one(seed) for seed in seeds]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown * 1024 < _MEMORY, f"{grown} KiB"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.py"]
        return Counter((kind, status) for kind, status, _ in answers), {a[2] for a in answers}

    return every


def test_some_damaged_files(run: Run) -> None:
    statuses, lines = run(range(150))
    assert {kind for kind, _ in statuses} == {maker.__name__ for maker in MAKERS}
    # some damage does no harm, and most does
    assert 3 < sum(n for (_, status), n in statuses.items() if status == 0) < 75
    refused = [line for line in lines if "got the class" in line]
    assert refused
    assert all("--trust" in line or "No flag" in line or "torch.jit" in line for line in refused)


@pytest.mark.slow
def test_a_thousand_damaged_files(run: Run) -> None:
    assert run(range(150, 1000))[0].total() == 850


@pytest.mark.nightly
def test_ten_thousand_damaged_files(run: Run) -> None:
    first, _, last = os.environ.get("VITDET_FUZZ_SEEDS", "1000-11000").partition("-")
    run(range(int(first), int(last)))


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for seed in range(60):
        first, second = (damaged(seed, tmp_path / name)[0] for name in ("a", "b"))
        assert first.name == second.name
        # code names the folder, torch's old format holds addresses, and the order of safetensors'
        # metadata is random
        if first.suffix == ".pt":
            assert "_code" in first.name or first.read_bytes() == second.read_bytes()
