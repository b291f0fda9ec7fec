"""The run for a GPU, on a CPU in small: every attention kernel checked, timed and told."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_attention_part_runs_on_a_cpu():
    words = ["benchmarks/gpu.py", "--tiny", "--only", "attention.py"]
    done = subprocess.run(
        [sys.executable, *words], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:1] == "|"]
    kernels = [row for row in rows if row[0] in ("2x5x5", "1x8x4")]
    for name in ("no bias", "eager", "blocks", "sdpa"):
        assert len([row for row in kernels if row[1] == name]) == 4  # sizes, with and without grad
    assert all(float(row[6]) < 0.05 for row in kernels if row[1] != "no bias")
    growth = [row for row in rows if row[0] in ("vitdet", "L x L bias")]
    assert len(growth) == 2
    assert all(math.isfinite(float(row[1].split(",")[0])) for row in growth)


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    import gpu

    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device; --tiny runs the same steps on a CPU"):
        gpu.main()
