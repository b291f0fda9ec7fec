"""Room 2: published checkpoints in, state dicts of our models out. Knows no model class."""

from vitdet.convert.core import FORMATS, convert, detect
from vitdet.convert.report import Report, UnaccountedError

__all__ = ["FORMATS", "Report", "UnaccountedError", "convert", "detect"]
