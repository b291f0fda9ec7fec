"""Augmentations by name: a table of presets over a few operations on a picture and its objects.

They follow the recipe's flip, scale and crop, at the size that the model gets. Geometry is the same
for pixels, masks and boxes; what lies over an object is cut out of its mask. OpenCV does the work:
torchvision's colours and blur take 10 to 30 times as long on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from vitdet.data.augment import NOTHING, Drawn, tight
from vitdet.utils.checks import InputError, nearest

GREY = (124, 116, 104)  # RGB of what is empty or hidden: the usual pixel_mean, 0 in the model
Shape = Literal["ellipse", "rectangle"]
Steps = dict[str, tuple[float, dict[str, Any]]]  # {name: (chance, its values)}


@dataclass(frozen=True)
class Scene:
    """A picture and its objects."""

    image: np.ndarray  # uint8 RGB (height, width, 3)
    boxes: np.ndarray  # float64 (N, 4) XYXY in pixels
    classes: np.ndarray  # int64 (N,)
    masks: list[Drawn] | None  # empty where nothing is seen of an object

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[0], self.image.shape[1]


class Preset(NamedTuple):
    """A row of the table: its steps in the order in which they are taken."""

    steps: Steps
    flip: bool = True  # whether the recipe's own flips stay


# --- geometry -------------------------------------------------------------------------------------


def orient(scene: Scene, transpose: bool, up_down: bool, left_right: bool) -> Scene:
    """Transpose, then flip: with all combinations the eight orientations, exact to the pixel."""
    flips = (slice(None, None, -1 if up_down else 1), slice(None, None, -1 if left_right else 1))
    image = (scene.image.transpose(1, 0, 2) if transpose else scene.image)[flips]
    height, width = image.shape[:2]

    def moved(box: Any) -> Any:
        left, top, right, bottom = (box[1], box[0], box[3], box[2]) if transpose else box
        left, right = (width - right, width - left) if left_right else (left, right)
        top, bottom = (height - bottom, height - top) if up_down else (top, bottom)
        return left, top, right, bottom

    boxes = np.stack(moved(scene.boxes.T), axis=1)
    masks = scene.masks and [
        (moved(box), (pixels.T if transpose else pixels)[flips]) if pixels.size else NOTHING
        for box, pixels in scene.masks
    ]
    return replace(scene, image=np.ascontiguousarray(image), boxes=boxes, masks=masks)


def rotate(scene: Scene, degrees: float, shape: Shape = "ellipse") -> Scene:
    """Turn about the middle, clockwise, on a canvas of the same size; the corners become grey.

    A mask's pixel is the nearest of the source. A box without a mask becomes that of the turned
    `shape` inside it: of the ellipse as in "Towards Rotation Invariance in Object Detection" (Kalra
    et al. 2021), which fits most objects better than the hull of the turned "rectangle".
    """
    (height, width), angle = scene.size, np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    back, middle = np.array([[cos, sin], [-sin, cos]]), np.array([width, height]) / 2
    # OpenCV counts from the pixels' middles
    matrix = np.column_stack([back, (middle - 0.5) - back @ (middle - 0.5)])
    image = cv2.warpAffine(
        *(scene.image, matrix, (width, height)),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderValue=GREY,
    )
    ends = scene.boxes.reshape(-1, 2, 2)
    centres = (ends.mean(axis=1) - middle) @ back + middle
    half = (ends[:, 1] - ends[:, 0]) / 2
    parts = np.abs(half[:, None] * back.T[None])  # of x and y to each new half side
    sides = np.hypot(*parts.transpose(2, 0, 1)) if shape == "ellipse" else parts.sum(axis=2)
    boxes = np.concatenate([centres - sides, centres + sides], axis=1)
    boxes = boxes.clip(0, [width, height, width, height])
    masks = scene.masks and [_turned(mask, back, middle, scene.size) for mask in scene.masks]
    return replace(scene, image=image, boxes=boxes, masks=masks)


def _turned(mask: Drawn, back: np.ndarray, middle: np.ndarray, size: tuple[int, int]) -> Drawn:
    """Take for each pixel the one that `back`, about the `middle`, leads to."""
    (left, top, right, bottom), pixels = mask
    corners = np.array([(x, y) for x in (left, right) for y in (top, bottom)])
    moved = (corners - middle) @ back + middle
    first = np.maximum(np.floor(moved.min(axis=0)), 0).astype(int)
    end = np.minimum(np.ceil(moved.max(axis=0)), size[::-1]).astype(int)
    if not pixels.size or (end <= first).any():
        return NOTHING
    xs, ys = (np.arange(first[i], end[i]) + 0.5 - middle[i] for i in (0, 1))
    columns, rows = (
        np.floor(row[0] * xs + row[1] * ys[:, None] + each).astype(int) - corner
        for row, each, corner in zip(back, middle, (left, top), strict=True)
    )
    inside = (columns >= 0) & (columns < right - left) & (rows >= 0) & (rows < bottom - top)
    found = pixels[np.where(inside, rows, 0), np.where(inside, columns, 0)] * inside
    return tight(int(first[1]), int(first[0]), found)


# --- several pictures -----------------------------------------------------------------------------


def paste(scene: Scene, other: Scene, chosen: list[int]) -> Scene:
    """Lay the `chosen` objects of another scene, which have masks, over this one, in their places.

    "Simple Copy-Paste" (Ghiasi et al. 2021), Sec. 3: no blending; masks below are cut.
    """
    assert scene.masks is not None
    assert other.masks is not None
    height, width = scene.size
    image, hidden = scene.image.copy(), np.zeros(scene.size, dtype=bool)
    pasted: list[Drawn] = []
    for (left, top, *_), pixels in (other.masks[place] for place in chosen):
        seen = np.ascontiguousarray(pixels[: max(0, height - top), : max(0, width - left)])
        window = slice(top, top + seen.shape[0]), slice(left, left + seen.shape[1])
        image[window][seen > 0] = other.image[window][seen > 0]
        hidden[window] |= seen > 0
        pasted.append(tight(top, left, seen) if seen.size else NOTHING)
    below = _without(scene, hidden)
    boxes = other.boxes[chosen].clip(0, [width, height, width, height])
    return Scene(
        image,
        np.concatenate([below.boxes, boxes]),
        np.concatenate([scene.classes, other.classes[chosen]]),
        [*(below.masks or ()), *pasted],
    )


def mosaic(tiles: list[Scene]) -> Scene:
    """Join four scenes (left and right, then those below) where their corners meet; none is cut."""
    across = max(tile.size[1] for tile in tiles[::2])
    down = max(tile.size[0] for tile in tiles[:2])
    right = across + max(tile.size[1] for tile in tiles[1::2])
    bottom = down + max(tile.size[0] for tile in tiles[2:])
    image = np.full((bottom, right, 3), GREY, dtype=np.uint8)
    boxes, masks = [], []
    for place, tile in enumerate(tiles):
        (height, width), (below, beside) = tile.size, divmod(place, 2)
        top, left = down if below else down - height, across if beside else across - width
        image[top : top + height, left : left + width] = tile.image
        shift = np.array([left, top, left, top])
        boxes.append(tile.boxes + shift)
        for box, pixels in tile.masks or ():
            moved = tuple((shift + box).tolist()) if pixels.size else box
            masks.append((moved, pixels))
    classes = np.concatenate([tile.classes for tile in tiles])
    with_masks = all(tile.masks is not None for tile in tiles)
    return Scene(image, np.concatenate(boxes), classes, masks if with_masks else None)


def _without(scene: Scene, hidden: np.ndarray) -> Scene:
    """Cut what is `hidden`, bool (height, width), out of masks; a box that is all hidden goes."""
    if scene.masks is None:
        gone = []
        for left, top, right, bottom in scene.boxes:
            rows, columns = (
                slice(int(begin), int(np.ceil(end)))
                for begin, end in ((top, bottom), (left, right))
            )
            gone.append(bool(hidden[rows, columns].all()))
        return replace(scene, boxes=np.where(np.array(gone, bool)[:, None], 0, scene.boxes))
    masks = []
    for mask in scene.masks:
        (left, top, right, bottom), pixels = mask
        over = hidden[top:bottom, left:right]
        masks.append(tight(top, left, pixels * ~over) if over.any() else mask)
    return replace(scene, masks=masks)


# --- pixels ---------------------------------------------------------------------------------------


def colour(
    scene: Scene,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    stain: float = 0.0,
) -> Scene:
    """Scale brightness, contrast and saturation by 1 +- at most so much, turn the hue (1: a round).

    `stain` scales the optical density of each channel, as more or less of a dye would.
    """
    scale = {name: 1 + _within(value) for name, value in (("b", brightness), ("c", contrast))}
    grey = float(np.mean(cv2.mean(scene.image)[:3])) * scale["b"]
    levels = np.arange(256) * scale["b"]
    levels = (grey + (levels - grey) * scale["c"]).clip(0, 255)[:, None] / 255
    dyes = 1 + np.array([_within(stain) for _ in range(3)])
    image = _looked_up(scene.image, 255 * levels**dyes)
    turn, factor = 256 * _within(hue), 1 + _within(saturation)
    if hue or saturation:
        table = np.stack([np.arange(256) + turn, np.arange(256) * factor, np.arange(256)], axis=1)
        table[:, 0] %= 256  # the hue goes round
        turned = _looked_up(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL), table)
        image = cv2.cvtColor(turned, cv2.COLOR_HSV2RGB_FULL)
    return replace(scene, image=image)


def _looked_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    return cv2.LUT(image, table.round().clip(0, 255).astype(np.uint8)[None])


def blur(scene: Scene, sigma: float) -> Scene:
    """Blur by a Gaussian of at most `sigma` pixels."""
    drawn = float(np.random.uniform(0.2, sigma))
    return replace(scene, image=cv2.GaussianBlur(scene.image, (0, 0), drawn))


def noise(scene: Scene, deviation: float) -> Scene:
    """Add normal noise of a standard deviation of at most so much, of 255."""
    added = np.empty(scene.image.shape, dtype=np.int16)
    cv2.setRNGSeed(int(np.random.randint(2**31)))
    spread = np.array([[np.random.uniform(0, deviation)]])
    cv2.randn(added.reshape(len(added), -1), np.zeros((1, 1)), spread)  # as if of one channel
    return replace(scene, image=cv2.add(scene.image, added, dtype=cv2.CV_8U))


def cutout(scene: Scene, holes: int, side: float) -> Scene:
    """Hide up to so many rectangles of up to `side` times the picture's sides."""
    image, hidden = scene.image.copy(), np.zeros(scene.size, dtype=bool)
    for _ in range(np.random.randint(1, holes + 1)):
        sides = [max(1, round(np.random.uniform(side / 4, side) * each)) for each in scene.size]
        begin = [np.random.randint(a - b + 1) for a, b in zip(scene.size, sides, strict=True)]
        window = tuple(slice(a, a + b) for a, b in zip(begin, sides, strict=True))
        image[window], hidden[window] = GREY, True
    return _without(replace(scene, image=image), hidden)


