"""Data sets as tools write them: COCO json, Roboflow exports, YOLO text labels, Pascal VOC xml.

The readers are small and our own. Those of supervision 0.31 were tried: they decode whole images
where a header is enough (VOC), turn every polygon into a mask of the image's size and keep no
polygon, number VOC's classes in the order in which they are met, know neither ImageSets nor
`difficult`, and their errors name a file without a line (YOLO) or a line without a file (VOC). The
package brings a hundred megabytes with it. These here read headers only, and say file and line.
"""

from vitdet.data.formats.discovery import FORMATS, find_data
from vitdet.data.formats.parts import WHOLE, Found, Part

__all__ = ["FORMATS", "WHOLE", "Found", "Part", "find_data"]
