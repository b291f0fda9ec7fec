"""vitdet computes what the published implementations computed, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .build import MODES, Mode
from .cases import ABSENT, discover, folder, is_built, not_built
from .compare import Comparison
from .families import compare_case

ROOT = folder()
NAMES = discover(ROOT)
pytestmark = pytest.mark.skipif(ROOT is None, reason=ABSENT)


def test_there_are_cases() -> None:
    assert any(is_built(name) for name in NAMES), f"no case under {ROOT} that is built"


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "name", [name for name in NAMES if is_built(name) and not name.startswith("lr_decay/")]
)
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
