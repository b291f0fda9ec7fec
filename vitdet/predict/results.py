"""What a predictor found in one image."""

from __future__ import annotations

import base64
import html
import importlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from PIL import Image

from vitdet.data.images import open_image
from vitdet.drawing import MIN_SIDE, draw, save_image
from vitdet.evaluation import coco_results
from vitdet.utils.checks import InputError, nearest, one_line
from vitdet.utils.run_lengths import RunLengths, decode, encode

_SHOWN = 1000  # pixels: the longer side of what a notebook shows


@dataclass(frozen=True)
class Picture:
    """An image: its name in messages, and its file, read when it is needed, or its pixels.

    `array` is uint8 RGB (height, width, 3).
    """

    name: str
    path: Path | None = None
    array: np.ndarray | None = field(default=None, repr=False)

    def pixels(self) -> np.ndarray:
        """Return uint8 RGB (height, width, 3), upright, or raise an InputError of the file."""
        return np.array(open_image(str(self.path))) if self.array is None else self.array


class Result:
    """The detections in one image, the best first. Masks are kept in COCO's encoding.

    Attributes:
        name: the image's path, or words such as "image 3".
        size: its (height, width) in pixels.
        boxes: float32 (N, 4), XYXY in pixels.
        scores: float32 (N,).
        classes: class indexes.
        names: class name of each detection.
        run_lengths: masks in COCO's encoding; None where the detector predicts boxes only.
        left_out: number of detections that `of_classes` left out.
        best: class name and score of the best detection before a threshold; None without any.

    Args:
        picture: the image.
        instances: detectron2's, on the CPU in float32: `pred_boxes` XYXY in pixels of the image,
            `scores`, `pred_classes`, and `pred_masks` bool (N, height, width) if any.
        class_names: of the class indexes.
        class_ids: number of each class in COCO results; by default 1, 2, ...
        masks: encoded already, instead of `pred_masks`.
    """

    def __init__(
        self,
        picture: Picture,
        instances: Instances,
        class_names: Sequence[str],
        class_ids: Sequence[int] | None = None,
        masks: list[RunLengths] | None = None,
    ) -> None:
        fields = dict(instances.get_fields())
        pixels = fields.pop("pred_masks", None)
        self._found = Instances(instances.image_size, **fields)
        self.picture, self.name = picture, picture.name
        self.class_names = tuple(class_names)
        self.class_ids = tuple(class_ids or range(1, len(self.class_names) + 1))
        self.size = (int(instances.image_size[0]), int(instances.image_size[1]))
        self.boxes: np.ndarray = instances.pred_boxes.tensor.numpy()
        self.scores: np.ndarray = instances.scores.numpy()
        self.classes: list[int] = instances.pred_classes.tolist()
        self.names = [self.class_names[index] for index in self.classes]
        self.run_lengths = masks if pixels is None else encode(pixels.numpy())
        self.left_out = 0
        top = int(self.scores.argmax()) if len(self.scores) else None
        self.best = None if top is None else (self.names[top], float(self.scores[top]))

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks."""
        return self.run_lengths is not None

    @property
    def masks(self) -> np.ndarray | None:
        """bool (N, height, width), decoded here; None where the detector predicts boxes only."""
        if self.run_lengths is None:
            return None
        masks = np.zeros((len(self), *self.size), dtype=bool)
        for mask, lengths in zip(masks, self.run_lengths, strict=True):
            mask[:] = decode(lengths)
        return masks

    @property
    def image(self) -> np.ndarray:
        """uint8 RGB (height, width, 3); a file is read again."""
        return self.picture.pixels()

    @property
    def instances(self) -> Instances:
        """detectron2's Instances; masks are made here, one byte a pixel each."""
        masks = self.masks
        if masks is None:
            return self._found
        return Instances(self.size, **self._found.get_fields(), pred_masks=torch.from_numpy(masks))

    def __len__(self) -> int:
        """Number of detections."""
        return len(self._found)

    def __getitem__(self, index: int) -> Result:
        """Return one detection, as a result of its own."""
        kept = torch.zeros(len(self), dtype=torch.bool)
        kept[range(len(self))[index]] = True  # an IndexError beyond the last
        return self._part(kept)

    def __iter__(self) -> Iterator[Result]:
        """Yield the detections one by one, the best first."""
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        size, found = f"{self.size[0]} x {self.size[1]}", found_text(self.counts(), self.best)
        return one_line(f"Result({self.name}, {size}: {found})")

    def counts(self) -> dict[str, int]:
        """Return how many of each class there are, the most frequent first."""
        return dict(Counter(self.names).most_common())

    def above(self, threshold: float | Sequence[float]) -> Result:
        """Return the detections with at least this score, or that of their class index."""
        least = np.asarray(threshold, dtype=np.float64)
        least = least[self.classes] if least.ndim else least
        return self._part(self._found.scores >= torch.from_numpy(np.asarray(least)))

    def of_classes(self, names: Sequence[str]) -> Result:
        """Return the detections of these classes.

        Raises:
            InputError: a name that is no class, with the nearest one.
        """
        wanted = torch.tensor(class_indexes(names, self.class_names))
        part = self._part(torch.isin(self._found.pred_classes, wanted))
        part.left_out = len(self) - len(part)
        return part

    def _part(self, kept: Any) -> Result:
        masks = self.run_lengths
        if masks is not None:
            masks = [each for each, keep in zip(masks, kept.tolist(), strict=True) if keep]
        return Result(self.picture, self._found[kept], self.class_names, self.class_ids, masks)

    def plot(self, *, min_side: int = MIN_SIDE) -> np.ndarray:
        """Return the image with boxes, masks and labels, uint8 RGB; see `vitdet.drawing.draw`."""
        scores = self.scores.tolist()
        labels = [f"{name} {score:.0%}" for name, score in zip(self.names, scores, strict=True)]
        masks, classes = self.run_lengths, self.classes
        return draw(self.image, self.boxes, masks, classes, labels, min_side=min_side)

    def show(self) -> None:
        """Open `plot()` in the system's viewer of images."""
        Image.fromarray(self.plot()).show()

    def _repr_html_(self) -> str:
        """What a notebook shows: the drawn image, and what was found."""
        drawn, picture = io.BytesIO(), Image.fromarray(self.plot())
        picture.thumbnail((_SHOWN, _SHOWN))
        picture.save(drawn, "JPEG", quality=90)
        data = base64.b64encode(drawn.getvalue()).decode()
        return f'<img src="data:image/jpeg;base64,{data}"><p>{html.escape(repr(self))}</p>'

    def crops(self) -> list[np.ndarray]:
        """Return the pixels in each box, uint8 RGB (height, width, 3), of at least one pixel."""
        (height, width), image = self.size, self.image
        low = np.clip(np.floor(self.boxes[:, :2]), 0, (width - 1, height - 1)).astype(int)
        high = np.maximum(np.ceil(self.boxes[:, 2:]).astype(int), low + 1)
        ends = zip(low.tolist(), high.tolist(), strict=True)
        return [image[top:bottom, left:right].copy() for (left, top), (right, bottom) in ends]

    def save(self, path: str | Path, *, min_side: int = MIN_SIDE) -> None:
        """Write `plot()` to a .jpg or .png file, whole or not at all.

        Raises:
            InputError: another suffix, the image's own file, a missing folder.
            OSError: the disk takes no more.
        """
        source = self.picture.path
        if source is not None and Path(path).resolve() == source.resolve():
            raise InputError(f"output {path}: this is the input. Choose another name or folder.")
        save_image(self.plot(min_side=min_side), path)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return COCO results: image_id, category_id, bbox XYWH, score, segmentation (RLE)."""
        return coco_results(self._found, image_id, self.class_ids, self.run_lengths)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: image, height, width, and a list of detections, boxes XYXY."""
        (height, width), boxes = self.size, self.boxes.tolist()
        detections = []
        for index, box, coco in zip(self.classes, boxes, self.to_coco(0), strict=True):
            about = {"class": self.class_names[index], "class_index": index}
            about |= {"category_id": coco["category_id"], "score": coco["score"], "box": box}
            masks = {"mask": coco["segmentation"]} if "segmentation" in coco else {}
            detections.append(about | masks)
        return {"image": self.name, "height": height, "width": width, "detections": detections}

    def to_json(self) -> str:
        """Return `to_dict` as JSON: boxes XYXY in pixels, masks in COCO's encoding."""
        return json.dumps(self.to_dict())

    def to_yolo(self) -> str:
        """Return a line a detection: class index, centre, width, height (shares), score."""
        sizes = self.boxes[:, 2:] - self.boxes[:, :2]
        shares = np.hstack([self.boxes[:, :2] + sizes / 2, sizes]) / [
            *self.size[::-1],
            *self.size[::-1],
        ]
        rows = zip(self.classes, shares.tolist(), self.scores.tolist(), strict=True)
        lines = (
            f"{index} {' '.join(f'{x:.6f}' for x in (*box, score))}" for index, box, score in rows
        )
        return "".join(f"{line}\n" for line in lines)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` of x1, y1, x2, y2 (pixels), score, class_index and class.

        Raises:
            InputError: there is no pandas.
        """
        boxes = dict(zip(("x1", "y1", "x2", "y2"), self.boxes.T, strict=True))
        words = {"score": self.scores, "class_index": self.classes, "class": self.names}
        return _package("pandas", "to_pandas").DataFrame(boxes | words)

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`, or raise an InputError without that package."""
        return _package("supervision", "to_supervision").Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=np.array(self.classes, dtype=int),
            data={"class_name": np.array(self.names, dtype=str)},
        )


def _package(name: str, method: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{method}(): no package {name}. pip install {name}") from error


def found_text(counts: Mapping[str, int], best: tuple[str, float] | None) -> str:
    """Say what was found; where that is nothing, what came nearest."""
    if counts:
        return ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"nothing (the best score is {best[1]:.2f}, of {best[0]})" if best else "nothing"


def class_indexes(names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Return the indexes of the classes with these names, of several of one name all of them.

    Raises:
        InputError: a name that is no class, with the nearest one.
    """
    for name in names:
        if name not in class_names:
            close = nearest(name, class_names)
            remedy = f"Did you mean {close}?" if close else f"They are {', '.join(class_names[:8])}"
            remedy += ", ..." if not close and len(class_names) > 8 else ""
            raise InputError(f"class {name!r}: none of the {len(class_names)} classes. {remedy}")
    return [index for index, name in enumerate(class_names) if name in names]


def split_names(text: str, class_names: Sequence[str]) -> list[str]:
    """Split names at commas; where a name has commas itself, the longest one that is a class."""
    pieces = text.split(",")
    names: list[str] = []
    while pieces:
        joined = [",".join(pieces[:count]).strip() for count in range(len(pieces), 0, -1)]
        name = next((each for each in joined if each in class_names), joined[-1])
        names.append(name)
        pieces = pieces[len(joined) - joined.index(name) :]
    return names