def _within(limit: float) -> float:
    return float(np.random.uniform(-limit, limit))


# --- the table ------------------------------------------------------------------------------------


STEPS: dict[str, Callable[..., Scene]] = {
    "orientation": lambda scene: orient(scene, *(bool(np.random.randint(2)) for _ in range(3))),
    "angle": lambda scene, degrees, **shape: rotate(scene, _within(degrees), **shape),
    "colour": colour,
    "blur": blur,
    "noise": noise,
    "cutout": cutout,
}  # and "mosaic" and "copy_paste", which take other pictures
_OTHERS: Steps = {"mosaic": (0.25, {}), "copy_paste": (0.5, {})}
_CAMERA: Steps = {
    "colour": (0.8, {"brightness": 0.2, "contrast": 0.2, "saturation": 0.3, "hue": 0.02}),
    "blur": (0.1, {"sigma": 1.0}),
    "noise": (0.1, {"deviation": 6.0}),
}
_STRONG: Steps = {
    "mosaic": (0.5, {}),
    "copy_paste": (0.5, {}),
    "angle": (0.5, {"degrees": 10.0}),
    "colour": (0.9, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.5, "hue": 0.04}),
    "blur": (0.2, {"sigma": 2.0}),
    "noise": (0.2, {"deviation": 12.0}),
    "cutout": (0.5, {"holes": 4, "side": 0.25}),
}
_PAGES: Steps = {
    "angle": (0.5, {"degrees": 3.0, "shape": "rectangle"}),
    "colour": (0.8, {"brightness": 0.2, "contrast": 0.3, "saturation": 0.2}),
    "blur": (0.2, {"sigma": 1.0}),
    "noise": (0.2, {"deviation": 8.0}),
}
_SLIDES: Steps = {
    "orientation": (1.0, {}),
    "colour": (0.8, {"brightness": 0.1, "saturation": 0.2, "hue": 0.02, "stain": 0.15}),
    "blur": (0.2, {"sigma": 1.5}),
    "noise": (0.1, {"deviation": 6.0}),
}
PRESETS: dict[str, Preset] = {
    # other light, and nothing that could be wrong for any data
    "light": Preset({"colour": (0.5, {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1})}),
    # photographs: also new surroundings, and objects that hide one another
    "standard": Preset({**_OTHERS, **_CAMERA, "cutout": (0.2, {"holes": 2, "side": 0.2})}),
    # few photographs, or a long training of a large model
    "strong": Preset(_STRONG),
    # seen from above, no side is up; the camera looks straight down, so no perspective
    "aerial": Preset({**_OTHERS, "orientation": (1.0, {}), **_CAMERA}),
    # pages are read one way up; where a part stands says what it is, so nothing is pasted
    "documents": Preset(_PAGES, flip=False),
    # a slide has no side that is up; stains and focus differ from slide to slide
    "cells": Preset({**_OTHERS, **_SLIDES}),
}


