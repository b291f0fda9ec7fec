"""What test-time augmentation and slices gain: AP of a demo training's model on drawn images.

    python benchmarks/views.py RUN [--images 200] [--mosaics 3] [--write]

RUN is the output folder of `make demo`. Test-time augmentation looks at the held-out images as they
are, slices at mosaics of 8 x 8 of them, in which every object is an eighth of the size that the
model was trained for. All in float32. Seconds are of one process, and hold reading the images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Table, write

from vitdet import Predictor
from vitdet.config import instantiate
from vitdet.data.images import read_image
from vitdet.predict.augmentation import TestTimeAugmentation
from vitdet.predict.slicing import Slices
from vitdet.scores import evaluate_results
from vitdet.utils.checks import quiet_dependencies
from vitdet.utils.files import read_json
from vitdet.utils.run_lengths import decode, encode_patch, encode_segmentation

Json = dict[str, Any]
SIDE = 8  # images along a side of a mosaic
MAX_DETS = 1000  # an image of a mosaic's size has hundreds of objects
VIEWS = {
    "plain": None,
    "mirrored too": TestTimeAugmentation(),
    "1, 1.25": TestTimeAugmentation((1, 1.25), flip=False),
    "0.75, 1, 1.25, mirrored too": TestTimeAugmentation((0.75, 1, 1.25)),
    "1, 1.5, mirrored too": TestTimeAugmentation((1, 1.5)),
}


def slices_of(size: int) -> dict[str, Slices | None]:
    """Return the ways to cut a mosaic of images of `size` pixels."""
    return {
        "none": None,
        "overlap 0.25": Slices(size, 0.25),
        "overlap 0.25, not the whole image": Slices(size, 0.25, whole=False),
        "overlap 0.5": Slices(size, 0.5),
        "overlap 0, the images themselves": Slices(size, 0.0, whole=False),
    }


def mosaic(images: Sequence[np.ndarray], annotations: Sequence[list[Json]], number: int) -> Any:
    """Lay images out on a square; return it, its entry and its annotations in COCO's format.

    Args:
        images: uint8 (side, side, 3) each.
        annotations: of each, in COCO's format.
        number: id of the mosaic.
    """
    side = images[0].shape[0]
    whole = SIDE * side
    picture = np.zeros((whole, whole, 3), np.uint8)
    moved = []
    for place, (image, objects) in enumerate(zip(images, annotations, strict=True)):
        top, left = place // SIDE * side, place % SIDE * side
        picture[top : top + side, left : left + side] = image
        for each in objects:
            x, y, width, height = each["bbox"]
            mask = decode(encode_segmentation(each["segmentation"], (side, side)))
            lengths = encode_patch(mask, (top, left), (whole, whole))
            box = [x + left, y + top, width, height]
            moved.append({**each, "image_id": number, "bbox": box, "segmentation": lengths})
    return picture, {"id": number, "height": whole, "width": whole}, moved


def score(predictor: Predictor, images: dict[int, np.ndarray], truth: Json, most: int) -> list[str]:
    """Return box AP, mask AP and seconds as cells."""
    started = time.perf_counter()
    results = [found for number in images for found in predictor(images[number]).to_coco(number)]
    seconds = time.perf_counter() - started
    scores = [
        evaluate_results(truth, results, kind, most, image_ids=list(images))["AP"]
        for kind in ("bbox", "segm")
    ]
    return [*(f"{100 * each:.1f}" for each in scores), f"{seconds:.0f}"]


def tables(args: argparse.Namespace) -> list[str]:
    """Return both tables."""
    predictor = Predictor.from_checkpoint(
        args.run / "model_final.pth", device="cpu", precision="fp32", threshold=0.0
    )
    dataset = instantiate(predictor.cfg.dataloader.test.dataset)  # pyright: ignore
    truth = read_json(Path(dataset.json_file), dict)
    records = dataset.records[: args.images]
    images = {each["image_id"]: read_image(each, "RGB") for each in records}
    first = Table("views", "box AP", "mask AP", "s")
    for name, predictor.tta in VIEWS.items():
        first.add(name, *score(predictor, images, truth, 100))
    predictor.tta = None
    by_image: dict[int, list[Json]] = {number: [] for number in images}
    for each in truth["annotations"]:
        if each["image_id"] in by_image:
            by_image[each["image_id"]].append(each)
    pictures, entries, annotations = {}, [], []
    numbers = list(images)
    for number in range(min(args.mosaics, len(numbers) // SIDE**2)):
        part = numbers[number * SIDE**2 : (number + 1) * SIDE**2]
        made = mosaic([images[i] for i in part], [by_image[i] for i in part], number)
        pictures[number] = made[0]
        entries.append(made[1])
        annotations += made[2]
    whole = {"images": entries, "annotations": annotations, "categories": truth["categories"]}
    second = Table("slices", "box AP", "mask AP", "s")
    size = next(iter(images.values())).shape[0]
    for name, predictor.slices in slices_of(size).items():
        second.add(name, *score(predictor, pictures, whole, MAX_DETS))
    return [*first.lines, "", *second.lines]


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("run", type=Path, help="output folder of a demo training")
    made.add_argument("--images", type=int, default=200, metavar="N", help="held-out ones")
    made.add_argument("--mosaics", type=int, default=3, metavar="N")
    made.add_argument("--threads", type=int, default=2, help="of torch on the CPU")
    made.add_argument("--write", action="store_true", help="write benchmarks/results/")
    args = made.parse_args()
    quiet_dependencies()
    torch.set_num_threads(args.threads)
    lines = tables(args)
    if args.write:
        about = f"AP of the demo's model with several views, on {args.images} held-out images, and "
        about += f"in slices, on {args.mosaics} mosaics of {SIDE**2} of them, each resized to the "
        about += "size of one by the recipe. float32."
        write("views", about, lines)


if __name__ == "__main__":
    main()
