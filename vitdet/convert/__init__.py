"""Room 2: published checkpoints in, state dicts of our models out, and out again.

Knows no model class.
"""

from vitdet.convert.core import FORMATS, convert, detect
from vitdet.convert.out import TARGETS, export
from vitdet.convert.report import Report, UnaccountedError, chain

__all__ = [
    "FORMATS",
    "TARGETS",
    "Report",
    "UnaccountedError",
    "chain",
    "convert",
    "detect",
    "export",
]
