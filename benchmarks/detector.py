"""Time inference of Mask R-CNN on the plain ViT-B against detectron2's, with the same weights.

    python benchmarks/detector.py [--batch 1] [--dtype float32] [--tiny] [--write]

Ours is the recipe, theirs the model of detectron2's own zoo file with its ViT, pyramid and norms,
each from uint8 images to masks in the size of the image. The weights are random, with a predictor
that is sure of its classes, so that there are 100 objects an image to paste. Detections are matched
before timing, in float32: an object of the same class at the same place has to be on the other
side, with the same score and mask. Another type is autocast on both sides.
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
from detectron2.structures import Instances, pairwise_iou
from torch import nn

from vitdet.config import build_model, load_config
from vitdet.utils.quiet import quiet_dependencies

ROOT = Path(__file__).resolve().parents[1]
OURS, THEIRS = "vitdet", "detectron2"
RECIPE = ROOT / "configs/COCO/mask_rcnn_vitdet_b_100ep.py"
ZOO = "common/models/mask_rcnn_vitdet.py"
Batch = list[dict[str, Any]]
# of two detections that are taken for the same; and how many of all must be
PIXELS, SCORE, MASK_IOU, MATCHES = 0.1, 1e-3, 0.98, 0.97


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


def compare(got: list[Instances], expected: list[Instances]) -> str:
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


# --- run -----------------------------------------------------------------------------------------


def one(name: str, args: argparse.Namespace) -> float:
    """Return the peak above the weights in MiB, in this process."""
    model = detector(name, args.tiny, args.device)
    batch = images(args.batch, args.tiny)
    return peak_memory(partial(run, model, batch, args.dtype), args.device) / MIB


def measured(file: str, name: str, args: argparse.Namespace) -> Any:
    """Run `one` of a benchmark in a fresh process with exact accounts of memory."""
    words = [file, "--one", name, "--batch", str(args.batch), "--dtype", args.dtype]
    words += ["--device", args.device, "--threads", str(args.threads)] + ["--tiny"] * args.tiny
    return in_own_process(*words, environment=EXACT_MALLOC)


def rows(times: dict[str, Times], peaks: dict[str, float], batch: int) -> list[str]:
    """Return the table of both detectors."""
    table = Table("detector", "s an image", "range", "over ours", "range", "peak MiB")
    for name, seen in times.items():
        each = Times(tuple(value / batch for value in seen.seconds))
        table.add(
            *(name, f"{each.median:.3f}", each.range(digits=3)),
            *(f"{seen.ratio(times[OURS]):.2f}", seen.ratio_range(times[OURS])),
            f"{peaks[name]:.0f}",
        )
    return table.lines


def compared(args: argparse.Namespace) -> list[str]:
    """Return the table of ours and detectron2's, and how their answers agree."""
    batch = images(args.batch, args.tiny)
    models = {name: detector(name, args.tiny, args.device) for name in (OURS, THEIRS)}
    with torch.backends.cudnn.flags(allow_tf32=False):
        agreement = compare(*(run(model, batch, "float32") for model in models.values()))
    todo: dict[str, Callable[[], object]] = {
        name: partial(run, model, batch, args.dtype) for name, model in models.items()
    }
    times = in_turn(todo, args.repeat)
    del models, todo
    peaks = {name: measured(__file__, name, args) for name in times}
    lines = [*rows(times, peaks, args.batch), "", agreement]
    print(agreement)
    return lines


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark of whole detectors."""
    made = parser(doc)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--tiny", action="store_true", help="a small detector and small images")
    made.add_argument("--one", choices=[OURS, THEIRS], help=argparse.SUPPRESS)
    return made


def main() -> None:
    args = arguments(__doc__).parse_args()
    quiet_dependencies()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args.one, args)))
        return
    lines = compared(args)
    if args.write:
        size = "tiny" if args.tiny else "b"
        about = f"Inference of Mask R-CNN, ViT-{size.upper()}, batch {args.batch}, {args.dtype}, "
        about += f"the same weights and images; median of {args.repeat} rounds in turn.\n"
        about += "Peak memory is above the weights."
        write(f"detector_{size}_batch{args.batch}_{args.dtype}", about, lines, device=args.device)


if __name__ == "__main__":
    main()
