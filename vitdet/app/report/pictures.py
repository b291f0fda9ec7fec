"""The images with the most mistakes: truth beside predictions, the mistakes numbered."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageDraw, ImageFont

from vitdet.app.report.errors import Judgement, Mistake, judge
from vitdet.app.report.matching import Scene
from vitdet.data.images import read_image
from vitdet.drawing import draw_instances
from vitdet.utils.run_lengths import mask_util

_SIDE = 420  # pixels, shorter side of a picture
_QUALITY = 82
_DISC = 11  # pixels, radius of a number's disc


@dataclass(frozen=True)
class Exhibit:
    """An image to look at.

    Attributes:
        name: of the file.
        pictures: truth and predictions, as JPEG in base64.
        notes: what is wrong, in the order of the numbers in the pictures.
    """

    name: str
    pictures: tuple[str, str]
    notes: list[str]


def worst(scenes: Sequence[Scene], threshold: float, count: int) -> list[tuple[Scene, Judgement]]:
    """Return the images with the most mistakes; of equals those with fewer right detections."""
    judged = [(scene, judge(scene, threshold)) for scene in scenes]
    judged = [each for each in judged if each[1].mistakes]
    return sorted(judged, key=lambda each: (-len(each[1].mistakes), len(each[1].right)))[:count]


def exhibit(
    scene: Scene, judged: Judgement, record: dict[str, Any], dataset: Any, threshold: float
) -> Exhibit:
    """Draw an image's truth and predictions, and say what is wrong.

    Args:
        scene: the image.
        judged: what `judge` said of it, with the same threshold.
        record: its detectron2 record.
        dataset: has `class_names` and `class_ids`.
        threshold: predictions with a lower score are left out.
    """
    image = read_image(record)
    names = dict(zip(dataset.class_ids, dataset.class_names, strict=True))
    truth = draw_instances(image, record["annotations"], dataset.class_names, min_side=_SIDE)
    found = draw_instances(
        image, _instances(scene, dataset.class_ids), dataset.class_names, threshold, min_side=_SIDE
    )
    marks: tuple[list[_Mark], list[_Mark]] = ([], [])
    notes = []
    for number, mistake in enumerate(judged.mistakes, 1):
        notes.append(_note(scene, mistake, names))
        missed = mistake.kind == "missed"
        each = scene.truth[mistake.truth] if missed else scene.found[mistake.found]
        marks[0 if missed else 1].append((number, each["bbox"]))
    pictures = [
        _jpeg(_marked(picture, each, picture.shape[0] / image.shape[0]))
        for picture, each in zip((truth, found), marks, strict=True)
    ]
    return Exhibit(str(scene.image["file_name"]), (pictures[0], pictures[1]), notes)


def _instances(scene: Scene, class_ids: Sequence[int]) -> Instances:
    size = (scene.image["height"], scene.image["width"])
    boxes = np.array([each["bbox"] for each in scene.found], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances(size)
    found.pred_boxes = Boxes(torch.from_numpy(boxes))
    found.scores = torch.tensor([each["score"] for each in scene.found])
    places = [class_ids.index(each["category_id"]) for each in scene.found]
    found.pred_classes = torch.tensor(places, dtype=torch.int64)
    if scene.found and all("segmentation" in each for each in scene.found):
        masks = mask_util.decode([each["segmentation"] for each in scene.found])
        found.pred_masks = torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1)) > 0)
    return found


def _note(scene: Scene, mistake: Mistake, names: dict[int, str]) -> str:
    """Say a mistake in words."""
    true = names[scene.truth[mistake.truth]["category_id"]] if mistake.truth >= 0 else ""
    if mistake.kind == "missed":
        return f"missed: {true}"
    found = scene.found[mistake.found]
    what = f"{names[found['category_id']]} {found['score']:.0%}"
    if mistake.truth < 0:
        return f"background: {what}, nothing is there"
    overlap = f"IoU {scene.overlaps[mistake.found, mistake.truth]:.2f}"
    told = {
        "localisation": f"of the {true}, {overlap} only",
        "classification": f"is a {true}",
        "duplicate": f"the {true} was found already",
        "both": f"{overlap} with a {true}",
    }
    return f"{mistake.kind}: {what}, {told[mistake.kind]}"


_Mark = tuple[int, Sequence[float]]  # a number, and the XYWH box in the image that it is about


def _marked(picture: np.ndarray, marks: Sequence[_Mark], scale: float) -> Image.Image:
    """Put numbers on a picture, each at the upper right corner of its box.

    Where a corner has a number already, the next goes below it.
    """
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    taken: list[tuple[float, float]] = []
    for number, (x, y, width, _) in marks:
        right = min(max((x + width) * scale, _DISC), image.width - _DISC)
        top = min(max(y * scale, _DISC), image.height - _DISC)
        while any(abs(right - a) < 2 * _DISC and abs(top - b) < 2 * _DISC for a, b in taken):
            top += 2 * _DISC
        taken.append((right, top))
        corners = (right - _DISC, top - _DISC, right + _DISC, top + _DISC)
        pen.ellipse(corners, fill="#1f2933", outline="white", width=2)
        pen.text((right, top), str(number), fill="white", font=font, anchor="mm")
    return image


def _jpeg(image: Image.Image) -> str:
    written = io.BytesIO()
    image.save(written, format="JPEG", quality=_QUALITY)
    return base64.b64encode(written.getvalue()).decode("ascii")
