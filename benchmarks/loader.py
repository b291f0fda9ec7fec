"""Time the mapper with large-scale jitter: ours and detectron2's on the same images, in turn.

    python benchmarks/loader.py [--repeat 5] [--size 1024] [--write]

Images are those of coco-mini that have objects. Image number i of round r is augmented under the
same seed by each mapper, so all make the same flips, scales and crops. Before timing, boxes and
masks are compared with detectron2's. One process, one thread; times are CPU time, which other work
on the machine disturbs less than the clock. Our mapper is also timed with the preset `standard`,
which reads other images too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import cv2
import torch
from common import Table, Times, parser, write
from detectron2.data import DatasetMapper

from vitdet.data.augment import large_scale_jitter
from vitdet.data.datasets import coco_mini
from vitdet.data.mapper import Mapper
from vitdet.utils.checks import quiet_dependencies
from vitdet.utils.env import random_state

Json = dict[str, Any]
Map = Callable[[Json], Json]
SCALES = {"0.1 to 2.0": (0.1, 2.0), "shrinking, 0.1 to 0.5": (0.1, 0.5), "2.0": (2.0, 2.0)}
THEIRS, PUBLISHED, FAST = "detectron2", "ours, fast=False", "ours, fast=True"
PRESET = "ours, standard"
BOX_TOLERANCE, MASK_IOU = 0.5, 0.99


def mappers(size: int, scales: tuple[float, float], records: list[Json]) -> dict[str, Map]:
    augmentations = large_scale_jitter(size, *scales)
    theirs = DatasetMapper(
        is_train=True,
        augmentations=augmentations,
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        recompute_boxes=True,
    )
    return {
        THEIRS: theirs,
        PUBLISHED: Mapper(augmentations, is_train=True),
        FAST: Mapper(augmentations, is_train=True, fast=True),
        PRESET: partial(
            Mapper(augmentations, is_train=True, fast=True, preset="standard"), others=records
        ),
    }


def images() -> list[Json]:
    records = [*coco_mini("train").records, *coco_mini("val").records]
    return [r for r in records if any(not a["iscrowd"] for a in r["annotations"])]


def compare(todo: dict[str, Map], records: list[Json]) -> str:
    """Return how far the fast mapper is from detectron2's; stop when it is too far."""
    box, iou, same, objects, pixels = 0.0, 1.0, 0, 0, []
    for seed, record in enumerate(records):
        with random_state(seed):
            expected = todo[THEIRS](record)
        with random_state(seed):
            got = todo[FAST](record)
        one, other = got["instances"], expected["instances"]
        if one.gt_classes.tolist() != other.gt_classes.tolist():
            raise SystemExit(f"{record['file_name']}: other objects than detectron2's")
        difference = got["image"].float() - expected["image"].float()
        pixels.append(difference.abs().mean().item())
        if not len(one):
            continue
        box = max(box, (one.gt_boxes.tensor - other.gt_boxes.tensor).abs().max().item())
        a, b = one.gt_masks.tensor.flatten(1), other.gt_masks.tensor.flatten(1)
        iou = min(iou, ((a & b).sum(1) / (a | b).sum(1)).min().item())
        same += int((a == b).all(1).sum())
        objects += len(one)
    if box > BOX_TOLERANCE or iou < MASK_IOU:
        raise SystemExit(f"boxes differ by {box} px, masks have an IoU down to {iou}")
    return (
        f"{objects} objects: boxes differ by at most {box:g} px, {same} masks are the same to the "
        f"pixel and the worst IoU is {iou:.4f}; pixels differ by {statistics.mean(pixels):.2f} of "
        f"255 on average and by {max(pixels):.2f} in the worst image."
    )


def measure(todo: dict[str, Map], records: list[Json], repeat: int) -> dict[str, Times]:
    """Return for each mapper its seconds an image in each round."""
    seen: dict[str, list[float]] = {name: [] for name in todo}
    for number in range(repeat):
        seconds = dict.fromkeys(todo, 0.0)
        for place, record in enumerate(records):
            for name, mapper in todo.items():  # in turn, so that drift hits all alike
                with random_state(number * len(records) + place):
                    started = time.process_time()
                    mapper(record)
                    seconds[name] += (time.process_time() - started) / len(records)
        for name, values in seen.items():
            values.append(seconds[name])
    return {name: Times(tuple(values)) for name, values in seen.items()}


def main() -> None:
    made = parser(__doc__, threads=1)
    made.add_argument("--size", type=int, default=1024, help="pixels of a side")
    made.add_argument("--images", type=int, help="look at so many only")
    args = made.parse_args()
    quiet_dependencies()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(0)
    records = images()[: args.images]
    names = ("jitter", "mapper", "ms an image", "range", "images/s", "ratio", "range")
    table = Table(*names, left=2)
    notes = []
    for scales, limits in SCALES.items():
        todo = mappers(args.size, limits, records)
        notes.append(f"Jitter {scales}, {compare(todo, records)}")
        seen = measure(todo, records, args.repeat)
        for name, each in seen.items():
            table.add(
                *(scales, name, f"{1e3 * each.median:.1f}", each.range(1e3, 1)),
                f"{1 / each.median:.0f}",
                *(f"{seen[THEIRS].ratio(each):.2f}", seen[THEIRS].ratio_range(each)),
            )
    print("\n".join(notes))
    if args.write:
        about = f"Large-scale jitter at {args.size} px on {len(records)} images of coco-mini, CPU "
        about += f"time, median of {args.repeat} rounds. Ratios are detectron2's time over this\n"
        about += f"one's, round by round.\n{versions()}."
        write("loader", about, [*table.lines, "", *notes])


def versions() -> str:
    names = ("pillow", "shapely", "pycocotools")
    found = [f"{name} {metadata.version(name)}" for name in names]
    return ", ".join([*found, f"opencv {cv2.__version__}"])


if __name__ == "__main__":
    main()