def find_preset(name: str) -> Preset:
    """Return a row of the table, or raise an InputError that names them."""
    if name not in PRESETS:
        close = nearest(name, PRESETS)
        hint = f" Did you mean {close}?" if close else ""
        raise InputError(
            f"mapper.preset: expected one of {', '.join(PRESETS)}, got {name!r}.{hint}"
        )
    return PRESETS[name]


def steps_of(name: str, *, masks: bool) -> str:
    """Return a line on a preset: its steps with their chances, and what needs `masks`."""
    rows = {step: chance for step, (chance, _) in find_preset(name).steps.items()}
    without = not masks and rows.pop("copy_paste", None)
    text = ", ".join(f"{step} {100 * chance:.0f} %" for step, chance in rows.items())
    return f"{name}: {text}{'; no copy_paste, which needs masks' if without else ''}"


def augment(preset: Preset, draw: Callable[[bool, bool], Scene]) -> Scene:
    """Take each step with its chance, by NumPy's random numbers.

    `draw(other, half)` makes a scene of the picture itself or another one, at full or half size.
    """
    rows = preset.steps
    chosen = [name for name, (chance, _) in rows.items() if np.random.random() < chance]
    if "mosaic" in chosen:
        scene = mosaic([draw(place > 0, True) for place in range(4)])
    else:
        scene = draw(False, False)
    for name in chosen:
        if name == "copy_paste" and scene.masks is not None:  # a box does not tell what to cut out
            other = draw(True, False)
            some = np.flatnonzero(np.random.random(len(other.classes)) < 0.5)
            scene = paste(scene, other, some.tolist())
        elif name in STEPS:
            scene = STEPS[name](scene, **rows[name][1])
    return scene
