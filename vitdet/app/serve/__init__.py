"""`vitdet serve`: a page on this machine to which one gives an image, and sees what is found."""

from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import multiprocessing
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from vitdet.app.options import file_options
from vitdet.data.images import ImageError, open_image, read_header
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import encode, mask_util
from vitdet.utils.thresholds import Thresholds

if TYPE_CHECKING:  # slow to import, and the server needs no detector
    from vitdet.predict.predictor import Predictor

Json = dict[str, Any]
# A picture of more pixels is made smaller before the detector sees it: all its masks, a byte a
# pixel each, are in memory at once. The largest published recipes look at 1536 x 1536.
WORK_PIXELS = 4_000_000
_FINE = 512  # pixels: outlines of smaller objects are traced on a finer grid
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what browsers show too
_STATUS = {"unknown format": 415, "more than 8 bits": 415}
_STATUS |= {"too many pixels": 413, "too many scans": 413}


def run(args: argparse.Namespace) -> int:
    """Serve until ^C; return 0.

    Raises:
        InputError: a wrong option, weights that cannot be used, an address that is taken.
    """
    try:
        from vitdet.app.serve import server
    except ModuleNotFoundError as error:
        text = f"vitdet serve: needs starlette and uvicorn ({error}). pip install starlette uvicorn"
        raise InputError(text) from error
    if args.max_bytes < 1 or args.max_pixels < 1:
        got = f"--max-bytes {args.max_bytes} --max-pixels {args.max_pixels}"
        raise InputError(f"{got}: both are 1 or more.")
    if not server.is_own(args.host):
        if not args.allow_network:
            text = "other machines reach this address, without password and encryption. Add "
            raise InputError(f"--host {args.host}: {text}--allow-network if they shall.")
        text = "can use this server; there is no password and no encryption"
        print(f"warning: every machine that reaches {args.host} {text}", file=sys.stderr)
    if not args.weights.exists():  # said before the process has loaded its libraries
        from vitdet.weights import locate

        if not locate(args.weights).exists():
            raise InputError(f"--weights {args.weights}: there is no such file. Check the path.")
    limits = server.Limits(max_bytes=args.max_bytes, max_pixels=args.max_pixels)
    multiprocessing.set_forkserver_preload(["vitdet.predict.predictor"])
    with server.listen(args.host, args.port) as listening:
        worker = server.Worker(functools.partial(_start, args), limits)
        uploads, is_open = server.Uploads(limits), args.allow_network
        root = "/" + args.root_path.strip("/") if args.root_path.strip("/") else ""
        options = {"loopback_only": not is_open, "root": root}
        app = server.build_app(worker, uploads, args.host_name, **options)
        where = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving http://{where}:{listening.getsockname()[1]}/ (^C ends it)", flush=True)
        try:
            server.Server(app, worker).run(sockets=[listening])
        except KeyboardInterrupt:  # the server has closed its connections before it says so
            print("ended", flush=True)
        finally:
            worker.end()
    return 0


def _start(args: argparse.Namespace) -> Any:
    """Load the model, in the worker's process."""
    from vitdet.predict.predictor import Predictor

    options = {**file_options(args), "device": args.device, "threshold": args.threshold}
    predictor = Predictor.from_checkpoint(args.weights, **options)
    return answering(predictor, args.weights.name, args.max_pixels)


def answering(
    predictor: Predictor, name: str, max_pixels: int
) -> tuple[Json, Callable[[bytes], tuple[int, bytes]]]:
    """Return what the page shows of a model, and what turns an upload into a status and JSON.

    The JSON is as `describe` says, or {"error": one line}. Where a browser might show the file in
    another orientation, it has the upright picture too, as `picture`: JPEG in base64.
    """

    def answer(content: bytes) -> tuple[int, bytes]:
        try:
            image = open_image(content, formats=_FORMATS, max_pixels=max_pixels)
            status, found = 200, describe(predictor, image)
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

    about = {"name": name, "device": str(predictor.device), "classes": list(predictor.class_names)}
    least = predictor.threshold
    about |= {"threshold": least.over_all, "thresholds": list(least.of(predictor.class_names))}
    predictor.threshold = Thresholds(0.0, {})  # the page has them
    return about | {"class_ids": list(predictor.class_ids)}, answer


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
        box = np.round(np.array(each["bbox"]) * np.tile(scale, 2), 2).tolist()
        entry = {"class": result.names[place], "category_id": each["category_id"], "bbox": box}
        entry |= {"score": round(each["score"], 4), "area": round(box[2] * box[3], 1)}
        if len(masks):
            mask, lengths = masks[place].astype(np.uint8), each["segmentation"]
            lines = [np.round(line * scale, 2).ravel().tolist() for line in outline(mask)]
            if size != image.size:
                large = cv2.resize(mask, image.size, interpolation=cv2.INTER_NEAREST)
                (lengths,) = encode(large[None].astype(bool))
            area = int(mask_util.area(lengths))
            entry |= {"segmentation": lengths, "outlines": lines, "area": area}
        found.append(entry)
    return {"width": image.width, "height": image.height, "detections": found}


def outline(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the edges of a mask, uint8 (height, width), as lines (points, 2) x, y.

    Pixel 0 is from 0 to 1. OpenCV goes through the centres of the pixels at the edge, so small
    objects are enlarged first.
    """
    x, y, width, height = cv2.boundingRect(mask)
    finer = int(np.clip(_FINE // max(width, height, 1), 1, 8))
    part = mask[y : y + height, x : x + width].repeat(finer, axis=0).repeat(finer, axis=1)
    lines = cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0] if width else ()
    return [(line.reshape(-1, 2) + 0.5) / finer + np.array([x, y]) for line in lines]
