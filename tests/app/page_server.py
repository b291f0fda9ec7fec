"""A server for the tests: on a free loopback port, with a detector that finds colours."""

from __future__ import annotations

import io
import threading
from contextlib import contextmanager

import httpx
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from vitdet.app.serve import answering
from vitdet.app.serve.server import Limits, Server, Uploads, Worker, build_app, listen
from vitdet.predict.results import Picture, Result
from vitdet.utils.thresholds import Thresholds

CLASSES = ("red", "green", "blue")
SCORES = (0.9, 0.6, 0.3)


class Colours:
    """A predictor: the pixels of each plain colour are one object."""

    class_names = CLASSES
    class_ids = (1, 5, 7)
    device = "cpu"
    threshold = Thresholds(0.5, {})

    def __call__(self, image):
        found = []
        for channel in range(3):
            others = np.delete(image, channel, axis=2).max(axis=2)
            mask = (image[..., channel] > 180) & (others < 80)
            if mask.any():
                rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
                box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                found.append((channel, box, mask))
        size = image.shape[:2]
        boxes = np.array([box for _, box, _ in found], dtype=np.float32).reshape(-1, 4)
        masks = np.array([mask for *_, mask in found]).reshape(-1, *size)
        instances = Instances(size, pred_boxes=Boxes(torch.from_numpy(boxes)))
        instances.scores = torch.tensor([SCORES[channel] for channel, *_ in found])
        instances.pred_classes = torch.tensor([c for c, *_ in found], dtype=torch.int64)
        instances.pred_masks = torch.from_numpy(masks)
        return Result(Picture("image", array=image), instances, CLASSES, self.class_ids)


def scene(width=160, height=120):
    """Grey, with a red, a green and a blue rectangle."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[16:48, 16:64] = (255, 0, 0)
    pixels[64:104, 96:144] = (0, 255, 0)
    pixels[72:104, 8:40] = (0, 0, 255)
    return Image.fromarray(pixels)


def stored(picture, kind="PNG", **options):
    """The bytes of a file."""
    written = io.BytesIO()
    picture.save(written, kind, **options)
    return written.getvalue()


class Served(str):
    """The address of a server, and what is behind it."""

    worker: Worker
    uploads: Uploads


@contextmanager
def serving(predictor=None, limits=None, **options):
    """Serve in a thread; give the address, such as http://127.0.0.1:40000."""
    limits = limits or Limits()

    def start():
        torch.set_num_threads(1)  # a fork has no other threads
        return answering(predictor or Colours(), "colours.pth", limits.max_pixels)

    listening = listen("127.0.0.1", 0)
    url = Served(f"http://127.0.0.1:{listening.getsockname()[1]}")
    url.worker, url.uploads = Worker(start, limits, method="fork"), Uploads(limits)
    server = Server(build_app(url.worker, url.uploads, **options), url.worker)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        url.worker.end()
        assert not thread.is_alive()


def post(url, content, **headers):
    return httpx.post(f"{url}/predict", content=content, headers=headers, timeout=60)


def refused(answer, status):
    """The one line of an error."""
    assert answer.status_code == status, answer.text
    content = answer.json()
    assert set(content) == {"error"}
    assert "\n" not in content["error"]
    return content["error"]
