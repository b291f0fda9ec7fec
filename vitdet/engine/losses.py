"""The losses of a detector as a mean over images, whatever the batch or the number of processes."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import ImageList
from torch import nn

from vitdet.engine.head_losses import batch_losses, can_batch
from vitdet.utils.checks import fail
from vitdet.utils.env import RandomStream, seed_from

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
        if type(detector).forward is not GeneralizedRCNN.forward or not detector.proposal_generator:
            return detector(batch)
        streams = [RandomStream(seed_from(self.seed, _position(record))) for record in batch]
        images = detector.preprocess_image(batch)
        truths = [record["instances"].to(detector.device) for record in batch]
        features = detector.backbone(images.tensor)
        if can_batch(detector):
            return batch_losses(detector, images, features, truths, streams)
        return _one_by_one(detector, images, features, truths, streams)


def check_image_sizes(detector: nn.Module, batch: Batch) -> None:
    """Raise an InputError for an image larger than the square that the backbone pads to.

    detectron2's ImageList (structures/image_list.py) cuts such an image off without a word. Can go
    when it does not.
    """
    backbone = getattr(detector, "backbone", None)
    square = backbone.padding_constraints.get("square_size", 0) if backbone is not None else 0
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
