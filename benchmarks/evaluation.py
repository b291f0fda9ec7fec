"""Time the scoring of results and the encoding of masks: ours, and pycocotools' in turn.

    python benchmarks/evaluation.py [--images 5000] [--repeat 3] [--write]

The data set is made up, as large and as varied as COCO's validation set: 80 classes, about 7
objects an image, polygons, one crowd region in a hundred; 100 detections an image, some on objects,
most not, with run-length encoded masks. Either side begins with parsed json and ends with all
metrics; reading the files is the same for both and stated apart. Metrics are compared first.

The second table is about what comes before: 100 masks of 28 x 28 pasted into their image, as
detectron2 does it, and encoded. Times are CPU time, which other work on the machine disturbs less
than the clock; everything compared runs in one thread.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from typing import Any, Literal

import numpy as np
import torch
from common import Table, Times, in_turn, parser, write
from detectron2.layers import paste_masks_in_image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vitdet.scores import evaluate_results
from vitdet.utils.checks import quiet_dependencies
from vitdet.utils.run_lengths import encode, mask_util

Json = dict[str, Any]
Kind = Literal["bbox", "segm"]
KINDS: tuple[Kind, ...] = ("bbox", "segm")
HEIGHT, WIDTH = 480, 640
CLASSES, OBJECTS, DETECTIONS = 80, 7, 100
TOLERANCE = 1e-12
FREQUENCY = 1 / np.arange(1, CLASSES + 1) / (1 / np.arange(1, CLASSES + 1)).sum()
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def outline(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    """A closed curve of 12 to 40 points that touches about all sides of a box XYWH."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(12, 40)))
    bumps = 0.8 + 0.2 * np.sin(angles * rng.integers(2, 6) + rng.uniform(0, 6))
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * bumps[:, None]
    points = box[:2] + (points + 1) / 2 * box[2:]
    return points.clip(0, (WIDTH, HEIGHT)).round(2).ravel().tolist()


def boxes_of(rng: np.random.Generator, number: int) -> np.ndarray:
    """Boxes XYWH (number, 4): 42 % small, 32 % medium, 26 % large, as COCO's objects are."""
    side = np.exp(rng.normal(np.log(58), 1.15, number)).clip(4, 0.9 * HEIGHT)
    shape = np.exp(rng.normal(0, 0.4, number))
    size = np.stack([side * shape, side / shape], axis=1).clip(3, (0.95 * WIDTH, 0.95 * HEIGHT))
    return np.concatenate([rng.uniform(0, 1, (number, 2)) * ((WIDTH, HEIGHT) - size), size], axis=1)


def encoded(polygon: list[float]) -> Json:
    rle = mask_util.merge(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode("ascii")}


