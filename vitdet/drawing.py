"""Pictures of instances: predictions or ground truth on an image, and sheets of such pictures."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
from detectron2.structures import BoxMode, Instances
from PIL import Image, ImageDraw, ImageFont

from vitdet.utils.checks import InputError, fail, one_line
from vitdet.utils.files import replacing
from vitdet.utils.run_lengths import decode, encode_segmentation

MIN_SIDE = 480  # pixels: below it labels would cover the objects, so the picture is enlarged
_ENLARGED_TO = 4096  # pixels: the longer side of an elongated image ends the enlargement
_LONGEST_SIDE = 65_500  # pixels: what JPEG holds
_LONGEST_LABEL = 60  # letters
_LABEL_PAD = 2  # pixels of black ground round a label's text
_MARGIN = 8
_TITLE_HEIGHT = 28

Colour = tuple[int, int, int]
Shown = tuple[np.ndarray, Sequence[np.ndarray] | None, list[int], list[str]]  # boxes, masks, ...


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
            pixels of `image`; or ground truth, the "annotations" of a detectron2 record.
        class_names: name of each class index.
        threshold: predictions with a lower score are left out.
        min_side: a smaller image is enlarged to this shorter side (pixels) before drawing, but to
            no more than 4096 pixels on its longer side.

    Returns:
        uint8 RGB (height, width, 3), the size of `image` times the enlargement.

    Raises:
        InputError: `image` is no uint8 RGB image, or longer than 65500 pixels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        fail(
            "image to draw on",
            expected="uint8 RGB (height, width, 3)",
            got=f"{image.dtype} {image.shape}",
            remedy="Convert it, for example with PIL's Image.convert('RGB').",
        )
    height, width = image.shape[:2]
    if max(height, width) > _LONGEST_SIDE:
        text = f"image to draw on: expected sides of up to {_LONGEST_SIDE} pixels, got {height} x "
        raise InputError(f"{text}{width}. Cut it into parts, or draw nothing (--no-pictures).")
    if not isinstance(instances, Instances):
        boxes, masks, classes, labels = _annotations(instances, class_names, (height, width))
    else:
        boxes, masks, classes, labels = _predictions(instances, class_names, threshold)
    scale = max(1.0, min(min_side / min(height, width), _ENLARGED_TO / max(height, width)))
    size = (round(width * scale), round(height * scale))
    drawn = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else image.copy()
    line = max(2, round((size[0] * size[1]) ** 0.5 / 500))  # pixels
    boxes = np.clip(boxes * scale, -line, np.array([*size, *size]) + line)
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable").tolist()
    for place in order:  # the smallest on top
        colour = _colour(classes[place])
        if masks is not None:
            _draw_mask(drawn, masks[place], colour, line)
        x1, y1, x2, y2 = (round(value) for value in boxes[place].tolist())
        cv2.rectangle(drawn, (x1, y1), (x2, y2), colour, line)
    marks = [(labels[p], _colour(classes[p]), boxes[p].tolist()) for p in order]
    return _labelled(drawn, marks, 6 * line)


def _draw_mask(drawn: np.ndarray, mask: np.ndarray, colour: Colour, line: int) -> None:
    """Tint the pixels of a mask and draw its outline, that of its holes too."""
    mask = np.asarray(mask, dtype=np.uint8)
    if mask.shape != drawn.shape[:2]:
        larger = cv2.resize(255 * mask, drawn.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        mask = (larger > 127).astype(np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    if not width:
        return
    mask = mask[y : y + height, x : x + width]
    part = drawn[y : y + height, x : x + width]
    part[mask > 0] = np.round(0.6 * part[mask > 0] + 0.4 * np.array(colour))
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, outlines, -1, colour, max(1, line // 2), offset=(x, y))


def _labelled(
    drawn: np.ndarray, marks: Iterable[tuple[str, Colour, Sequence[float]]], height: int
) -> np.ndarray:
    """Write labels above their boxes, or in them, moved as far as they would stick out."""
    image = Image.fromarray(drawn)
    pen, font = ImageDraw.Draw(image), _font(max(12, height))
    for label, colour, (x1, y1, *_) in marks:
        text = one_line(label)  # whatever the name of its class is
        text = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 3]}..."
        left, top, right, bottom = font.getbbox(text)
        wide, high = right - left + 2 * _LABEL_PAD, bottom - top + 2 * _LABEL_PAD
        x = max(0, min(round(x1), image.width - round(wide) - 1))
        y = max(0, min(round(y1 - high if y1 >= high else y1), image.height - round(high) - 1))
        pen.rectangle((x, y, x + wide, y + high), fill="black", outline=colour)
        pen.text((x + _LABEL_PAD - left, y + _LABEL_PAD - top), text, fill="white", font=font)
    return np.array(image)


@cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), height)


def _colour(index: int) -> Colour:
    """Bright RGB; steps of the golden section keep the hues of neighbours far apart."""
    red, green, blue = colorsys.hsv_to_rgb(0.6180339887 * index % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _predictions(instances: Instances, class_names: Sequence[str], threshold: float) -> Shown:
    instances = instances.to("cpu")
    instances = instances[instances.scores >= threshold]
    classes = instances.pred_classes.tolist()
    labels = [
        f"{class_names[index]} {score:.0%}"
        for index, score in zip(classes, instances.scores.tolist(), strict=True)
    ]
    masks = list(instances.pred_masks.numpy()) if instances.has("pred_masks") else None
    return instances.pred_boxes.tensor.numpy(), masks, classes, labels


def _annotations(
    annotations: Sequence[dict[str, Any]], class_names: Sequence[str], size: tuple[int, int]
) -> Shown:
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
        masks = [decode(encode_segmentation(item["segmentation"], size)) for item in annotations]
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
        pen.text((left, _MARGIN), title, fill="black", font=_font(18))
    return np.asarray(sheet)


def _resized(picture: np.ndarray, height: int) -> Image.Image:
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    return Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)


def save_image(image: np.ndarray, path: str | Path) -> None:
    """Write a uint8 RGB image; the suffix (.jpg or .png) decides the format.

    The file appears whole or not at all.

    Raises:
        InputError: another suffix, a missing folder, an image that the format cannot hold.
        OSError: the disk takes no more.
    """
    path = Path(path)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}.get(path.suffix.lower())
    if kind is None:
        got = path.suffix or "no suffix"
        raise InputError(f"picture {path}: expected a name ending in .jpg or .png, got {got}.")
    if not path.parent.is_dir():
        raise InputError(f"picture {path}: could not be written, there is no such folder.")
    written = io.BytesIO()  # Pillow would take half a write to a file for a whole one
    try:
        Image.fromarray(image).save(written, format=kind, quality=92)
    except (OSError, ValueError) as error:
        raise InputError(f"picture {path}: could not be written ({error}).") from error
    try:
        with replacing(path) as partial:
            partial.write_bytes(written.getbuffer())
    except OSError as error:  # a write does not say of which file
        raise OSError(error.errno, error.strerror, str(path)) from error
