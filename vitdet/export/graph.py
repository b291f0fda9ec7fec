"""One image in, plain tensors out: a wrapper round a built model and detectron2's own inference.

The tracer follows detectron2's code between the heads. What it cannot follow is replaced for the
time of an export (`exportable`): attention kernels, NMS by class and soft-NMS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch import retinanet
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.modeling.roi_heads import BaseMaskRCNNHead, StandardROIHeads, fast_rcnn
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torchvision.ops import nms

from vitdet import heads as our_heads
from vitdet.postprocess import maskness
from vitdet.utils.checks import InputError

PARTS = ("detector", "backbone")
MASKS = ("pasted", "boxes", "none")
# Kernels without own derivatives, in operations that every runtime has, by attribute.
_KERNELS = {"backend": "eager", "sliding_chunk_backend": "autograd"}


class Graph(nn.Module):
    """A model on the CPU with a uint8 image (3, H, W) in RGB as input.

    Outputs of a detector (Faster, Mask and Cascade Mask R-CNN, RetinaNet), in the order of falling
    scores: "boxes" (N, 4) XYXY in pixels of the image, "scores" (N,), "classes" (N,) from 0, and
    "masks": bool (N, H, W), or with masks="boxes" the probabilities (N, M, M) inside the boxes, for
    `paste`. Those of a backbone are its levels (1, C, H', W').

    Args:
        model: as built.
        part: one of PARTS, the whole detector, or backbone and pyramid.
        size: the one (height, width) of image that it takes; None for any.
        masks: one of MASKS.

    Raises:
        InputError: heads that no wrapper is for, no limit of detections, a size that the model does
            not take.
    """

    def __init__(
        self,
        model: Any,
        part: str = "detector",
        size: tuple[int, int] | None = None,
        masks: str = "pasted",
    ) -> None:
        super().__init__()
        self.model, self.size, self.detector = model, size, part == "detector"
        self.square = int(model.backbone.padding_constraints.get("square_size", 0))
        self.stride = int(model.backbone.size_divisibility)
        if size is not None and not 1 <= min(size) <= max(size) <= (self.square or max(size)):
            fits = f"1 to {self.square} (model.backbone.square_pad)" if self.square else "1 or more"
            raise InputError(f"--size {size[0]} {size[1]}: HEIGHT and WIDTH are pixels, {fits}.")
        self.outputs = tuple(model.backbone.output_shape())
        self.threshold, self.most, self.masks = 0.0, 0, "none"
        self.heads = self.maskness = None
        if self.detector:
            self._look_at_heads(masks)
        self.eval()

    def _look_at_heads(self, masks: str) -> None:
        model = self.model
        if isinstance(model, retinanet.RetinaNet):
            self.threshold, self.most = model.test_score_thresh, model.max_detections_per_image
        else:
            _check_heads(model)
            self.heads = heads = model.roi_heads
            last: Any = heads.box_predictor
            last = last[-1] if isinstance(last, nn.ModuleList) else last
            own = getattr(heads, "override_score_thresh", None)
            self.threshold = last.test_score_thresh if own is None else own
            self.most = last.test_topk_per_image
            self.maskness = getattr(heads, "maskness_thresh", None)
            self.masks = masks if heads.mask_on else "none"
        self.outputs = ("boxes", "scores", "classes", *(("masks",) if self.masks != "none" else ()))
        if self.most < 0:
            raise InputError(
                "export: a limit of detections an image is needed; set "
                "model.roi_heads.box_predictor.test_topk_per_image to a number."
            )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs."""
        model, size = self.model, (image.shape[-2], image.shape[-1])
        x = self._normalised(image)
        features = model.backbone(x)
        if not self.detector:
            return tuple(features[name] for name in self.outputs)
        images = ImageList(x, [size])
        if self.heads is None:
            maps = [features[name] for name in model.head_in_features]
            found = model.forward_inference(images, maps, model.head(maps))[0]
        else:
            proposals, _ = model.proposal_generator(images, features, None)
            found = self.heads._forward_box(features, proposals)[0]
        found.pred_boxes.clip(size)  # this and the next line: detector_postprocess
        rows = found.pred_boxes.nonempty().nonzero()[:, 0]
        boxes, scores, classes = (
            x[rows] for x in (found.pred_boxes.tensor, found.scores, found.pred_classes)
        )
        if self.masks == "none" and self.maskness is None:
            return boxes, scores, classes
        masks = self._probabilities(features, boxes, classes)
        if self.maskness is not None:
            scores = scores * maskness(masks, self.maskness)
            order = scores.argsort(descending=True)
            boxes, scores, classes, masks = (x[order] for x in (boxes, scores, classes, masks))
        masks = paste(masks, boxes, size) if self.masks == "pasted" else masks
        return (boxes, scores, classes, masks)[: len(self.outputs)]

    def _normalised(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image (3, H, W) as the backbone wants it, (1, 3, H', W')."""
        if self.size is not None:
            image = image.expand(3, *self.size)  # another size stops here
        if getattr(self.model, "input_format", "RGB") == "BGR":
            image = image.flip(0)
        x = (image.float() - self.model.pixel_mean) / self.model.pixel_std
        height, width = image.shape[-2:]
        if not self.square:
            return F.pad(x, (0, -width % self.stride, 0, -height % self.stride))[None]
        right, below = (_least_zero(self.square - side) for side in (width, height))
        # A larger image stops at expand(); without it padding would cut it off.
        return F.pad(x, (0, right, 0, below)).expand(1, 3, self.square, self.square)

    def _probabilities(
        self, features: dict[str, torch.Tensor], boxes: torch.Tensor, classes: torch.Tensor
    ) -> torch.Tensor:
        """Return (N, M, M) inside the boxes: detectron2's `mask_rcnn_inference` of one image."""
        heads: Any = self.heads
        maps = [features[name] for name in heads.mask_in_features]
        logits = heads.mask_head.layers(heads.mask_pooler(maps, [Boxes(boxes)]))
        if logits.shape[1] == 1:
            return logits[:, 0].sigmoid()
        return logits[torch.arange(classes.shape[0], device=classes.device), classes].sigmoid()


def _least_zero(number: Any) -> Any:
    return number.clamp(min=0) if isinstance(number, torch.Tensor) else max(number, 0)


def _check_heads(model: Any) -> None:
    heads: Any = getattr(model, "roi_heads", None)
    known = isinstance(model, GeneralizedRCNN) and isinstance(heads, StandardROIHeads)
    known = known and not heads.keypoint_on
    if known and (not heads.mask_on or isinstance(heads.mask_head, BaseMaskRCNNHead)):
        return
    raise InputError(
        "export: expected RetinaNet or an R-CNN with Standard- or CascadeROIHeads and detectron2's "
        f"masks, without keypoints, got {type(model).__name__} with {type(heads).__name__}. "
        "--part backbone does not depend on heads."
    )


@contextmanager
def exportable(graph: Graph) -> Iterator[None]:
    """Replace what the tracer cannot follow, and put it back at the end."""
    changes: list[tuple[Any, str, Any]] = [
        (module, attribute, kernel)
        for module in graph.modules()
        for attribute, kernel in _KERNELS.items()
        if isinstance(getattr(module, attribute, None), str)
    ]
    if graph.detector:
        by_class = partial(_batched_nms, groups=(graph.heads or graph.model).num_classes)
        by_level = partial(_batched_nms, groups=len(graph.model.backbone.output_shape()))
        changes += [(module, "batched_nms", by_class) for module in (fast_rcnn, retinanet)]
        changes += [(proposal_utils, "batched_nms", by_level)]
        changes += [(fast_rcnn.FastRCNNOutputLayers, "predict_boxes", _boxes_of_one)]
        changes += [(fast_rcnn.FastRCNNOutputLayers, "predict_probs", _probabilities_of_one)]
        changes += [(our_heads, "soft_nms", partial(_soft_nms, most=graph.most))]
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(patch.object(*change))
        yield


def _boxes_of_one(predictor: Any, predictions: Any, proposals: list[Instances]) -> Any:
    """Do as detectron2's, which splits by the number of proposals that the tracer saw."""
    boxes = proposals[0].proposal_boxes.tensor
    return (predictor.box2box_transform.apply_deltas(predictions[1], boxes),)


def _probabilities_of_one(predictor: Any, predictions: Any, _: Any) -> tuple[torch.Tensor]:
    logits = predictions[0]
    return (logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(dim=-1),)


def _batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, group: torch.Tensor, threshold: float, *, groups: int
) -> torch.Tensor:
    """Return the places that `batched_nms` of torchvision keeps, with groups moved apart.

    Their places are a square. In one row, as torchvision has them where it traces, float32 would
    keep 1/8 pixel of a box of the last LVIS class.
    """
    ends = torch.cat((boxes.flatten(), boxes.new_zeros(1)))
    step, side = ends.max() - ends.min() + 1, math.ceil(math.sqrt(groups))
    right, down = group % side * step, group // side * step
    return nms(boxes + torch.stack((right, down, right, down), dim=1), scores, threshold)


