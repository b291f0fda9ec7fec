"""Pictures of instances: predictions or ground truth on an image."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.structures import BoxMode, Instances
from PIL import Image, ImageDraw, ImageFont

from vitdet.utils.checks import InputError, one_line
from vitdet.utils.files import replacing
from vitdet.utils.run_lengths import RunLengths, decode, encode_segmentation

MIN_SIDE = 480  # pixels: below it labels would cover the objects, so the picture is enlarged
_ENLARGED_TO = 4096  # pixels: the longer side of an elongated image ends the enlargement
_LONGEST_SIDE = 65_500  # pixels: what JPEG holds
_LONGEST_LABEL = 60  # letters
_PAD = 2  # pixels of black ground round a label's text
_HALO = 1  # pixels of black on both sides of a line: a blue box is seen on blue
_FONT = "mpl-data/fonts/ttf/DejaVuSans.ttf"  # of matplotlib, which detectron2 needs
# Chosen one by one, each the farthest from those before it in CIELAB, for normal, protanopic and
# deuteranopic eyes alike (the least distance of any two is 18), so they differ in lightness too.
PALETTE = (
    *((255, 128, 0), (32, 32, 255), (64, 224, 255), (160, 32, 64), (160, 255, 192), (96, 64, 160)),
    *((224, 96, 160), (192, 0, 0), (96, 160, 255), (160, 255, 128), (224, 128, 96), (96, 96, 255)),
    *((192, 255, 0), (128, 64, 128), (0, 255, 224), (255, 128, 160)),
)
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
    """Draw boxes, masks and labels of predictions or ground truth; see `draw`.

    Args:
        image: uint8 RGB (height, width, 3).
        instances: predictions (`pred_boxes`, `pred_classes`, `scores`, `pred_masks` if any) in
            pixels of `image`; or ground truth, the "annotations" of a detectron2 record.
        class_names: name of each class index.
        threshold: predictions with a lower score are left out.
        min_side: see `draw`.

    Raises:
        InputError: `image` is no uint8 RGB image, or longer than 65500 pixels.
    """
    convert = _predictions if isinstance(instances, Instances) else _annotations
    found = convert(instances, class_names, threshold, image.shape[:2])
    return draw(image, *found, min_side=min_side)


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: Sequence[RunLengths | np.ndarray] | None,
    classes: Sequence[int],
    labels: Sequence[str],
    *,
    min_side: int = MIN_SIDE,
) -> np.ndarray:
    """Draw boxes, masks and labels; each class of the image has a colour of its own, up to 16.

    Labels hide neither each other nor an object where there is room; one that stands away from its
    box is joined to it by a line.

    Args:
        image: uint8 RGB (height, width, 3).
        boxes: (N, 4) XYXY in pixels of `image`.
        masks: of the size of `image`, bool or run lengths, which are decoded one at a time.
        classes: class index of each.
        labels: text of each.
        min_side: a smaller image is enlarged to this shorter side (pixels) before drawing, but to
            no more than 4096 pixels on its longer side.

    Raises:
        InputError: as `draw_instances`.
    """
    height, width = image.shape[:2]
    good = image.dtype == np.uint8 and image.shape[2:] == (3,)
    if not good or max(height, width) > _LONGEST_SIDE:
        raise InputError(
            f"image to draw on: expected uint8 RGB with sides of up to {_LONGEST_SIDE} pixels, got "
            f"{image.dtype} {image.shape}. Cut it into parts, or draw nothing (--no-pictures)."
        )
    scale = max(1.0, min(min_side / min(height, width), _ENLARGED_TO / max(height, width)))
    size = (round(width * scale), round(height * scale))
    drawn = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else image.copy()
    line = max(1, round((size[0] * size[1]) ** 0.5 / 320))  # pixels
    boxes = np.clip(boxes * scale, -line, np.array([*size, *size]) + line)
    colours = colours_of(classes)
    for place in np.argsort(-_areas(boxes), kind="stable").tolist():  # the smallest on top
        colour = colours[classes[place]]
        if masks is not None:
            _draw_mask(drawn, masks[place], colour, line)
        x1, y1, x2, y2 = (round(value) for value in boxes[place].tolist())
        for ink, wide in (((0, 0, 0), line + 2 * _HALO), (colour, line)):
            cv2.rectangle(drawn, (x1, y1), (x2, y2), ink, wide)
    inks = [colours[index] for index in classes]
    _write(drawn, labels, inks, boxes, line)
    return drawn


def colours_of(classes: Iterable[int]) -> dict[int, Colour]:
    """Return the colour of each class that is there: its own, the next free one where it is taken.

    RGB. Two classes share a colour only where there are more than 16.
    """
    found: dict[int, int] = {}
    for index in sorted(set(classes)):
        turn = [(index + step) % len(PALETTE) for step in range(len(PALETTE))]
        found[index] = next((each for each in turn if each not in found.values()), turn[0])
    return {index: PALETTE[place] for index, place in found.items()}


def _draw_mask(drawn: np.ndarray, mask: RunLengths | np.ndarray, colour: Colour, line: int) -> None:
    """Tint the pixels of a mask and draw its outline, that of its holes too."""
    mask = np.asarray(decode(mask) if isinstance(mask, dict) else mask, dtype=np.uint8)
    if mask.shape != drawn.shape[:2]:
        larger = cv2.resize(255 * mask, drawn.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        mask = (larger > 127).astype(np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    if not width:
        return
    mask = mask[y : y + height, x : x + width]
    part = drawn[y : y + height, x : x + width]
    tint = cv2.addWeighted(part, 0.6, np.full_like(part, colour), 0.4, 0)
    np.copyto(part, tint, where=mask[..., None] > 0)
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, outlines, -1, colour, max(1, line // 2), offset=(x, y))


# --- labels --------------------------------------------------------------------------------------


def _write(
    drawn: np.ndarray, labels: Sequence[str], inks: Sequence[Colour], boxes: np.ndarray, line: int
) -> None:
    """Write each label where it hides least, with a line to its box where it stands away."""
    height, width = drawn.shape[:2]
    signs = [
        _sign(one_line(text), ink, max(12, 5 * line))
        for text, ink in zip(labels, inks, strict=True)
    ]
    sizes = np.array([sign.shape[1::-1] for sign in signs]).reshape(-1, 2)
    corners = place_labels(boxes, sizes, (height, width))
    for corner, size, box, ink in zip(corners, sizes, boxes, inks, strict=True):
        low, high = box.reshape(2, 2)
        middle = corner + size / 2
        near = np.clip(middle, low, high)
        if _gaps(np.hstack([corner, corner + size])[None], box)[0] > size[1]:
            (x1, y1), (x2, y2) = np.round([middle, near]).astype(int).tolist()
            cv2.line(drawn, (x1, y1), (x2, y2), ink, max(1, line // 2), cv2.LINE_AA)
    for sign, (x, y) in zip(signs, corners.tolist(), strict=True):
        part = drawn[y : y + sign.shape[0], x : x + sign.shape[1]]
        part[:] = sign[: part.shape[0], : part.shape[1]]


@lru_cache(maxsize=1024)  # frames of a video have the same again
def _sign(text: str, colour: Colour, height: int) -> np.ndarray:
    """Return a label, uint8 RGB: white on black, with an edge in its colour."""
    font = _font(height)
    text = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 3]}..."
    left, top, right, bottom = font.getbbox(text)
    edge = max(1, height // 12)
    room = _PAD + edge
    size = (round(right - left) + 2 * room, round(bottom - top) + 2 * room)
    image = Image.new("RGB", size, "black")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=colour, width=edge)
    pen.text((room - left, room - top), text, fill="white", font=font)
    return np.asarray(image)


@lru_cache(maxsize=16)
def _font(height: int) -> ImageFont.FreeTypeFont:
    package = find_spec("matplotlib")  # to import it takes longer than to draw
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    return ImageFont.truetype(str(Path(package.origin).parent / _FONT), height)


def place_labels(boxes: np.ndarray, sizes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return where labels hide neither each other nor an object, or as little as there is room for.

    Those of small objects are placed first: beside or in the box, else as near as may be.

    Args:
        boxes: (N, 4) XYXY in pixels.
        sizes: (N, 2), width and height of each label.
        image_size: (height, width).

    Returns:
        int (N, 2), the upper left corner (x, y) of each label.
    """
    areas = np.maximum(_areas(boxes), 1.0)
    corners = np.zeros((len(boxes), 2), dtype=int)
    taken = np.empty((0, 4))
    for index in np.argsort(areas, kind="stable").tolist():
        size = sizes[index]
        room = np.maximum(np.array(image_size[::-1]) - size, 0)
        best = np.inf
        for spots in (_beside(boxes[index], size), _everywhere(size, room)):
            found = np.clip(spots, 0, room)
            places = np.hstack([found, found + size])
            hidden = (_shared(places, boxes) / areas).sum(axis=1)
            written_over = _shared(places, taken).sum(axis=1) / np.prod(size)
            away = _gaps(places, boxes[index]) / size[1]
            cost = hidden + 100 * written_over + 0.03 * away
            least = int(cost.argmin())
            if cost[least] < best:
                best, corners[index] = cost[least], found[least]
            if best < 0.2:  # good enough
                break
        taken = np.vstack([taken, [*corners[index], *(corners[index] + size)]])
    return corners


