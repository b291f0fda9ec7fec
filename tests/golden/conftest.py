"""What golden tests share; `tests/conftest.py` prints how far from the originals they are."""

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

    def note(comparison: Comparison) -> None:
        largest = {kind: comparison.largest(pattern) for kind, pattern in _KINDS.items()}
        request.node.user_properties.append(("golden", [comparison.case.split("/")[0], largest]))

    return note
