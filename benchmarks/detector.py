"""Time Mask R-CNN on the plain ViT-B against detectron2's, with the same weights and images.

    python benchmarks/detector.py [--train] [--batch 1] [--dtype float32] [--tiny] [--write]

Ours is the recipe, theirs the model of detectron2's own zoo file with its ViT, pyramid and norms.
The weights are random. Another type than float32 is autocast on both sides.

Inference is from uint8 images to masks in the size of the image, with a predictor that is sure of
its classes, so that there are 100 objects an image to paste. Detections are matched before timing,
in float32: an object of the same class at the same place has to be on the other side, with the same
score and mask. Peak memory is above the weights.

With --train it is a training step: forward, backward and AdamW, ours by `vitdet.engine.trainer`
with the recipe's optimizer, theirs as detectron2's trainer takes it with the optimizer of its zoo.
Before timing, the losses of every image are compared in float32, with the same anchors and
proposals sampled on both sides. Peak memory is above weights, gradients and the optimizer's state,
"in all" with them. On a CPU each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    EXACT_MALLOC,
    MIB,
    Table,
    Times,
    in_own_process,
    in_turn,
    parser,
    peak_memory,
    write,
)
from detectron2 import model_zoo
from detectron2.structures import BitMasks, Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import nn

from vitdet.config import build_model, instantiate, load_config
from vitdet.engine.losses import DetectorLoss
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import quiet_dependencies
from vitdet.utils.env import random_state, seed_from

ROOT = Path(__file__).resolve().parents[1]
OURS, THEIRS = "vitdet", "detectron2"
RECIPE = ROOT / "configs/COCO/mask_rcnn_vitdet_b_100ep.py"
ZOO = "common/models/mask_rcnn_vitdet.py"
Batch = list[dict[str, Any]]
# of two detections that are taken for the same; and how many of all must be
PIXELS, SCORE, MASK_IOU, MATCHES = 0.1, 1e-3, 0.98, 0.97
OBJECTS, SEED = 12, 0  # of training
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
TOLERANCE = 1e-2  # of a loss: a proposal more or less among equals changes it a little


# --- models and images ---------------------------------------------------------------------------


def described(name: str, tiny: bool) -> Any:
    """Return the config node of a detector: the same sizes on both sides, no stochastic depth."""
    model = load_config(RECIPE).model if name == OURS else model_zoo.get_config(ZOO).model
    model.backbone.net.drop_path_rate = 0.0
    if tiny:
        model.backbone.net.update(img_size=128, embed_dim=32, depth=4, num_heads=2, window_size=3)
        windows = {OURS: {"global_block_indexes": [1, 3]}, THEIRS: {"window_block_indexes": [0, 2]}}
        model.backbone.net.update(windows[name])
        model.backbone.square_pad = 128
        model.proposal_generator.update(pre_nms_topk=[100, 100], post_nms_topk=[40, 20])
        model.roi_heads.batch_size_per_image = 16
    return model


def detector(name: str, tiny: bool, device: str = "cpu") -> nn.Module:
    """Return a detector; all of them have the weights of ours under seed 0."""
    torch.manual_seed(0)
    model = build_model(described(OURS, tiny))
    with torch.no_grad():
        # proposals in a clear order, classes that the predictor is sure of, boxes that differ
        rpn, predictor = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
        for layer in (rpn.objectness_logits, predictor.cls_score, predictor.bbox_pred):
            layer.weight.normal_(std=0.3)
    if name == THEIRS:
        theirs = build_model(described(THEIRS, tiny))
        theirs.load_state_dict(model.state_dict())
        model = theirs
    return model.to(device).eval()


def images(count: int, tiny: bool) -> Batch:
    """Return uint8 images of smooth random colours, three quarters as high as wide."""
    width = 128 if tiny else 1024
    height = 3 * width // 4
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(count, 3, height // 16, width // 16, generator=generator)
    smooth = F.interpolate(255 * drawn, (height, width), mode="bicubic").clamp(0, 255).byte()
    return [{"image": each, "height": height, "width": width} for each in smooth]


def run(model: nn.Module, batch: Batch, dtype: str) -> list[Instances]:
    """Return the detections of a batch, as an evaluation gets them."""
    device = next(model.parameters()).device.type
    with torch.inference_mode(), torch.autocast(device, DTYPES[dtype], dtype != "float32"):
        return [each["instances"] for each in model(batch)]


# --- comparison ----------------------------------------------------------------------------------


def compare_detections(got: list[Instances], expected: list[Instances]) -> str:
    """Return how far detections are apart; stop where they are others."""
    worst = {"box": 0.0, "score": 0.0, "mask": 1.0}
    matched = total = 0
    for one, other in zip(got, expected, strict=True):
        same = one.pred_classes[:, None] == other.pred_classes[None]
        ious = pairwise_iou(one.pred_boxes, other.pred_boxes) * same
        total += max(len(one), len(other))
        if not ious.numel():
            continue
        mine = torch.arange(len(one), device=ious.device)
        best = ious.argmax(1)
        a, b = one[mine], other[best]
        box = (a.pred_boxes.tensor - b.pred_boxes.tensor).abs().amax(1)
        away = (a.scores - b.scores).abs()
        both, either = a.pred_masks & b.pred_masks, a.pred_masks | b.pred_masks
        masks = both.flatten(1).sum(1) / either.flatten(1).sum(1).clamp(min=1)
        masks[~either.flatten(1).any(1)] = 1.0  # nothing on either side
        found = same[mine, best] & (box < PIXELS) & (away < SCORE) & (masks > MASK_IOU)
        if found.any():
            worst["box"] = max(worst["box"], box[found].max().item())
            worst["score"] = max(worst["score"], away[found].max().item())
            worst["mask"] = min(worst["mask"], masks[found].min().item())
        matched += len(best[found].unique())
    if not total or matched < MATCHES * total:
        raise SystemExit(f"only {matched} of {total} detections are the same")
    return (
        f"{matched} of {total} detections are the same, boxes within {worst['box']:.2g} px, scores "
        f"within {worst['score']:.2g}, masks with an IoU of at least {worst['mask']:.3f}."
    )


# --- training ----------------------------------------------------------------------------------


def training_images(count: int, tiny: bool) -> Batch:
    """Return images with objects, and the position of each in the stream of the run."""
    batch = images(count, tiny)
    generator = torch.Generator().manual_seed(2)
    for position, record in enumerate(batch):
        height, width = record["height"], record["width"]
        size = torch.tensor([width, height])
        corners = (0.7 * size * torch.rand(OBJECTS, 2, generator=generator)).round()
        sides = (size * (0.1 + 0.2 * torch.rand(OBJECTS, 2, generator=generator))).round()
        boxes = torch.cat([corners, corners + sides], 1)
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        objects = Instances((height, width), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        objects.gt_classes = torch.randint(80, (OBJECTS,), generator=generator)
        record |= {"instances": objects, "position": position}
    return batch


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW as the recipe or detectron2's zoo describes it."""
    if name == OURS:
        node = load_config(RECIPE).optimizer
        return instantiate({**node, "model": model})
    node: Any = model_zoo.get_config("common/optim.py").AdamW
    node.params.model = model
    return instantiate(node)


