"""What the benchmarks share: timing in turn, memory, FLOPs, tables and result files.

    from common import Table, in_turn, write

Everything that is compared runs in one process, one after the other in every round, so that drift
of the machine hits all alike; a ratio is the median of the rounds' ratios. Memory is measured in a
process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = Path(__file__).resolve().parent / "results"
# glibc: a tensor of some size is a mapping of its own, which goes back as soon as it is freed.
EXACT_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
}


# --- time ----------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Seconds of one contender, a number a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the rounds."""
        return statistics.median(self.seconds)

    def range(self, factor: float = 1.0, digits: int = 2) -> str:
        """Return the least and the most, in seconds times `factor`, as "0.9 to 1.1"."""
        low, high = (f"{factor * value:.{digits}f}" for value in _ends(self.seconds))
        return f"{low} to {high}"

    def ratio(self, other: Times) -> float:
        """Return how many times this takes as long as `other`: the median over the rounds."""
        return statistics.median(self._ratios(other))

    def ratio_range(self, other: Times) -> str:
        """Return the least and the largest ratio of a round."""
        low, high = _ends(self._ratios(other))
        return f"{low:.2f} to {high:.2f}"

    def _ratios(self, other: Times) -> list[float]:
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def in_turn(
    todo: Mapping[str, Callable[[], object]],
    repeat: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> dict[str, Times]:
    """Run all contenders one after the other, `repeat` rounds of it after `warm_up` unmeasured.

    Args:
        todo: {name: what to run}; work on CUDA is waited for.
        repeat: measured rounds.
        clock: `time.process_time` where other programs disturb the machine.
        warm_up: rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for number in range(-warm_up, repeat):
        for name, run in todo.items():
            started = clock()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(clock() - started)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


class MatrixProduct:
    """A matrix product whose rate is that of the machine: time it among the contenders.

    Args:
        rows, inner, columns: its size; on a GPU at least 8192 each, which fills it.
        device: "cpu" or "cuda".
        dtype: of its factors.
        convolution: whether it is written as a 1 x 1 convolution, which another library computes on
            a CPU, on some faster.
    """

    def __init__(
        self,
        rows: int,
        inner: int,
        columns: int,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        convolution: bool = False,
    ) -> None:
        size = (rows, inner, columns)
        rows, inner, columns = size if device == "cpu" else (max(8192, each) for each in size)
        self.flops = 2.0 * rows * inner * columns
        self._x = torch.randn(rows, inner, device=device, dtype=dtype)
        self._weight = torch.randn(inner, columns, device=device, dtype=dtype)
        self._convolution = convolution

    def __call__(self) -> torch.Tensor:
        """Return the product, for a convolution transposed."""
        if not self._convolution:
            return torch.mm(self._x, self._weight)
        pixels = self._x.t()[None, :, None]  # (1, inner, 1, rows), channels last
        return F.conv2d(pixels, self._weight.t()[:, :, None, None])[0, :, 0]


def count_flops(run: Callable[[], object]) -> float:
    """Return the floating point operations (two a multiply-add) of matrix products in `run`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


# --- memory --------------------------------------------------------------------------------------


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int:
    """Return by how many bytes memory grows during `run`, at its most, above what is held now."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = process_memory("VmRSS")
    run()
    return process_memory("VmHWM") - before


def process_memory(key: str, file: str = "/proc/self/status") -> int:
    """Return a size in bytes: VmRSS of this process now, VmHWM at most; MemAvailable of meminfo."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {key} in {file}: memory is measured on Linux only")


def free_memory(device: str) -> int:
    """Return the bytes that programs can still have on a device."""
    on_cpu = device == "cpu"
    return (
        process_memory("MemAvailable", "/proc/meminfo") if on_cpu else torch.cuda.mem_get_info()[0]
    )


def in_own_process(*words: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run a command of Python in a fresh process; return the JSON in the last line it prints."""
    variables = os.environ | dict(environment or {})
    done = subprocess.run(
        [sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True, env=variables
    )
    return json.loads(done.stdout.splitlines()[-1])


# --- results -------------------------------------------------------------------------------------


class Table:
    """A Markdown table that prints every line as soon as it is known."""

    def __init__(self, *names: str, left: int = 1) -> None:
        self.lines: list[str] = []
        self.add(*names)
        self.add(*(["---"] * left + ["---:"] * (len(names) - left)))

    def add(self, *cells: object) -> None:
        """Add a line and print it."""
        self.lines.append(f"| {' | '.join(map(str, cells))} |")
        print(self.lines[-1], flush=True)


def parser(doc: str | None, *, repeat: int = 5, threads: int = 2) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--repeat", type=int, default=repeat, help="rounds")
    made.add_argument("--threads", type=int, default=threads, help="of torch on the CPU")
    made.add_argument("--write", action="store_true", help="write benchmarks/results/")
    return made


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.M)
    return names[0].strip() if names else platform.processor() or platform.machine()


def write(what: str, about: str, lines: Sequence[str], *, device: str = "cpu") -> Path:
    """Write a table with its circumstances to results/<what>_<hardware>_<date>.md.

    Args:
        what: first part of the file's name.
        about: what was measured, one or more sentences.
        lines: of the table, and notes.
        device: "cpu", "cuda", or another word that then stands for the hardware.
    """
    threads = torch.get_num_threads()
    names = {"cpu": (f"cpu{threads}", f"{threads} thread(s) of {processor()}")}
    if device == "cuda":
        name = torch.cuda.get_device_name()
        names["cuda"] = re.sub(r"\W+", "_", name.lower()), f"{name}, CUDA {torch.version.cuda}"
    slug, hardware = names.get(device, (device, device))
    today = datetime.date.today().isoformat()
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    head = f"{about}\n{hardware}, torch {torch.__version__}, {today}.\nMade by `{command}`.\n\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{what}_{slug}_{today}.md"
    path.write_text(head + "\n".join(lines) + "\n")
    print(path)
    return path
