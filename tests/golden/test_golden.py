"""vitdet computes what the published implementations computed, forward and backward."""

import pytest

from .build import MODES
from .cases import ABSENT, discover, folders, not_built, read_info
from .families import compare_case, modes

ROOTS = folders()
CASES = []
for _root, _name in ((root, name) for root in ROOTS for name in discover(root)):
    if _root is not None and not _name.startswith("lr_decay/"):
        _info = read_info(_root, _name)
        _detector = _info.get("model") == "GeneralizedRCNN"  # one mode is enough for `make quick`
        for _mode in modes(_info, MODES):
            _marks = [pytest.mark.slow] if _detector and str(_mode) != "eager" else []
            CASES.append(pytest.param(_root, _name, _mode, id=f"{_name}-{_mode}", marks=_marks))


@pytest.mark.parametrize("root", ROOTS, ids=["golden", "golden2"][: len(ROOTS)])
def test_there_are_cases(root):
    if root is None:
        pytest.skip(ABSENT)
    assert any(case.values[0] == root for case in CASES), f"no case under {root} that is built"


@pytest.mark.parametrize(("root", "name", "mode"), CASES)
def test_case(root, name, mode):
    if reason := not_built(name):
        pytest.skip(reason)
    comparison = compare_case(root, name, mode)
    if comparison.failures:
        pytest.fail(comparison.text(), pytrace=False)
