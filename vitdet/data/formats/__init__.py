"""Data sets as tools write them (COCO json, Roboflow, YOLO text, Pascal VOC xml), as COCO dicts.

The readers are our own: those of supervision decode whole images where a header is enough, and know
neither ImageSets nor `difficult`. What they cannot use is named and counted, never passed over.
"""

from vitdet.data.formats.discovery import FORMATS, find_data
from vitdet.data.formats.parts import WHOLE, Found, Part

__all__ = ["FORMATS", "WHOLE", "Found", "Part", "find_data"]
