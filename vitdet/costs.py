"""What a recipe costs, from shapes alone: parameters, multiply-adds, memory of a training step.

Nothing is computed and no memory taken: the model runs on tensors without data. Its backbone and
pyramid run as they are; of the heads the layers run, on as many proposals as the recipe takes.
Pooling, sampling and losses are left out.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vitdet.config import build_model
from vitdet.layers.attention import KERNELS
from vitdet.layers.rel_pos import RelPos

PROPOSALS, MASKS = 1000, 100  # an image in inference
_OPEN_SIZE = (800, 1344)  # of a recipe that pads to no square


class Part(NamedTuple):
    """Layers of a head and what goes into them: levels, or pooled boxes of them (count, side)."""

    layers: nn.Module
    pooled: tuple[int, int] | None


class Memory(NamedTuple):
    """Bytes of a training step above the weights and the optimizer's state.

    Attributes:
        kept: what stays between forward and backward.
        peak: at the most, gradients of the weights included.
        flops: operations of its matrix products, two a multiply-add.
    """

    kept: int
    peak: int
    flops: float


def image_size(model: DictConfig) -> tuple[int, int]:
    """Return (height, width) of the images that a recipe's model is planned for."""
    side = model.backbone.get("square_pad", 0)
    return (side, side) if side else _OPEN_SIZE


# --- multiply-adds -------------------------------------------------------------------------------


