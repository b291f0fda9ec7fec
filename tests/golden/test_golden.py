"""vitdet computes what the published implementations computed, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .build import MODES, Mode
from .cases import ABSENT, discover, folder, is_built, not_built, read_table
from .compare import Comparison
from .families import compare_case, modes

ROOT = folder()
NAMES = discover(ROOT)
pytestmark = pytest.mark.skipif(ROOT is None, reason=ABSENT)
CASES = [
    (name, mode)
    for name in NAMES
    if ROOT is not None and is_built(name) and not name.startswith("lr_decay/")
    for mode in modes(read_table(ROOT, name), MODES)
]


def test_there_are_cases() -> None:
    assert CASES, f"no case under {ROOT} that is built"


@pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{name}-{mode}" for name, mode in CASES])
def test_case(name: str, mode: Mode, record: Callable[[Comparison], None]) -> None:
    assert ROOT is not None
    comparison = compare_case(ROOT, name, mode)
    record(comparison)
    if comparison.failures:
        pytest.fail(comparison.text(), pytrace=False)


@pytest.mark.parametrize("name", [name for name in NAMES if not is_built(name)])
def test_not_built_yet(name: str) -> None:
    """Skip with the listed reason; a case that is in no list fails."""
    pytest.skip(not_built(name) or "")
