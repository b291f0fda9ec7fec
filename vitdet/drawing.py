"""Pictures of instances: predictions or ground truth on an image."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
from detectron2.structures import BoxMode, Instances
from PIL import Image, ImageDraw, ImageFont

from vitdet.utils.checks import InputError, one_line
from vitdet.utils.files import replacing
from vitdet.utils.run_lengths import decode, encode_segmentation

MIN_SIDE = 480  # pixels: below it labels would cover the objects, so the picture is enlarged
_ENLARGED_TO = 4096  # pixels: the longer side of an elongated image ends the enlargement
_LONGEST_SIDE = 65_500  # pixels: what JPEG holds
_LONGEST_LABEL = 60  # letters
_PAD = 2  # pixels of black ground round a label's text
_FONT = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}

Colour = tuple[int, int, int]


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

    Raises:
        InputError: `image` is no uint8 RGB image, or longer than 65500 pixels.
    """
    height, width = image.shape[:2]
    good = image.dtype == np.uint8 and image.shape[2:] == (3,)
    if not good or max(height, width) > _LONGEST_SIDE:
        raise InputError(
            f"image to draw on: expected uint8 RGB with sides of up to {_LONGEST_SIDE} pixels, got "
            f"{image.dtype} {image.shape}. Cut it into parts, or draw nothing (--no-pictures)."
        )
    convert = _predictions if isinstance(instances, Instances) else _annotations
    boxes, masks, classes, labels = convert(instances, class_names, threshold, (height, width))
    scale = max(1.0, min(min_side / min(height, width), _ENLARGED_TO / max(height, width)))
    size = (round(width * scale), round(height * scale))
    drawn = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else image.copy()
    line = max(2, round((size[0] * size[1]) ** 0.5 / 500))  # pixels
    boxes = np.clip(boxes * scale, -line, np.array([*size, *size]) + line)
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable").tolist()
    for place in order:  # the smallest on top
        if masks is not None:
            _draw_mask(drawn, masks[place], _colour(classes[place]), line)
        x1, y1, x2, y2 = (round(value) for value in boxes[place].tolist())
        cv2.rectangle(drawn, (x1, y1), (x2, y2), _colour(classes[place]), line)
    written = Image.fromarray(drawn)
    for place in order:
        _write(written, labels[place], _colour(classes[place]), boxes[place].tolist(), 6 * line)
    return np.array(written)


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


def _write(image: Image.Image, label: str, colour: Colour, box: list[float], height: int) -> None:
    """Write a label above its box, or in it, moved as far as it would stick out."""
    pen = ImageDraw.Draw(image)
    font = ImageFont.truetype(_FONT, max(12, height))
    text = one_line(label)  # whatever the name of its class is
    text = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 3]}..."
    left, top, right, bottom = font.getbbox(text)
    wide, high = right - left + 2 * _PAD, bottom - top + 2 * _PAD
    above = box[1] - high if box[1] >= high else box[1]
    x = max(0, min(round(box[0]), image.width - round(wide) - 1))
    y = max(0, min(round(above), image.height - round(high) - 1))
    pen.rectangle((x, y, x + wide, y + high), fill="black", outline=colour)
    pen.text((x + _PAD - left, y + _PAD - top), text, fill="white", font=font)


def _colour(index: int) -> Colour:
    """Bright RGB; steps of the golden section keep the hues of neighbours far apart."""
    red, green, blue = colorsys.hsv_to_rgb(0.6180339887 * index % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _predictions(found: Any, names: Sequence[str], threshold: float, _: Any) -> Any:
    """Return boxes XYXY, masks or None, class indexes and labels."""
    found = found.to("cpu")
    found = found[found.scores >= threshold]
    classes, scores = found.pred_classes.tolist(), found.scores.tolist()
    labels = [f"{names[index]} {score:.0%}" for index, score in zip(classes, scores, strict=True)]
    masks = list(found.pred_masks.numpy()) if found.has("pred_masks") else None
    return found.pred_boxes.tensor.numpy(), masks, classes, labels


def _annotations(items: Any, names: Sequence[str], _: float, size: tuple[int, int]) -> Any:
    boxes = [BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS) for each in items]
    classes = [int(each["category_id"]) for each in items]
    marks = [" (crowd)" if each.get("iscrowd", 0) else "" for each in items]
    labels = [names[index] + mark for index, mark in zip(classes, marks, strict=True)]
    masks = None
    if items and all("segmentation" in each for each in items):
        masks = [decode(encode_segmentation(each["segmentation"], size)) for each in items]
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4), masks, classes, labels


def save_image(image: np.ndarray, path: str | Path) -> None:
    """Write a uint8 RGB image whole or not at all; the suffix (.jpg or .png) decides the format.

    Raises:
        InputError: another suffix, a missing folder, an image that the format cannot hold.
        OSError: the disk takes no more.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS or not path.parent.is_dir():
        raise InputError(f"picture {path}: expected a .jpg or .png in a folder that is there.")
    written = io.BytesIO()  # Pillow would take half a write to a file for a whole one
    try:
        Image.fromarray(image).save(written, _FORMATS[path.suffix.lower()], quality=92)
    except (OSError, ValueError) as error:
        raise InputError(f"picture {path}: could not be written ({error}).") from error
    try:
        with replacing(path) as partial:
            partial.write_bytes(written.getbuffer())
    except OSError as error:  # a write does not say of which file
        raise OSError(error.errno, error.strerror, str(path)) from error