def count(model: DictConfig) -> tuple[int, float]:
    """Return the parameters of a recipe's model and the multiply-adds of one image.

    Convolutions and matrix products, attention written out; no norms and activations. The boxes are
    1000 for every box head and 100 for the mask head.
    """
    model = model.copy()
    _write_out(model)
    detector: Any = build_model(model, device="meta").eval()
    image = torch.zeros(1, 3, *image_size(model), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        levels = list(detector.backbone(image).values())
        for layers, pooled in _heads(detector, PROPOSALS, MASKS):
            layers(_input(detector, levels, pooled))
    return sum(p.numel() for p in detector.parameters()), counter.get_total_flops() / 2


def _write_out(model: DictConfig) -> None:
    """Choose kernels that the counter looks into."""
    for backbone in (model.backbone.get("net"), model.backbone.get("bottom_up")):
        if backbone is None:
            continue
        name = str(backbone._target_)
        if "vitdet." in name:  # detectron2's have no such choice
            backbone.attention_backend = "eager"
        if "MsViT" in name:
            backbone.sliding_chunk_backend = "autograd"


def _heads(detector: Any, proposals: int, masks: int) -> Iterator[Part]:
    """Yield the heads of a detector for so many boxes."""
    if hasattr(detector, "head"):  # RetinaNet
        yield Part(detector.head, None)
        return
    rois = detector.roi_heads
    yield Part(detector.proposal_generator.rpn_head, None)
    if isinstance(rois.box_head, nn.ModuleList):
        pairs = zip(rois.box_head, rois.box_predictor, strict=True)
    else:
        pairs = [(rois.box_head, rois.box_predictor)]
    for head, predictor in pairs:
        yield Part(nn.Sequential(head, predictor), (proposals, 7))
    if rois.mask_on:
        yield Part(nn.Sequential(*rois.mask_head.children()), (masks, 14))


def _input(detector: Any, levels: list[torch.Tensor], pooled: tuple[int, int] | None) -> Any:
    if pooled is None:
        two_stage = hasattr(detector, "proposal_generator")
        return levels[: len(detector.proposal_generator.in_features)] if two_stage else levels
    boxes, side = pooled
    return _Pooled.apply((boxes, levels[0].shape[1], side, side), *levels)


class _Pooled(torch.autograd.Function):
    """Stands for the pooling of boxes: keeps nothing of the levels, has a gradient for each."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *levels: torch.Tensor) -> torch.Tensor:
        """Return pooled boxes without data."""
        ctx.shapes = [level.shape for level in levels]
        return levels[0].new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Return gradients without data."""
        return None, *(gradients[0].new_empty(shape) for shape in ctx.shapes)


# --- memory --------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside this block and still alive.

    It counts operations too, since torch's own counter keeps tensors that a step has done with.

    Args:
        held: tensors from outside, which do not count.

    Attributes:
        live: bytes now.
        peak: bytes at the most.
        flops: operations of matrix products, two a multiply-add.
    """

    def __init__(self, held: Collection[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops = 0.0
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and enter what it made."""
        out = func(*args, **(kwargs or {}))
        if (count_one := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count_one(*args, **(kwargs or {}), out_val=out)
        tree_map_only(torch.Tensor, self._enter, out)
        return out

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: object) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def training_memory(
    model: DictConfig,
    *,
    batch: int,
    dtype: torch.dtype | None = None,
    checkpoint_blocks: Collection[int] | None = None,
    device: str = "cpu",
) -> Memory:
    """Return what a training step of a recipe's model takes.

    Args:
        model: the `model` node.
        batch: images of this process.
        dtype: of autocast, None for none.
        checkpoint_blocks: blocks that are computed again, None for those of the recipe.
        device: "cpu" or "cuda", whose attention kernels it is for.
    """
    detector: Any = build_model(model, device="meta").train()
    if checkpoint_blocks is not None:
        backbone: Any = detector.get_submodule(checkpointed(detector))
        backbone.checkpoint_blocks = frozenset(checkpoint_blocks)
    rois = getattr(detector, "roi_heads", None)
    sampled = 0 if rois is None else batch * rois.batch_size_per_image
    masks = 0 if rois is None else int(sampled * rois.positive_fraction)

    def forward(images: torch.Tensor) -> Any:
        levels = list(detector.backbone(images).values())
        return [
            layers(_input(detector, levels, pooled))
            for layers, pooled in _heads(detector, sampled, masks)
        ]

    return step_memory(
        detector, forward, (batch, 3, *image_size(model)), dtype=dtype, device=device
    )


def step_memory(
    module: nn.Module,
    forward: Callable[[torch.Tensor], Any],
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Memory:
    """Follow the tensors of a forward and backward pass, and compute none of them.

    Args:
        module: on the meta device, in training mode; afterwards without data on the CPU. Gradients
            that its parameters have already do not count.
        forward: maps images to tensors, or lists of them.
        shape: of the images.
        dtype: of autocast, None for none.
        device: "cpu" or "cuda", whose attention kernels it is for.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _attention_as_one(device):
        module.to_empty(device="cpu")
        images = torch.empty(shape, dtype=next(module.parameters()).dtype)
        held = [images, *module.parameters(), *module.buffers()]
        held += [p.grad for p in module.parameters() if p.grad is not None]
        with LiveBytes(held) as alive:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                outputs = forward(images)
            kept = alive.live
            loss = sum(out.float().mean() for out in _tensors(outputs))
            del outputs
            assert isinstance(loss, torch.Tensor)
            loss.backward()
    return Memory(kept, alive.peak, alive.flops)


@contextlib.contextmanager
def _attention_as_one(device: str) -> Iterator[None]:
    """Have attention with a position bias stand for one operation instead of a loop of blocks.

    Our kernels keep the same tensors for the backward pass as torch's fused attention, and the
    terms of the bias.
    """
    blocks = KERNELS["blocks"]
    can_run = blocks.can_run if device == "cpu" else lambda *_: True
    KERNELS["blocks"] = blocks._replace(run=_fused, can_run=can_run)
    try:
        yield
    finally:
        KERNELS["blocks"] = blocks


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_pos: RelPos | None, scale: float
) -> torch.Tensor:
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out if rel_pos is None else _Biased.apply(out, *rel_pos)  # pyright: ignore


class _Biased(torch.autograd.Function):
    """Keeps the terms of a position bias, and has gradients for them."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *terms: torch.Tensor) -> torch.Tensor:
        """Return `out`."""
        ctx.save_for_backward(*terms)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Return gradients without data for the terms."""
        return gradients[0], *map(torch.empty_like, ctx.saved_tensors)


def checkpointed(detector: nn.Module) -> str:
    """Return the name of the module of a detector that can recompute its blocks, "" without."""
    found = (name for name, each in detector.named_modules() if hasattr(each, "checkpoint_blocks"))
    return next(found, "")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for each in value:
            yield from _tensors(each)
