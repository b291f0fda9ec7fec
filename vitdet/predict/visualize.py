"""Pictures of predictions: the drawing of `vitdet.drawing`, which the engine uses too."""

from vitdet.drawing import contact_sheet, draw_instances, save_image

__all__ = ["contact_sheet", "draw_instances", "save_image"]
