"""Pictures of instances: predictions or ground truth on an image, and sheets of such pictures."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BitMasks, BoxMode, Instances
from detectron2.utils.visualizer import GenericMask, Visualizer
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw, ImageFont

from vitdet.utils.checks import InputError, fail

MIN_SIDE = 480  # pixels: below it labels would cover the objects, so the picture is enlarged
_LABEL_PAD = 1  # pixels of black ground round a label's text
_MARGIN = 8
_TITLE_HEIGHT = 28


def draw_instances(
    image: np.ndarray,
    instances: Instances | Sequence[dict[str, Any]],
    class_names: Sequence[str],
    threshold: float = 0.5,
    *,
    min_side: int = MIN_SIDE,
) -> np.ndarray:
    """Draw boxes, masks and labels; each class has one colour.

    Args:
        image: uint8 RGB (height, width, 3).
        instances: predictions (`pred_boxes`, `pred_classes`, `scores`, `pred_masks` if any) in
            pixels of `image`; or ground truth, as Instances of a model input (`gt_boxes`,
            `gt_classes`, `gt_masks` if any) or as the "annotations" of a detectron2 record.
        class_names: name of each class index.
        threshold: predictions with a lower score are left out.
        min_side: a smaller image is enlarged to this shorter side (pixels) before drawing.

    Returns:
        uint8 RGB (height, width, 3), the size of `image` times the enlargement.

    Raises:
        InputError: `image` is no uint8 RGB image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        fail(
            "image to draw on",
            expected="uint8 RGB (height, width, 3)",
            got=f"{image.dtype} {image.shape}",
            remedy="Convert it, for example with PIL's Image.convert('RGB').",
        )
    height, width = image.shape[:2]
    if not isinstance(instances, Instances):
        boxes, masks, classes, labels = _annotations(instances, class_names, (height, width))
    elif instances.has("gt_boxes"):
        boxes, masks, classes, labels = _targets(instances, class_names)
    else:
        boxes, masks, classes, labels = _predictions(instances, class_names, threshold)
    scale = max(1.0, min_side / min(height, width))
    painter = _Painter(image, scale=scale)
    colours = [_colour(index) for index in classes]
    if masks is not None:
        sizes = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        for place in np.argsort(-sizes, kind="stable"):  # the smallest on top
            _draw_mask(painter, masks[place], colours[place])
    painted = painter.overlay_instances(boxes=boxes, labels=labels, assigned_colors=colours)
    return painted.get_image()


class _Painter(Visualizer):
    """detectron2's, whose labels stay inside the picture and are no formulas."""

    def draw_text(self, text: str, position: tuple[float, float], **options: Any) -> Any:
        """Write a label at (x, y) in pixels of the image, moved as far as it would stick out."""
        output = super().draw_text(text, position, **options)
        label = output.ax.texts[-1]
        label.set_parse_math(False)  # a class may be called "$5 to $10"
        ground = label.get_window_extent(output.canvas.get_renderer()).padded(_LABEL_PAD)
        sides = output.ax.transData.inverted().transform(ground.get_points())
        (left, top), (right, bottom) = sides.min(axis=0), sides.max(axis=0)
        x, y = label.get_position()
        x = max(x + min(0.0, output.width - right), x - left)
        y = max(y + min(0.0, output.height - bottom), y - top)
        label.set_position((x, y))
        return output