def stepper(
    name: str, model: nn.Module, batch: Batch, args: argparse.Namespace
) -> Callable[[], object]:
    """Return a training step to run without arguments."""
    model.train()
    if name == OURS:
        trainer = Trainer(
            model,
            optimizer(name, model),
            lambda _: 0.0,  # the weights stay what they are
            precision=PRECISIONS[args.dtype],
            seed=SEED,
        )

        def ours() -> None:
            with trainer.statistics:
                trainer.step(batch)

        return ours

    theirs = optimizer(name, model)
    for group in theirs.param_groups:
        group["lr"] = 0.0

    def step() -> None:
        with EventStorage():
            theirs.zero_grad(set_to_none=True)
            with torch.autocast(args.device, DTYPES[args.dtype], args.dtype != "float32"):
                losses = model(batch)
            sum(losses.values()).backward()
            theirs.step()

    return step


def losses_of(name: str, model: nn.Module, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the losses of one image, its anchors and proposals sampled under its own seed."""
    model.train()
    with torch.no_grad(), EventStorage(), torch.backends.cudnn.flags(allow_tf32=False):
        if name == OURS:
            return DetectorLoss(model, seed=SEED)([record])
        with random_state(seed_from(SEED, record["position"])):
            return model([record])


def compare_losses(models: dict[str, nn.Module], batch: Batch) -> str:
    """Return how far the losses are apart; stop where they are others."""
    worst = 0.0
    for record in batch:
        mine, theirs = (losses_of(name, models[name], record) for name in (OURS, THEIRS))
        if mine.keys() != theirs.keys():
            raise SystemExit(f"losses differ: {sorted(mine)}, {sorted(theirs)}")
        for key, value in theirs.items():
            away = ((mine[key] - value).abs() / value.abs().clamp(min=1e-3)).item()
            if not away <= TOLERANCE:
                raise SystemExit(f"{key}: {mine[key].item():.6g} for {value.item():.6g}")
            worst = max(worst, away)
    return f"Losses of every image agree within {worst:.1g} of their value."


# --- run -----------------------------------------------------------------------------------------


def runner(
    name: str, model: nn.Module, batch: Batch, args: argparse.Namespace
) -> Callable[[], object]:
    """Return what is timed, to run without arguments."""
    if args.train:
        return stepper(name, model, batch, args)
    return partial(run, model, batch, args.dtype)


def given(args: argparse.Namespace) -> Batch:
    """Return the images."""
    return (training_images if args.train else images)(args.batch, args.tiny)


def one(name: str, args: argparse.Namespace) -> list[float]:
    """Return the peak above what is held in MiB, of training also in all, in this process."""
    model = detector(name, args.tiny, args.device)
    todo = runner(name, model, given(args), args)
    if not args.train:
        return [peak_memory(todo, args.device) / MIB]
    todo()  # gradients and the optimizer's state are there now
    peak = peak_memory(todo, args.device)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return [peak / MIB, (peak + 4 * held) / MIB]


def measured(name: str, args: argparse.Namespace) -> list[float]:
    """Run `one` in a fresh process with exact accounts of memory."""
    words = [__file__, "--one", name, "--batch", str(args.batch), "--dtype", args.dtype]
    words += ["--device", args.device, "--threads", str(args.threads)]
    words += ["--tiny"] * args.tiny + ["--train"] * args.train
    return in_own_process(*words, environment=EXACT_MALLOC)


def compared(args: argparse.Namespace) -> list[str]:
    """Return the table of ours and detectron2's, and how they agree."""
    batch = given(args)
    models = {name: detector(name, args.tiny, args.device) for name in (OURS, THEIRS)}
    if args.train:
        agreement = compare_losses(models, batch)
    else:
        with torch.backends.cudnn.flags(allow_tf32=False):
            found = [run(model, batch, "float32") for model in models.values()]
        agreement = compare_detections(*found)
    todo = {name: runner(name, model, batch, args) for name, model in models.items()}
    times = in_turn(todo, args.repeat)
    del models, todo
    peaks = ("peak MiB", "in all") if args.train else ("peak MiB",)
    table = Table("detector", "s an image", "range", "over ours", "range", *peaks)
    for name, seen in times.items():
        each = Times(tuple(value / args.batch for value in seen.seconds))
        table.add(
            *(name, f"{each.median:.3f}", each.range(digits=3)),
            *(f"{seen.ratio(times[OURS]):.2f}", seen.ratio_range(times[OURS])),
            *(f"{value:.0f}" for value in measured(name, args)),
        )
    print(agreement)
    return [*table.lines, "", agreement]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--train", action="store_true", help="training steps, not inference")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--tiny", action="store_true", help="a small detector and small images")
    made.add_argument("--one", choices=[OURS, THEIRS], help=argparse.SUPPRESS)
    args = made.parse_args()
    quiet_dependencies()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args.one, args)))
        return
    lines = compared(args)
    if args.write:
        size, what = ("tiny" if args.tiny else "b"), ("train_step" if args.train else "detector")
        about = "A training step" if args.train else "Inference"
        about += f" of Mask R-CNN, ViT-{size.upper()}, batch {args.batch}, {args.dtype}, "
        about += f"the same weights and images; median of {args.repeat} rounds in turn."
        write(f"{what}_{size}_batch{args.batch}_{args.dtype}", about, lines, device=args.device)


if __name__ == "__main__":
    main()
