"""The losses of a detector as a mean over images, whatever the batch or the number of processes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import ImageList
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitdet.engine.head_losses import batch_losses, can_batch
from vitdet.utils.checks import fail
from vitdet.utils.env import RandomStream, seed_from

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]
Losses = dict[str, torch.Tensor]


class DetectorLoss(nn.Module):
    """Run a detector in training mode and average its losses over the images of the batch.

    detectron2 normalises each loss by what one process sees (sampled anchors, foreground boxes),
    so its value depends on how many images share a process. The published ViTDet recipes had one
    image a GPU (facebookresearch/detectron2 projects/ViTDet, 64 images on 64 GPUs). Here every loss
    is normalised by its own image, and proposals are sampled under that image's own random state.
    A batch, the same batch spread over processes, and gradient accumulation then have the same
    loss, the same sampled proposals and the same gradient.

    Args:
        detector: detectron2 meta-architecture. Only what runs GeneralizedRCNN's own forward is
            taken apart. Others (RetinaNet and FCOS normalise by a running mean over batches,
            PanopticFPN has one more head) get the whole batch and keep detectron2's normalisation.
        seed: seed of the run. Image `position` gets `seed_from(seed, position)`.
    """

    def __init__(self, detector: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.detector = detector
        self.seed = seed

    @property
    def by_image(self) -> bool:
        """Whether every loss is normalised by its own image, whatever else is in the batch."""
        detector: Any = self.detector
        own = type(detector).forward is GeneralizedRCNN.forward
        return own and bool(detector.proposal_generator)

    def check_parts(self, parts: int) -> None:
        """Check that `parts` backward passes add up to that of the whole batch.

        Raises:
            InputError: the detector's losses are normalised by what one pass holds.
        """
        if parts < 1:
            remedy = "1 takes the whole batch at once."
            fail("train.accumulate", expected="1 or more", got=parts, remedy=remedy)
        if parts == 1:
            return
        if not self.by_image:
            fail(
                "train.accumulate",
                expected=f"1 for {type(self.detector).__name__}, whose losses are normalised by "
                "all images of a pass: parts of a batch would not add up to the batch",
                got=parts,
                remedy="Lower the batch, or spread it over more processes.",
            )
        names = [name for name, m in self.detector.named_modules() if isinstance(m, _BatchNorm)]
        if names:
            logger.warning(
                "train.accumulate=%d: %s normalises over the images of a part, so the step is that "
                "of as many processes, not of one batch",
                parts,
                names[0],
            )
        if not square_size(self.detector):
            logger.warning(
                "train.accumulate=%d: each part is padded to its own largest image, as "
                "model.backbone.square_pad is 0, so the step is not quite that of the whole batch",
                parts,
            )

    def forward(self, batch: Batch) -> Losses:
        """Return named scalar losses.

        Args:
            batch: detectron2 input dicts (image uint8 (3, H, W), instances) with "position", the
                number of the image in the stream of the run.

        Raises:
            InputError: a dict has no "position", or an image is larger than the model's square.
        """
        detector: Any = self.detector  # its parts are modules, not tensors
        check_image_sizes(detector, batch)
        if not self.by_image:
            return detector(batch)
        streams = [RandomStream(seed_from(self.seed, _position(record))) for record in batch]
        images = detector.preprocess_image(batch)
        truths = [record["instances"].to(detector.device) for record in batch]
        features = detector.backbone(images.tensor)
        if can_batch(detector):
            return batch_losses(detector, images, features, truths, streams)
        return _one_by_one(detector, images, features, truths, streams)


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Return the batch in equal parts.

    Raises:
        InputError: it does not divide.
    """
    if len(batch) % parts:
        fail(
            "train.accumulate",
            expected=f"a divisor of {len(batch)}, the images of a process in a step",
            got=parts,
            remedy="Change it or dataloader.train.total_batch_size.",
        )
    size = len(batch) // parts
    return [batch[first : first + size] for first in range(0, len(batch), size)]


def check_image_sizes(detector: nn.Module, batch: Batch) -> None:
    """Raise an InputError for an image larger than the square that the backbone pads to.

    detectron2's ImageList (structures/image_list.py) cuts such an image off without a word. Can go
    when it does not.
    """
    square = square_size(detector)
    for record in batch if square else ():
        height, width = record["image"].shape[-2:]
        if max(height, width) > square:
            fail(
                f"image {record.get('file_name', '(without a file name)')}",
                expected=f"at most {square} x {square} pixels (model.backbone.square_pad)",
                got=f"{height} x {width}",
                remedy="Resize to less in the mapper's augmentations, or set square_pad to 0: "
                "then the model pads to what the images need.",
            )


def square_size(detector: nn.Module) -> int:
    """Return the side in pixels of the square that images are padded to, 0 when there is none."""
    backbone: Any = getattr(detector, "backbone", None)
    return backbone.padding_constraints.get("square_size", 0) if backbone is not None else 0


def _one_by_one(
    detector: Any,
    images: ImageList,
    features: dict[str, torch.Tensor],
    truths: list[Any],
    streams: list[RandomStream],
) -> Losses:
    """Mean losses of heads of any kind, which see one image at a time."""
    # One split a level: its backward is one concatenation. Slicing would add B padded copies.
    levels = {name: level.split(1) for name, level in features.items()}
    rows = images.tensor.split(1)
    summed: Losses = {}
    for index, (truth, stream) in enumerate(zip(truths, streams, strict=True)):
        image = ImageList(rows[index], [images.image_sizes[index]])
        level = {name: parts[index] for name, parts in levels.items()}
        with stream:
            proposals, losses = detector.proposal_generator(image, level, [truth])
            _, head_losses = detector.roi_heads(image, level, proposals, [truth])
        for name, loss in {**losses, **head_losses}.items():
            summed[name] = summed[name] + loss if name in summed else loss
    return {name: loss / len(truths) for name, loss in summed.items()}


def _position(record: dict[str, Any]) -> int:
    if "position" not in record:
        fail(
            f"training image {record.get('file_name', '(without a file name)')}",
            expected='a "position" (number of the image in the stream of the run)',
            got=f"only {sorted(record)}",
            remedy="Use vitdet.data.loaders.build_train_loader, or add the number in your loader.",
        )
    return record["position"]
