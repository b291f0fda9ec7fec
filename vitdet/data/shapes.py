"""The embedded data set: shapes on textured backgrounds, drawn by seed, in COCO's format.

It needs no download. Six classes, any rotation, occlusion, partly outside the image, from small to
large, and sometimes a crowd region, in images small enough for a CPU.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vitdet.data.datasets import Dataset, coco_dataset
from vitdet.utils.checks import InputError
from vitdet.utils.env import seed_from
from vitdet.utils.run_lengths import mask_util

CLASSES = ("circle", "rectangle", "triangle", "star", "ring", "cross")
SPLITS = ("train", "val", "test")

_SMALLEST, _LARGEST = 10 / 128, 80 / 128  # extent of an object, relative to the image's side
_LEAST_VISIBLE = 0.4  # part of an object that later ones leave visible
_LEAST_PIXELS = 12 / 128**2  # visible area, relative to the image's
_CONTRAST = 55.0  # least distance in RGB between an object and what it covers

Draw = np.random.Generator
Polygons = list[np.ndarray]  # each (points, 2) x, y; a second one is a hole


@dataclass
class _Object:
    label: int
    visible: np.ndarray  # bool (size, size)
    area: int  # of the whole object, in pixels
    outline: Polygons  # none of a crowd region


def shapes_dataset(
    root: str | Path, split: str, *, num_images: int, size: int = 128, seed: int = 0
) -> Dataset:
    """Return the drawn data set; draw it first where it is not there yet.

    Image i of a split ("train", "val" or "test") depends on (seed, split, i) and the `size` of its
    sides in pixels alone, so a larger data set begins with the smaller one. An interrupted run
    leaves nothing half-written under `root`, and several processes may ask at once.
    """
    if split not in SPLITS or num_images < 1 or size < 32:
        raise InputError(
            f"shapes data set: expected split of {', '.join(SPLITS)}, num_images >= 1 and size >= "
            f"32, got split={split!r}, num_images={num_images}, size={size}."
        )
    folder = drawn_folder(root, split, num_images=num_images, size=size, seed=seed)
    if not folder.is_dir():
        _draw_folder(folder, split, num_images, size, seed)
    return coco_dataset(folder / "instances.json", folder / "images", folder.name)


def drawn_folder(
    root: str | Path, split: str, *, num_images: int, size: int = 128, seed: int = 0
) -> Path:
    """Return the folder of what `shapes_dataset` gives, which may not be there yet."""
    return Path(root) / f"shapes_v1_{split}_{num_images}x{size}px_seed{seed}"


def draw_image(
    split: str, index: int, *, size: int = 128, seed: int = 0
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw an image uint8 RGB (size, size, 3), with annotations in COCO's format without ids."""
    draw = np.random.default_rng(seed_from(seed, SPLITS.index(split), index))
    image = _background(draw, size)
    objects = [_draw_crowd(draw, image)] if draw.random() < 0.12 else []
    for _ in range(int(draw.integers(1, 9))):
        _add_object(draw, image, objects)
    annotations = [_annotation(item, size) for item in objects]
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), annotations


def _draw_folder(folder: Path, split: str, num_images: int, size: int, seed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".drawing-", dir=folder.parent) as temporary:
        drawn = Path(temporary) / folder.name
        (drawn / "images").mkdir(parents=True)
        images, annotations = [], []
        for index in range(num_images):
            pixels, found = draw_image(split, index, size=size, seed=seed)
            name = f"{index:06d}.jpg"
            _, data = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 93])
            (drawn / "images" / name).write_bytes(data.tobytes())
            images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
            for each in found:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **each})
        content = {
            "info": {"description": f"Drawn shapes, version 1, {split}, seed {seed}"},
            "categories": [{"id": i + 1, "name": label} for i, label in enumerate(CLASSES)],
            "images": images,
            "annotations": annotations,
        }
        (drawn / "instances.json").write_text(json.dumps(content), encoding="utf-8")
        try:
            drawn.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same images
                raise


def _background(draw: Draw, size: int) -> np.ndarray:
    """Smoothed noise, a gradient or stripes between two colours, with a little grain; float32."""
    colour = draw.uniform(20, 235, 3)
    first = colour.astype(np.float32)
    second = np.clip(colour + draw.uniform(-70, 70, 3), 0, 255).astype(np.float32)
    kind = draw.integers(3)
    if kind == 0:
        cells = int(draw.integers(3, 13))
        noise = draw.random((cells, cells), dtype=np.float32)
        weight = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    else:
        ramp = _ramp(draw, size)
        stripes = np.float32(draw.uniform(3, 10) * 2 * np.pi)
        weight = ramp if kind == 1 else 0.5 + 0.5 * np.sin(ramp * stripes)
    grain = draw.standard_normal((size, size, 1), dtype=np.float32) * np.float32(draw.uniform(1, 6))
    return second + (first - second) * weight.astype(np.float32)[:, :, None] + grain


def _ramp(draw: Draw, size: int) -> np.ndarray:
    """Values from about 0 to 1 along a random direction, (size, size)."""
    angle = draw.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    right, down = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return axis[None, :] * right + axis[:, None] * down + np.float32(0.5)