def _beside(box: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Upper left corners (K, 2) of a label beside a box, first above it, and in its corners."""
    (x1, y1), (x2, y2), (wide, high) = np.floor(box[:2]), np.ceil(box[2:]), size
    across, down = (x1, x2 - wide, (x1 + x2 - wide) / 2), (y1, y2 - high, (y1 + y2 - high) / 2)
    spots = [(x, y) for y in (y1 - high, y2) for x in across]
    spots += [(x, y) for x in (x2, x1 - wide) for y in down]
    spots += [(x, y) for y in down[:2] for x in across[:2]]
    return np.floor(np.array(spots)).astype(int)


def _everywhere(size: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Corners (K, 2) all over the image, a label's height and a third of its width apart."""
    steps = np.maximum([size[0] // 3, size[1]], 1)
    x, y = (np.arange(0, most + 1, step) for most, step in zip(room, steps, strict=True))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def _shared(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area (K, M) that each of K boxes shares with each of M."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=-1)


def _gaps(places: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Pixels (K,) between each of K boxes and one, 0 where they touch."""
    apart = np.maximum(places[:, :2] - box[2:], box[:2] - places[:, 2:])
    return np.hypot(*np.clip(apart, 0, None).T)


# --- what is drawn -------------------------------------------------------------------------------


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
        # colours of every pixel: half as many would smear thin lines
        options = {"quality": 92, "subsampling": 0}
        Image.fromarray(image).save(written, _FORMATS[path.suffix.lower()], **options)
    except (OSError, ValueError) as error:
        raise InputError(f"picture {path}: could not be written ({error}).") from error
    try:
        with replacing(path) as partial:
            partial.write_bytes(written.getbuffer())
    except OSError as error:  # a write does not say of which file
        raise OSError(error.errno, error.strerror, str(path)) from error