def _soft_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor | None,
    *,
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `most` places and scores of `vitdet.postprocess.soft_nms`.

    Scores only fall, so the n-th box that is taken is the n-th of the result, and `most` steps are
    enough, whatever comes in. Boxes without area fill up.
    """
    box = torch.cat((boxes, boxes.new_zeros(most, 4))).double()
    left = torch.cat((scores, scores.new_full((most,), -1.0))).double()
    same = None if classes is None else torch.cat((classes, classes.new_full((most,), -1)))
    x1, y1, x2, y2 = box.unbind(1)
    area, rows = (x2 - x1) * (y2 - y1), torch.arange(left.shape[0], device=left.device)
    places, found = [], []
    for _ in range(most):
        place = left.argmax(0)
        taken = box[place]
        places.append(place)
        found.append(left[place])
        across = (torch.minimum(x2, taken[2]) - torch.maximum(x1, taken[0])).clamp(min=0)
        along = (torch.minimum(y2, taken[3]) - torch.maximum(y1, taken[1])).clamp(min=0)
        common = across * along
        overlap = common / (area + area[place] - common).clamp(min=1e-12)
        if same is not None:
            overlap = torch.where(same == same[place], overlap, torch.zeros_like(overlap))
        if method == "gaussian":
            factor = torch.exp(-(overlap**2) / sigma)
        else:
            lower = torch.zeros_like(overlap) if method == "hard" else 1 - overlap
            factor = torch.where(overlap >= iou_threshold, lower, torch.ones_like(overlap))
        left = torch.where(rows == place, -torch.ones_like(left), left * factor)
    new = torch.stack(found)
    kept = (new >= min_score).nonzero()[:, 0]
    return torch.stack(places)[kept], new[kept].to(scores.dtype)


def paste(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[Any, Any]) -> torch.Tensor:
    """Return the masks (height, width) of probabilities (N, M, M) inside boxes (N, 4).

    Bilinear, pixel centres at halves, nothing outside the box: the same as sampling on a grid, but
    rows and columns are weighted one after the other, as two matrix products.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    rows = _weights(y1, y2, size[0], masks.shape[-2])
    columns = _weights(x1, x2, size[1], masks.shape[-1])
    return rows @ masks @ columns.transpose(1, 2) >= 0.5


def _weights(first: torch.Tensor, last: torch.Tensor, length: Any, cells: int) -> torch.Tensor:
    """Return the weights (N, length, cells) of a mask's cells for each pixel along an axis."""
    pixels = torch.arange(length, device=first.device, dtype=first.dtype) + 0.5
    places = (pixels - first[:, None]) / (last - first)[:, None] * cells - 0.5
    centres = torch.arange(cells, device=first.device, dtype=first.dtype)
    return (1 - (places[..., None] - centres).abs()).clamp(min=0)


def example_image(graph: Graph) -> torch.Tensor:
    """Return a grey image (3, H, W) to follow `graph` with.

    A tracer keeps what it sees. Where a side in tokens is a multiple of a window, or that of a
    position table, our layers leave out padding or resizing, and the graph would leave it out for
    every size; so the sides are general ones.
    """
    square, stride = graph.square, graph.stride
    if graph.size:
        height, width = graph.size
    elif square:  # padded both ways
        height, width = square - square // 4, square - square // 8
    else:  # primes of tokens, or twice a prime; pixels that have to be padded
        height, width = 11 * stride - stride // 4, 13 * stride - stride // 8
    return torch.full((3, height, width), 128, dtype=torch.uint8)
