"""Time soft-NMS against its definition, one box after the other in Python's floats.

    python benchmarks/soft_nms.py [--boxes 1000] [--threads 1] [--repeat 10] [--write]

Both get the same boxes and scores (float32) in turn and answer in the same form; the answers are
compared before any time is taken. Times are processor time, the median of all turns: other programs
on the machine stretch the clock's time, and that of the longer run more. "spread" are boxes
anywhere in the image, "crowded" are boxes around 20 objects, as a detector proposes them;
"80 classes" gives each box a class at random.
"""

from __future__ import annotations

import math
import time
from functools import partial

import torch
from common import Table, in_turn, parser, write

from vitdet.postprocess import soft_nms

IOU_THRESHOLD, SIGMA, MIN_SCORE = 0.6, 0.5, 1e-3
Answer = tuple[torch.Tensor, torch.Tensor]


def by_definition(
    boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor | None, method: str
) -> Answer:
    corners, values = boxes.double().tolist(), scores.double().tolist()
    labels = [0] * len(values) if classes is None else classes.tolist()
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in corners]
    left = list(range(len(values)))
    kept = []
    while left:
        best = max(left, key=lambda i: (values[i], -i))
        left.remove(best)
        kept.append(best)
        x1, y1, x2, y2 = corners[best]
        for i in left:
            if labels[i] != labels[best]:
                continue
            a1, b1, a2, b2 = corners[i]
            width, height = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
            if width <= 0 or height <= 0:
                continue
            iou = width * height / (areas[i] + areas[best] - width * height)
            if method == "gaussian":
                values[i] *= math.exp(-iou * iou / SIGMA)
            elif iou >= IOU_THRESHOLD:
                values[i] *= 1 - iou if method == "linear" else 0.0
    kept = [i for i in kept if values[i] >= MIN_SCORE]
    return torch.tensor(kept), torch.tensor([values[i] for i in kept], dtype=scores.dtype)


def ours(
    boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor | None, method: str
) -> Answer:
    return soft_nms(
        boxes,
        scores,
        classes,
        method=method,  # type: ignore[arg-type]
        iou_threshold=IOU_THRESHOLD,
        sigma=SIGMA,
        min_score=MIN_SCORE,
    )


def inputs(kind: str, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    if kind == "crowded":
        objects = torch.randint(20, (count,), generator=generator)
        corners = 1000 * torch.rand(20, 2, generator=generator)[objects]
        sides = (50 + 200 * torch.rand(20, 2, generator=generator))[objects]
        corners = corners + 10 * torch.randn(count, 2, generator=generator)
        sides = sides * (1 + 0.1 * torch.rand(count, 2, generator=generator))
    else:
        corners = 1000 * torch.rand(count, 2, generator=generator)
        sides = 200 * torch.rand(count, 2, generator=generator)
    classes = torch.randint(80, (count,), generator=generator) if kind == "80 classes" else None
    boxes = torch.cat([corners, corners + sides], 1)
    return boxes, torch.rand(count, generator=generator), classes


def main() -> None:
    made = parser(__doc__, repeat=10, threads=1)
    made.add_argument("--boxes", type=int, default=1000)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("boxes", "f", "kept", "definition, ms", "ours, ms", "ratio", left=2)
    for kind in ("spread", "crowded", "80 classes"):
        for method in ("linear", "gaussian", "hard"):
            given = (*inputs(kind, args.boxes), method)
            expected, got = by_definition(*given), ours(*given)
            if not torch.equal(expected[0], got[0]):
                raise SystemExit(f"{kind}, {method}: other boxes than by the definition")
            torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=0)
            todo = {"slow": partial(by_definition, *given), "fast": partial(ours, *given)}
            slow, fast = in_turn(todo, args.repeat, clock=time.process_time).values()
            times = (f"{1e3 * slow.median:.0f}", f"{1e3 * fast.median:.1f}")
            table.add(kind, method, len(got[0]), *times, f"{slow.ratio(fast):.0f}")
    if args.write:
        about = f"Soft-NMS of {args.boxes} boxes, processor time, median of {args.repeat} turns, "
        write("soft_nms", about + "same answers.", table.lines)


if __name__ == "__main__":
    main()