def _draw_mask(painter: Visualizer, mask: Any, colour: tuple[float, float, float]) -> None:
    """Draw a mask and its outline; detectron2's own way would fill its holes too.

    The polygons of a traced mask run one way round the object and the other way round its holes,
    which therefore stay open. Polygons of an annotation run as they like, so several are traced.
    """
    height, width = painter.output.height, painter.output.width
    if isinstance(mask, GenericMask) and len(mask.polygons) > 1:
        mask = mask.mask
    if not isinstance(mask, GenericMask):
        mask = GenericMask(np.asarray(mask, dtype=np.uint8), height, width)
    parts = [np.asarray(polygon).reshape(-1, 2) for polygon in mask.polygons]
    paths = [Outline(np.concatenate([part, part[:1]]), closed=True) for part in parts]
    if paths:
        whole = Outline.make_compound_path(*paths)
        line = max(painter._default_font_size // 15 * painter.output.scale, 1)
        patch = PathPatch(whole, facecolor=(*colour, 0.4), edgecolor=colour, linewidth=line)
        painter.output.ax.add_patch(patch)


def _colour(index: int) -> tuple[float, float, float]:
    """Bright RGB in 0-1; steps of the golden section keep the hues of neighbours far apart."""
    return colorsys.hsv_to_rgb(0.6180339887 * index % 1.0, 0.85, 1.0)


def _predictions(
    instances: Instances, class_names: Sequence[str], threshold: float
) -> tuple[np.ndarray, list[np.ndarray] | None, list[int], list[str]]:
    instances = instances.to("cpu")
    instances = instances[instances.scores >= threshold]
    classes = instances.pred_classes.tolist()
    labels = [
        f"{class_names[index]} {score:.0%}"
        for index, score in zip(classes, instances.scores.tolist(), strict=True)
    ]
    masks = list(instances.pred_masks.numpy()) if instances.has("pred_masks") else None
    return instances.pred_boxes.tensor.numpy(), masks, classes, labels


def _targets(
    instances: Instances, class_names: Sequence[str]
) -> tuple[np.ndarray, list[Any] | None, list[int], list[str]]:
    """What a detector is trained on, in pixels of the augmented image."""
    instances = instances.to("cpu")
    classes = instances.gt_classes.tolist()
    masks: list[Any] | None = None
    if instances.has("gt_masks"):
        given = instances.gt_masks
        masks = (
            list(given.tensor.numpy())
            if isinstance(given, BitMasks)
            else [GenericMask(polygons, *instances.image_size) for polygons in given.polygons]
        )
    labels = [str(class_names[index]) for index in classes]
    return instances.gt_boxes.tensor.numpy(), masks, classes, labels


def _annotations(
    annotations: Sequence[dict[str, Any]], class_names: Sequence[str], size: tuple[int, int]
) -> tuple[np.ndarray, list[GenericMask] | None, list[int], list[str]]:
    boxes = [
        BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in annotations
    ]
    classes = [int(item["category_id"]) for item in annotations]
    labels = [
        class_names[index] + (" (crowd)" if item.get("iscrowd", 0) else "")
        for index, item in zip(classes, annotations, strict=True)
    ]
    masks = None
    if annotations and all("segmentation" in item for item in annotations):
        masks = [GenericMask(item["segmentation"], *size) for item in annotations]
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4), masks, classes, labels


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    titles: Sequence[str] = (),
    cell_height: int = 320,
) -> np.ndarray:
    """Lay pictures out in rows on white.

    Args:
        rows: pictures, uint8 RGB (height, width, 3) of any sizes; rows may differ in length.
        titles: one text above each column.
        cell_height: every picture is resized to this height (pixels), its shape kept.

    Returns:
        uint8 RGB (height, width, 3).

    Raises:
        InputError: there is no picture.
    """
    if not any(len(row) for row in rows):
        fail("contact sheet", expected="pictures", got="none", remedy="Give at least one.")
    cells = [[_resized(picture, cell_height) for picture in row] for row in rows]
    columns = max(len(row) for row in cells)
    widths = [max(row[c].width for row in cells if c < len(row)) for c in range(columns)]
    lefts = [_MARGIN + sum(widths[:c]) + _MARGIN * c for c in range(columns)]
    top = _MARGIN + (_TITLE_HEIGHT if titles else 0)
    size = (lefts[-1] + widths[-1] + _MARGIN, top + len(cells) * (cell_height + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    for index, row in enumerate(cells):
        for left, picture in zip(lefts, row, strict=False):
            sheet.paste(picture, (left, top + index * (cell_height + _MARGIN)))
    pen = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, titles, strict=False):
        pen.text((left, _MARGIN), title, fill="black", font=ImageFont.load_default(18))
    return np.asarray(sheet)


def _resized(picture: np.ndarray, height: int) -> Image.Image:
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    return Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)


def save_image(image: np.ndarray, path: str | Path) -> None:
    """Write a uint8 RGB image; the suffix (.jpg or .png) decides the format.

    The file appears whole or not at all.

    Raises:
        InputError: another suffix, a missing folder, a full disk.
    """
    path = Path(path)
    formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
    if path.suffix.lower() not in formats:
        fail(
            f"picture {path}",
            expected="a name ending in .jpg or .png",
            got=path.suffix or "no suffix",
            remedy="Rename it.",
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        Image.fromarray(image).save(partial, format=formats[path.suffix.lower()], quality=92)
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"picture {path}: could not be written ({error}). Check the folder and the disk."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
