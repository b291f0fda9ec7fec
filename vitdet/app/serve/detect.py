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
_STATUS = {"unknown format": 415, "more than 8 bits": 415}
_STATUS |= {"too many pixels": 413, "too many scans": 413}


def load(args: Namespace) -> tuple[Json, Answer]:
    """Load the model of a command line; see `answering`.

    Raises:
        InputError: weights that cannot be used.
    """
    options = {**file_options(args), "device": args.device, "threshold": 0.0}
    predictor = Predictor.from_checkpoint(args.weights, **options)
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
            image = open_image(content, formats=_FORMATS, max_pixels=max_pixels)
            found = describe(predictor, image)
            if read_header(content).orientation != 1:
                written = io.BytesIO()
                image.save(written, format="JPEG", quality=95)
                found["picture"] = base64.b64encode(written.getvalue()).decode("ascii")
        except InputError as error:
            kind = error.kind if isinstance(error, ImageError) else ""
            status, text = _STATUS.get(kind, 400), str(error)
            if kind == "unknown format":
                text = "no JPEG, PNG, WebP or BMP, the file itself being the body of the request."
            found = {"error": text}
        return status, json.dumps(found).encode()

    return about, answer


def describe(predictor: Predictor, image: Image.Image) -> Json:
    """Find objects in an RGB image by a predictor with a threshold of 0: the page has its own.

    Returns:
        `width` and `height`, and `detections`, the best first: `category_id`, `class`, `score`,
        `bbox` XYWH and `area` in pixels of `image`; with masks also `segmentation` (run lengths),
        and `outlines`, closed lines [x, y, x, y, ...] of which the inner ones are holes.
    """
    factor = min(1.0, (WORK_PIXELS / (image.width * image.height)) ** 0.5)
    size = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    scale = np.array([image.width / size[0], image.height / size[1]])
    result = predictor(np.asarray(small))
    masks = result.instances.pred_masks.numpy() if result.has_masks else ()
    found = []
    for place, each in enumerate(result.to_coco(0)):
        box = np.round((np.array(each["bbox"]).reshape(2, 2) * scale).reshape(-1), 2).tolist()
        entry = {key: each[key] for key in ("category_id", "segmentation") if key in each}
        entry |= {"class": result.names[place], "score": round(each["score"], 4), "bbox": box}
        entry["area"] = round(box[2] * box[3], 1)
        if len(masks):
            lines = [np.round(line * scale, 2).ravel().tolist() for line in outline(masks[place])]
            if size != image.size:
                mask = cv2.resize(
                    masks[place].astype(np.uint8), image.size, interpolation=cv2.INTER_NEAREST
                )
                (entry["segmentation"],) = encode(mask[None].astype(bool))
            area = int(mask_util.area(entry["segmentation"]))
            entry |= {"outlines": lines, "area": area}
        found.append(entry)
    return {"width": image.width, "height": image.height, "detections": found}


def outline(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the edges of a mask (height, width) as lines (points, 2) x, y; pixel 0 is from 0 to 1.

    OpenCV goes through the centres of the pixels at the edge, so small objects are enlarged first.
    """
    mask = mask.astype(np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    finer = int(np.clip(_FINE // max(width, height, 1), 1, 8))
    part = mask[y : y + height, x : x + width].repeat(finer, axis=0).repeat(finer, axis=1)
    lines = cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0] if width else ()
    return [(line.reshape(-1, 2) + 0.5) / finer + np.array([x, y]) for line in lines]
