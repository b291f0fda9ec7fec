"""What a predictor found in one image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances

from vitdet.drawing import MIN_SIDE, draw_instances, save_image
from vitdet.predict.inputs import Picture
from vitdet.utils.checks import fail, nearest, one_line
from vitdet.utils.run_lengths import RunLengths, decode, encode


class Result:
    """The detections in one image, the best first.

    Args:
        picture: the image.
        instances: detectron2's, on the CPU in float32: `pred_boxes` XYXY in pixels of the image,
            `scores`, `pred_classes`, and `pred_masks` bool (N, height, width) if any.
        class_names: of the class indexes.
        class_ids: number of each class in COCO results; by default 1, 2, ...
        run_lengths: the masks in COCO's encoding instead of `pred_masks`, for large images.
    """

    def __init__(
        self,
        picture: Picture,
        instances: Instances,
        class_names: Sequence[str],
        class_ids: Sequence[int] | None = None,
        run_lengths: list[RunLengths] | None = None,
    ) -> None:
        self.picture = picture
        self.class_names = tuple(class_names)
        self.class_ids = tuple(class_ids or range(1, len(self.class_names) + 1))
        self._instances = instances
        self._run_lengths = run_lengths

    @property
    def name(self) -> str:
        """The image's path, or words such as "image 3"."""
        return self.picture.name

    @property
    def image(self) -> np.ndarray:
        """uint8 RGB (height, width, 3); a file is read again."""
        return self.picture.pixels()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        height, width = self._instances.image_size
        return int(height), int(width)

    @property
    def instances(self) -> Instances:
        """detectron2's Instances; masks of a sliced image are made here, one byte a pixel each."""
        if self._run_lengths is None or self._instances.has("pred_masks"):
            return self._instances
        fields = self._instances.get_fields()
        masks = np.zeros((len(self._run_lengths), *self.size), dtype=bool)
        for mask, lengths in zip(masks, self._run_lengths, strict=True):
            mask[:] = decode(lengths)
        return Instances(self.size, **fields, pred_masks=torch.from_numpy(masks))

    @property
    def boxes(self) -> np.ndarray:
        """float32 (N, 4), XYXY in pixels."""
        return self._instances.pred_boxes.tensor.numpy()

    @property
    def scores(self) -> np.ndarray:
        """float32 (N,)."""
        return self._instances.scores.numpy()

    @property
    def classes(self) -> list[int]:
        """Class indexes."""
        return self._instances.pred_classes.tolist()

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return [self.class_names[index] for index in self.classes]

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks."""
        return self._run_lengths is not None or self._instances.has("pred_masks")

    def __len__(self) -> int:
        """Number of detections."""
        return len(self._instances)

    def __repr__(self) -> str:
        height, width = self.size
        found = ", ".join(f"{count} {name}" for name, count in self.counts().items())
        return one_line(f"Result({self.name}, {height} x {width}: {found or 'nothing'})")

    def counts(self) -> dict[str, int]:
        """Return how many of each class there are, the most frequent first."""
        return dict(Counter(self.names).most_common())

    def above(self, threshold: float) -> Result:
        """Return the detections with at least this score."""
        return self._part(self._instances.scores >= threshold)

    def of_classes(self, names: Sequence[str]) -> Result:
        """Return the detections of these classes.

        Raises:
            InputError: a name that is no class, with the nearest one.
        """
        wanted = torch.tensor(class_indexes(names, self.class_names))
        return self._part(torch.isin(self._instances.pred_classes, wanted))

    def _part(self, kept: Any) -> Result:
        if kept.all():
            return self
        lengths = self._run_lengths
        if lengths is not None:
            lengths = [each for each, keep in zip(lengths, kept.tolist(), strict=True) if keep]
        instances = self._instances[kept]
        return Result(self.picture, instances, self.class_names, self.class_ids, lengths)

    def packed(self) -> Result:
        """Return the same with its masks in COCO's encoding, which takes far less memory."""
        if not self._instances.has("pred_masks"):
            return self
        lengths, fields = self.run_lengths(), self._instances.get_fields()
        boxes = {name: value for name, value in fields.items() if name != "pred_masks"}
        instances = Instances(self.size, **boxes)
        return Result(self.picture, instances, self.class_names, self.class_ids, lengths)

    def run_lengths(self) -> list[RunLengths]:
        """Return the masks in COCO's encoding.

        Raises:
            InputError: the detector predicts boxes only.
        """
        if self._run_lengths is None:
            if not self._instances.has("pred_masks"):
                remedy = "Use a detector with a mask head."
                fail(f"masks in {self.name}", expected="masks", got="boxes only", remedy=remedy)
            self._run_lengths = encode(self._instances.pred_masks.numpy())
        return self._run_lengths

    def plot(self, *, min_side: int = MIN_SIDE) -> np.ndarray:
        """Return the image with boxes, masks and labels, uint8 RGB.

        Args:
            min_side: a smaller image is enlarged to this shorter side (pixels), for the labels.
        """
        found = self.instances
        return draw_instances(self.image, found, self.class_names, 0.0, min_side=min_side)

    def save(self, path: str | Path, *, min_side: int = MIN_SIDE) -> None:
        """Write `plot()` to a .jpg or .png file, whole or not at all.

        Raises:
            InputError: another suffix, the image's own file, a missing folder, a full disk.
        """
        source = self.picture.path
        if source is not None and Path(path).resolve() == source.resolve():
            remedy = "Choose another name or folder."
            fail(f"output {path}", expected="a file of its own", got="the input", remedy=remedy)
        save_image(self.plot(min_side=min_side), path)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return COCO results: image_id, category_id, bbox XYWH, score, segmentation (RLE)."""
        boxes = self._instances.pred_boxes.tensor.clone()
        boxes[:, 2:] -= boxes[:, :2]
        scores = self._instances.scores.tolist()
        results = [
            {"image_id": image_id, "category_id": self.class_ids[c], "bbox": box, "score": score}
            for box, c, score in zip(boxes.tolist(), self.classes, scores, strict=True)
        ]
        if self.has_masks:
            for result, lengths in zip(results, self.run_lengths(), strict=True):
                result["segmentation"] = lengths
        return results

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: image, height, width, and a list of detections."""
        height, width = self.size
        boxes, scores = self.boxes.tolist(), self._instances.scores.tolist()
        masks = self.run_lengths() if self.has_masks else [None] * len(self)
        detections = [
            {
                "class": name,
                "class_index": index,
                "category_id": self.class_ids[index],
                "score": score,
                "box": box,
            }
            | ({"mask": mask} if mask else {})
            for name, index, score, box, mask in zip(
                self.names, self.classes, scores, boxes, masks, strict=True
            )
        ]
        return {"image": self.name, "height": height, "width": width, "detections": detections}

    def to_json(self) -> str:
        """Return `to_dict` as JSON: boxes XYXY in pixels, masks in COCO's encoding."""
        return json.dumps(self.to_dict())

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`.

        Raises:
            InputError: the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            remedy = "pip install supervision"
            fail("to_supervision()", expected="supervision", got="no such package", remedy=remedy)
        found = self.instances
        return supervision.Detections(
            xyxy=self.boxes,
            mask=found.pred_masks.numpy() if found.has("pred_masks") else None,
            confidence=self.scores,
            class_id=found.pred_classes.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )


def class_indexes(names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Return the indexes of the classes with these names; two classes may have one name.

    Raises:
        InputError: a name that is no class, with the nearest one.
    """
    for name in names:
        if name not in class_names:
            close = nearest(name, class_names)
            several = ", ".join(class_names[:8]) + (", ..." if len(class_names) > 8 else "")
            remedy = f"Did you mean {close}?" if close else "Choose among these."
            expected = f"one of {len(class_names)} classes ({several})"
            fail("class", expected=expected, got=repr(name), remedy=remedy)
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