def make(images: int) -> tuple[Json, list[Json]]:
    """Return an annotation file's content and results, the same for the same number of images."""
    rng = np.random.default_rng(0)
    annotations: list[Json] = []
    results: list[Json] = []
    for image in range(1, images + 1):
        boxes = boxes_of(rng, int(rng.poisson(OBJECTS)))
        classes = 1 + rng.choice(CLASSES, len(boxes), p=FREQUENCY)
        for box, category in zip(boxes, classes.tolist(), strict=True):
            polygon, crowd = outline(rng, box), int(rng.random() < 0.01)
            mask = encoded(polygon)
            each = {"id": len(annotations) + 1, "image_id": image, "category_id": category}
            each |= {"bbox": mask_util.toBbox(mask).tolist(), "area": float(mask_util.area(mask))}
            annotations.append(
                each | {"iscrowd": crowd, "segmentation": mask if crowd else [polygon]}
            )
        # up to three detections for each object, the others anywhere
        owners = np.repeat(np.arange(len(boxes)), rng.integers(0, 4, len(boxes)))[:DETECTIONS]
        others = DETECTIONS - len(owners)
        near = boxes[owners]
        near[:, :2] += rng.normal(0, 0.07, (len(owners), 2)) * near[:, 2:]
        near[:, 2:] *= np.exp(rng.normal(0, 0.1, (len(owners), 2)))
        said = np.concatenate([classes[owners], 1 + rng.choice(CLASSES, others, p=FREQUENCY)])
        said = np.where(
            rng.random(DETECTIONS) < 0.8, said, rng.integers(1, CLASSES + 1, DETECTIONS)
        )
        scores = np.concatenate([rng.beta(4, 2, len(owners)), rng.beta(1, 8, others)])
        found = zip([*near, *boxes_of(rng, others)], said.tolist(), scores, strict=True)
        for box, category, score in found:
            mask = encoded(outline(rng, box))
            each = {"image_id": image, "category_id": category, "segmentation": mask}
            each |= {"bbox": np.float32(mask_util.toBbox(mask)).tolist()}
            results.append(each | {"score": float(np.float32(score))})
    truth: Json = {
        "images": [{"id": n, "height": HEIGHT, "width": WIDTH} for n in range(1, images + 1)],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    return truth, results


def ours(truth: Json, results: list[Json], kind: Kind) -> Json:
    return evaluate_results(truth, results, kind)


def theirs(truth: Json, results: list[Json], kind: Kind) -> Json:
    with contextlib.redirect_stdout(io.StringIO()):
        indexed: Any = COCO()
        indexed.dataset = truth
        indexed.createIndex()
        if kind == "segm":  # a result with a box would count by the box's size, as in detectron2
            for result in results:
                del result["bbox"]
        evaluator = COCOeval(indexed, indexed.loadRes(results), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(METRICS, map(float, evaluator.stats), strict=True))


SIDES = {"pycocotools": theirs, "ours": ours}


def difference(one: Json, other: Json) -> float:
    """Largest difference of two sets of metrics; theirs say -1 where ours say nan."""
    values = [
        [-1.0 if math.isnan(each[key]) else each[key] for key in METRICS] for each in (one, other)
    ]
    return float(np.abs(np.subtract(*values)).max())


def scored(images: int, repeat: int) -> list[str]:
    """Return the table of both sides' times."""
    stored = [json.dumps(part) for part in make(images)]
    megabytes = [len(text) / 1e6 for text in stored]
    seconds: dict[tuple[str, str], list[float]] = {}
    reading: list[float] = []
    worst, precision = 0.0, {}
    for _ in range(repeat):
        for kind in KINDS:
            found = {}
            for name, run in SIDES.items():
                began = time.process_time()
                truth, results = map(json.loads, stored)  # anew, because theirs changes them
                read = time.process_time()
                found[name] = run(truth, results, kind)
                seconds.setdefault((kind, name), []).append(time.process_time() - read)
                reading.append(read - began)
            worst = max(worst, difference(*found.values()))
            precision[kind] = 100 * found["ours"]["AP"]
    if worst > TOLERANCE:
        raise SystemExit(f"metrics differ by {worst}")
    table = Table("what", "whose", "AP", "s", "range", "images/s", "ratio", "range", left=2)
    for (kind, name), values in seconds.items():
        times, reference = Times(tuple(values)), Times(tuple(seconds[kind, "pycocotools"]))
        table.add(
            *(kind, name, f"{precision[kind]:.2f}", f"{times.median:.2f}", times.range()),
            f"{images / times.median:.0f}",
            *(f"{reference.ratio(times):.2f}", reference.ratio_range(times)),
        )
    notes = f"All metrics differ by at most {worst:.1g}. Not in the times: parsing json, "
    notes += f"{megabytes[0]:.0f} MB of annotations and {megabytes[1]:.0f} MB of results, "
    notes += f"{Times(tuple(reading)).median:.1f} s on either side."
    print(notes)
    return [*table.lines, "", notes]


def by_pycocotools(masks: np.ndarray) -> list[Json]:
    columns = np.ascontiguousarray(masks.view(np.uint8).transpose(0, 2, 1))
    found = mask_util.encode(columns.transpose(2, 1, 0))
    return [{"size": each["size"], "counts": each["counts"].decode("ascii")} for each in found]


def encoded_masks(repeat: int) -> list[str]:
    """Return the table of what becomes of an image's masks."""
    rng = np.random.default_rng(1)
    boxes = torch.from_numpy(boxes_of(rng, DETECTIONS)).float()
    boxes[:, 2:] += boxes[:, :2]
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 28)] * 2, indexing="ij")
    tilt = torch.from_numpy(rng.uniform(-0.5, 0.5, (DETECTIONS, 1, 1))).float()
    small = torch.sigmoid(8 * (0.8 - x**2 - y**2 + tilt * x * y))  # blobs, as a mask head's

    def pasted() -> torch.Tensor:
        return paste_masks_in_image(small, boxes, (HEIGHT, WIDTH))

    masks = pasted().numpy()
    if encode(masks) != by_pycocotools(masks):
        raise SystemExit("masks are not encoded as pycocotools does it")
    runs = {
        "pasting, detectron2": pasted,
        "encoding, pycocotools": lambda: by_pycocotools(masks),
        "encoding, ours": lambda: encode(masks),
    }
    times = in_turn(runs, repeat, clock=time.process_time)
    table = Table(f"{DETECTIONS} masks of {HEIGHT} x {WIDTH}", "ms", "range")
    for name, seen in times.items():
        table.add(name, f"{1e3 * seen.median:.1f}", seen.range(1e3, 1))
    return table.lines


def main() -> None:
    made = parser(__doc__, repeat=3, threads=1)
    made.add_argument("--images", type=int, default=5000)
    args = made.parse_args()
    quiet_dependencies()
    torch.set_num_threads(args.threads)
    lines = [*scored(args.images, args.repeat), "", *encoded_masks(10 * args.repeat)]
    if args.write:
        about = f"Scoring of {args.images} images with {DETECTIONS} detections each, and encoding "
        about += f"of their masks. CPU time, median of {args.repeat} rounds in turn; a ratio is\n"
        about += "pycocotools' time over this one's, round by round."
        write("evaluation", about, lines)


if __name__ == "__main__":
    main()
