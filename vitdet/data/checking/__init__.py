"""Everything that is wrong with, or worth knowing of, a data set: see `kinds.KINDS`."""

from vitdet.data.checking.kinds import KINDS, Finding, Kind
from vitdet.data.checking.parts import Checked, check_data

__all__ = ["KINDS", "Checked", "Finding", "Kind", "check_data"]
