"""vitdet computes what the published implementations computed, forward and backward."""

from __future__ import annotations

import pytest

from .build import MODES, Mode
from .cases import ABSENT, NOT_BUILT, discover, folder, read_info
from .families import compare_case, modes

ROOT = folder()
pytestmark = pytest.mark.skipif(ROOT is None, reason=ABSENT)
CASES = [
    (name, mode)
    for name in discover(ROOT)
    if ROOT is not None and not name.startswith("lr_decay/")
    for mode in modes(read_info(ROOT, name), MODES)
]


def test_there_are_cases() -> None:
    assert CASES, f"no case under {ROOT} that is built"


@pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{name}-{mode}" for name, mode in CASES])
def test_case(name: str, mode: Mode) -> None:
    assert ROOT is not None
    if name in NOT_BUILT:
        pytest.skip(NOT_BUILT[name])
    comparison = compare_case(ROOT, name, mode)
    if comparison.failures:
        pytest.fail(comparison.text(), pytrace=False)
