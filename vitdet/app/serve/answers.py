"""From an upload to what the page draws: detections in COCO's terms, and their outlines."""

from __future__ import annotations

import base64
import io
import json
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from starlette.exceptions import HTTPException

from vitdet.app.options import file_options
from vitdet.app.serve.uploads import decode
from vitdet.app.serve.worker import Answer, Json
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import encode, mask_util

# A picture of more pixels is made smaller before the detector sees it: all its masks, a byte a
# pixel each, are in memory at once. The largest published recipes look at 1536 x 1536.
WORK_PIXELS = 4_000_000
_FINE = 512  # pixels: outlines of smaller objects are traced on a finer grid


def start(args: Namespace) -> tuple[Json, Answer]:
    """Load the model of a command line; see `Worker`.

    Raises:
        InputError: weights that cannot be used.
    """
    options = file_options(args)
    predictor = Predictor.from_checkpoint(
        args.weights, **options, device=args.device, threshold=0.0
    )
    return answering(predictor, Path(args.weights).name, args.max_pixels)


def answering(predictor: Predictor, name: str, max_pixels: int) -> tuple[Json, Answer]:
    """Return what the page shows of a model, and what turns an uploaded file into an answer.

    The answer is as `describe` says, or {"error": one line}. Where a browser might show the file in
    another orientation, it has the upright picture too, as `picture`: JPEG in base64.
    """
    about = {"name": name, "device": str(predictor.device), "classes": list(predictor.class_names)}
    about["class_ids"] = list(predictor.class_ids)

    def answer(content: bytes) -> tuple[int, bytes]:
        status, found = 200, {}
        try:
            upload = decode(content, max_pixels)
            found = describe(predictor, upload.image)
            if upload.odd:
                found["picture"] = _jpeg(upload.image)
        except HTTPException as error:
            status, found = error.status_code, {"error": f"{error.detail.removesuffix('.')}."}
        except InputError as error:
            status, found = 400, {"error": str(error)}
        return status, json.dumps(found).encode()

    return about, answer


def describe(predictor: Predictor, image: np.ndarray) -> Json:
    """Find objects.

    Args:
        predictor: with a threshold of 0, because the page has one of its own.
        image: uint8 RGB (height, width, 3).

    Returns:
        `width` and `height`, and `detections`, the best first: `category_id`, `class`, `score`,
        `bbox` XYWH and `area` in pixels of `image`; with masks also `segmentation` (run lengths),
        and `outlines`, closed lines [x, y, x, y, ...] of which the inner ones are holes.
    """
    height, width = image.shape[:2]
    result = predictor(_reduced(image))
    scale = np.array([width / result.size[1], height / result.size[0]])
    masks = result.instances.pred_masks.numpy() if result.has_masks else np.zeros(0)
    found = []
    for place, each in enumerate(result.to_coco(0)):
        box = (np.array(each["bbox"]).reshape(2, 2) * scale).reshape(-1)
        entry = {
            "category_id": each["category_id"],
            "class": result.names[place],
            "score": round(each["score"], 4),
            "bbox": np.round(box, 2).tolist(),
            "area": round(float(box[2] * box[3]), 1),
        }
        if result.has_masks:
            entry |= _mask(masks[place], each["segmentation"], (height, width), scale)
        found.append(entry)
    return {"width": width, "height": height, "detections": found}


def _jpeg(image: np.ndarray) -> str:
    written = io.BytesIO()
    Image.fromarray(image).save(written, format="JPEG", quality=95)
    return base64.b64encode(written.getvalue()).decode("ascii")


def _reduced(image: np.ndarray) -> np.ndarray:
    """Return the image with no more than `WORK_PIXELS` pixels."""
    height, width = image.shape[:2]
    factor = (WORK_PIXELS / (height * width)) ** 0.5
    if factor >= 1:
        return image
    size = (max(1, int(width * factor)), max(1, int(height * factor)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(picture)


def _mask(mask: np.ndarray, lengths: Json, size: tuple[int, int], scale: np.ndarray) -> Json:
    """Describe a mask in an image of a size (height, width), `scale` times as large (x, y)."""
    outlines = [np.round((line * scale).reshape(-1), 2).tolist() for line in outline(mask)]
    if mask.shape != size:
        whole = cv2.resize(
            mask.astype(np.uint8), (size[1], size[0]), interpolation=cv2.INTER_NEAREST
        )
        (lengths,) = encode(whole[None].astype(bool))
    area = int(mask_util.area(lengths))
    return {"segmentation": lengths, "area": area, "outlines": outlines}


def outline(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the edges of a mask (height, width) as lines (points, 2) x, y; pixel 0 is from 0 to 1.

    OpenCV goes through the centres of the pixels at the edge, so small objects are enlarged first.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    corner = np.array([columns[0], rows[0]])
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    finer = int(np.clip(_FINE // max(part.shape), 1, 8))
    part = part.repeat(finer, axis=0).repeat(finer, axis=1)
    lines, _ = cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [(line.reshape(-1, 2) + 0.5) / finer + corner for line in lines]
