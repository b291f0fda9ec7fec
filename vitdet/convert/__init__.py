"""Room 2: published checkpoints in, state dicts of our models out, and out again."""

from vitdet.convert.engine import convert, detect
from vitdet.convert.formats import FORMATS
from vitdet.convert.out import TARGETS, export
from vitdet.convert.rules import Report, UnaccountedError

__all__ = ["FORMATS", "TARGETS", "Report", "UnaccountedError", "convert", "detect", "export"]
