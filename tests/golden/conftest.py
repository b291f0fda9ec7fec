"""Prints, after a golden run, how far from the published implementations each family is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from .compare import Comparison

_KINDS = {
    "outputs": r"(?!extra/|stats/|grad_|loss)",
    "intermediate": r"extra/(?!rpn\.|detections|box\.(decoded|final|stage))",
    "grad_input": "grad_input",
    "grad_norm (relative)": "grad_norm/",
}
_LARGEST = pytest.StashKey[dict[str, dict[str, float]]]()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Run on one thread, as the published code did: sums then have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Comparison], None]:
    """Return a function that notes the differences of a comparison for the summary."""
    families = request.config.stash.setdefault(_LARGEST, {})

    def note(comparison: Comparison) -> None:
        family = families.setdefault(comparison.case.split("/")[0], dict.fromkeys(_KINDS, 0.0))
        for kind, pattern in _KINDS.items():
            family[kind] = max(family[kind], comparison.largest(pattern))

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the largest difference of every family."""
    families = config.stash.get(_LARGEST, {})
    if families:
        terminalreporter.section("golden: largest differences")
    for family, kinds in sorted(families.items()):
        values = ", ".join(f"{kind} {value:.1e}" for kind, value in kinds.items())
        terminalreporter.line(f"{family}: {values}")