def _add_object(draw: Draw, image: np.ndarray, objects: list[_Object]) -> None:
    """Draw one object over the image; a place that hides an earlier object too much is refused."""
    size = len(image)
    least = _LEAST_PIXELS * size**2
    label = int(draw.integers(len(CLASSES)))
    extent = size * float(np.exp(draw.uniform(np.log(_SMALLEST), np.log(_LARGEST))))
    shape = _shape(label, draw)
    for _ in range(12):
        centre = draw.uniform(0.02 * size, 0.98 * size, 2)
        outline, coverage = _placed(draw, shape, extent, centre, size)
        mask = coverage >= 128
        area = int(np.count_nonzero(mask))
        full, *holes = (abs(cv2.contourArea(part.astype(np.float32))) for part in outline)
        outside = area < max(least, 0.3 * (full - sum(holes)))
        if outside or any(
            np.count_nonzero(item.visible & ~mask) < max(least, _LEAST_VISIBLE * item.area)
            for item in objects
        ):
            continue
        _paint(draw, image, coverage, _fill_colour(draw, image[mask].mean(axis=0)))
        for item in objects:
            item.visible &= ~mask
        objects.append(_Object(label, mask, area, outline))
        return


def _draw_crowd(draw: Draw, image: np.ndarray) -> _Object:
    """Draw a cluster of tiny shapes of one class; its region is one crowd annotation."""
    size = len(image)
    label = int(draw.integers(len(CLASSES)))
    centre = draw.uniform(0.2 * size, 0.8 * size, 2)
    colour = _fill_colour(draw, image.reshape(-1, 3).mean(axis=0))
    union = np.zeros((size, size), dtype=np.uint8)
    for _ in range(int(draw.integers(7, 14))):
        shape = _shape(label, draw)
        extent = size * draw.uniform(0.055, 0.075)
        place = centre + draw.normal(0, 0.09 * size, 2)
        _, coverage = _placed(draw, shape, extent, place, size)
        _paint(draw, image, coverage, np.clip(colour + draw.uniform(-20, 20, 3), 0, 255))
        union |= coverage >= 128
    grown = max(3, int(0.04 * size) | 1)
    region = cv2.morphologyEx(union, cv2.MORPH_CLOSE, np.ones((grown, grown), np.uint8)) > 0
    return _Object(label, region, int(np.count_nonzero(region)), [])


def _placed(
    draw: Draw, shape: Polygons, extent: float, centre: np.ndarray, size: int
) -> tuple[Polygons, np.ndarray]:
    """Turn a shape by a random angle and move it: its outline, and the coverage of each pixel."""
    angle = draw.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outline = [part @ turn.T * extent + centre for part in shape]  # pixel edges are whole numbers
    canvas = np.zeros((size, size), dtype=np.uint8)
    # OpenCV counts from pixel centres, in whole numbers with four bits after the point
    points = [np.round((part - 0.5) * 16).astype(np.int32) for part in outline]
    cv2.fillPoly(canvas, points, 255, lineType=cv2.LINE_AA, shift=4)
    return outline, canvas


def _fill_colour(draw: Draw, below: np.ndarray) -> np.ndarray:
    """A random colour that differs visibly from the mean colour below the object."""
    colour = draw.uniform(10, 245, 3)
    while np.linalg.norm(colour - below) < _CONTRAST:
        colour = draw.uniform(10, 245, 3)
    return colour


def _paint(draw: Draw, image: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    """Blend a plain, shaded or striped surface over the image, in place."""
    x, y, width, height = cv2.boundingRect(coverage)
    if not width:
        return
    window = slice(y, y + height), slice(x, x + width)
    alpha = coverage[window][:, :, None].astype(np.float32) / 255
    surface = np.broadcast_to(colour.astype(np.float32), (*alpha.shape[:2], 3))
    kind = draw.integers(3)
    if kind:
        ramp = _ramp(draw, max(width, height))[:height, :width, None]
        stripes = np.float32(draw.uniform(2, 5) * 2 * np.pi)
        wave = ramp - 0.5 if kind == 1 else 0.5 * np.sin(ramp * stripes)
        surface = surface + wave * np.float32(draw.uniform(20, 50))
    image[window] = image[window] * (1 - alpha) + np.clip(surface, 0, 255) * alpha


def _annotation(item: _Object, size: int) -> dict[str, Any]:
    """COCO annotation: a polygon where the whole outline is visible, else run lengths."""
    whole = len(item.outline) == 1 and item.visible.sum() == item.area
    if whole and item.outline[0].min() >= 0 and item.outline[0].max() <= size:
        segmentation: Any = [np.round(item.outline[0], 2).reshape(-1).tolist()]
        encoded = mask_util.merge(mask_util.frPyObjects(segmentation, size, size))
    else:
        encoded = mask_util.encode(np.asfortranarray(item.visible, dtype=np.uint8))
        segmentation = {"size": [size, size], "counts": encoded["counts"].decode("ascii")}
    return {
        "category_id": item.label + 1,
        "segmentation": segmentation,
        "bbox": mask_util.toBbox(encoded).tolist(),
        "area": float(mask_util.area(encoded)),
        "iscrowd": int(not item.outline),
    }


def _regular(corners: int, radius: float = 0.5) -> np.ndarray:
    angles = np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius


def _shape(label: int, draw: Draw) -> Polygons:
    """Return a shape of diameter 1 round the origin."""
    match CLASSES[label]:
        case "rectangle":
            ratio = draw.uniform(0.45, 1.0)
            half = np.array([1.0, ratio]) / (2 * np.hypot(1.0, ratio))
            return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half]
        case "star":
            points = _regular(10)
            points[1::2] *= 0.45
            return [points]
        case "ring":
            return [_regular(40), _regular(40, 0.5 * draw.uniform(0.5, 0.65))]
        case "cross":
            arm = draw.uniform(0.11, 0.16)
            far = float(np.sqrt(0.25 - arm**2))
            quarter = np.array([[far, -arm], [far, arm], [arm, arm]])
            turn = np.array([[0, 1], [-1, 0]])  # row vectors, a quarter turn
            return [np.concatenate([quarter @ np.linalg.matrix_power(turn, n) for n in range(4)])]
        case "circle":
            return [_regular(40)]
        case _:
            return [_regular(3)]
