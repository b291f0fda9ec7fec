"""From an upload to what the page draws, in the worker's process."""

from __future__ import annotations

import base64
import io
import json
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from vitdet.app.options import file_options
from vitdet.app.serve.worker import Answer, Json
from vitdet.data.images import ImageError, open_image, read_header
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import encode, mask_util

# A picture of more pixels is made smaller before the detector sees it: all its masks, a byte a
# pixel each, are in memory at once. The largest published recipes look at 1536 x 1536.
WORK_PIXELS = 4_000_000
_FINE = 512  # pixels: outlines of smaller objects are traced on a finer grid
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what browsers show too
_REFUSED = {  # kind of ImageError -> status and text
    "unknown format": (
        415,
        "This is no picture that can be read: it must be JPEG, PNG, WebP or BMP, the file itself "
        "being the body.",
    ),
    "more than 8 bits": (415, "It has more than 8 bits a channel: convert the picture to 8."),
    "too many scans": (413, "The picture takes too long to decode: a JPEG of too many scans."),
}


def load(args: Namespace) -> tuple[Json, Answer]:
    """Load the model of a command line; see `answering`.

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
            image = np.asarray(open_image(content, formats=_FORMATS, max_pixels=max_pixels))
            found = describe(predictor, image)
            header = read_header(content)
            if header.orientation != 1 and header.format not in ("JPEG", "MPO"):
                found["picture"] = _jpeg(image)
        except ImageError as error:
            status, text = _REFUSED.get(error.kind, (400, "The picture is damaged or incomplete."))
            if error.kind == "too many pixels":
                status, text = 413, f"The picture is too large: it {str(error).partition(': ')[2]}"
            found = {"error": text}
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
    masks = result.instances.pred_masks.numpy() if result.has_masks else ()
    found = []
    for place, each in enumerate(result.to_coco(0)):
        box = np.round((np.array(each["bbox"]).reshape(2, 2) * scale).reshape(-1), 2).tolist()
        entry = {key: each[key] for key in ("category_id", "segmentation") if key in each}
        entry |= {"class": result.names[place], "score": round(each["score"], 4), "bbox": box}
        entry["area"] = round(box[2] * box[3], 1)
        if len(masks):
            entry["outlines"] = [
                np.round((line * scale).reshape(-1), 2).tolist() for line in outline(masks[place])
            ]
            if result.size != (height, width):
                mask = masks[place].astype(np.uint8)
                whole = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
                (entry["segmentation"],) = encode(whole[None].astype(bool))
            entry["area"] = int(mask_util.area(entry["segmentation"]))
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


def outline(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the edges of a mask (height, width) as lines (points, 2) x, y; pixel 0 is from 0 to 1.

    OpenCV goes through the centres of the pixels at the edge, so small objects are enlarged first.
    """
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    if not width:
        return []
    finer = int(np.clip(_FINE // max(width, height), 1, 8))
    part = mask[y : y + height, x : x + width].astype(np.uint8)
    part = part.repeat(finer, axis=0).repeat(finer, axis=1)
    lines, _ = cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [(line.reshape(-1, 2) + 0.5) / finer + np.array([x, y]) for line in lines]
