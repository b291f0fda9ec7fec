"""vitdet computes what the published implementations computed, forward and backward."""

from __future__ import annotations

import pytest

from .build import MODES, Mode
from .cases import ABSENT, NOT_BUILT, discover, folder, read_info
from .families import compare_case, modes

ROOT = folder()
pytestmark = pytest.mark.skipif(ROOT is None, reason=ABSENT)
CASES = []
for _name in discover(ROOT):
    if ROOT is not None and not _name.startswith("lr_decay/"):
        _info = read_info(ROOT, _name)
        _detector = _info.get("model") == "GeneralizedRCNN"  # one mode is enough for `make quick`
        for _mode in modes(_info, MODES):
            _marks = [pytest.mark.slow] if _detector and str(_mode) != "eager" else []
            CASES.append(pytest.param(_name, _mode, id=f"{_name}-{_mode}", marks=_marks))


def test_there_are_cases() -> None:
    assert CASES, f"no case under {ROOT} that is built"


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_case(name: str, mode: Mode) -> None:
    assert ROOT is not None
    if name in NOT_BUILT:
        pytest.skip(NOT_BUILT[name])
    comparison = compare_case(ROOT, name, mode)
    if comparison.failures:
        pytest.fail(comparison.text(), pytrace=False)
