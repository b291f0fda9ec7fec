"""`vitdet export`: a trained detector as a file for another runtime, compared with PyTorch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.data import transforms as T
from omegaconf import DictConfig

from vitdet.app.options import add_weights_arguments, file_options
from vitdet.config import config_text
from vitdet.data.shapes import draw_image
from vitdet.export import run as exporting
from vitdet.export.formats import FORMATS, OPSETS
from vitdet.export.graphs import MASKS
from vitdet.export.parity import table
from vitdet.predict.inputs import image_files, open_inputs
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import fail

_DRAWN = ((256, 256), (192, 256), (256, 160), (256, 192), (160, 256))  # sizes of drawn images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_weights_arguments(parser)
    parser.add_argument("--format", required=True, choices=list(FORMATS))
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=", ".join(f"{kind.suffix} for {name}" for name, kind in FORMATS.items()),
    )
    parser.add_argument(
        "--part",
        choices=exporting.PARTS,
        default="detector",
        help="the whole detector, or backbone and pyramid alone (default detector)",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="one size for all images"
    )
    sizes.add_argument(
        "--dynamic", action="store_true", help="images of any size (this is the default)"
    )
    parser.add_argument(
        "--masks",
        choices=MASKS,
        default="pasted",
        help="in the image, as probabilities inside the boxes, or none (default pasted)",
    )
    parser.add_argument(
        "--input",
        choices=list(exporting.INPUTS),
        default="uint8",
        help="numbers of the image, 0 to 255 (default uint8)",
    )
    parser.add_argument(
        "--opset", type=int, default=OPSETS[0], help=f"of ONNX (default {OPSETS[0]})"
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="to compare on; left out: drawn ones"
    )
    parser.add_argument("--num-images", type=int, default=5, metavar="N", help="(default 5)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe"
    )


def run(args: argparse.Namespace) -> int:
    """Export and print the report; return 0, or 1 when the file differs from the model.

    Raises:
        InputError: a wrong option, weights or images that cannot be used.
    """
    settings = exporting.Settings(
        format=args.format,
        part=args.part,
        size=tuple(args.size) if args.size else None,
        masks=args.masks,
        input=args.input,
        opset=args.opset,
    )
    exporting.check_settings(settings, args.out)
    predictor = Predictor.from_checkpoint(
        args.weights, **file_options(args), overrides=args.overrides, device="cpu"
    )
    images = comparison_images(predictor, args.images, args.num_images, settings.size)
    origin = origin_of(predictor, args.weights)
    report = exporting.export(predictor.detector, args.out, settings, images, origin)
    lines = table(report, args.part == "detector")
    if report.holds:
        megabytes = sum(path.stat().st_size for path in _files(args.out)) / 2**20
        lines.append(f"written              {args.out} ({megabytes:.1f} MiB)")
    else:
        lines.append(f"not written          {args.out}; see {args.out}.failed.parity.json")
        if not report.detections and args.part == "detector":
            lines.append("Give images with objects of its classes: --images FOLDER.")
    print("\n".join(lines))
    return 0 if report.holds else 1


def _files(out: Path) -> Iterator[Path]:
    yield from (path for path in (out, out.with_name(f"{out.name}.data")) if path.exists())


def origin_of(predictor: Predictor, weights: Path) -> exporting.Origin:
    """Return what the file is to say of its model."""
    recipe, resize = "", ""
    if isinstance(predictor.cfg, DictConfig):
        recipe = config_text(predictor.cfg)
        resize = json.dumps(yaml.safe_load(recipe)["dataloader"]["test"]["mapper"]["augmentations"])
    return exporting.Origin(predictor.class_names, recipe, resize, weights.name)


def comparison_images(
    predictor: Predictor, folder: Path | None, count: int, size: tuple[int, int] | None
) -> list[torch.Tensor]:
    """Return images to compare on, as the model gets them: uint8 (3, H, W) in RGB.

    Args:
        predictor: resizes by the recipe's rule where there is no size.
        folder: of image files, or one of them; None to draw some.
        count: how many, at most.
        size: (height, width) that all are fitted into, the rest black.

    Raises:
        InputError: no image, or one that cannot be read.
    """
    if count < 1:
        fail("--num-images", expected="1 or more", got=count, remedy="Correct it.")
    if folder is None:
        found = _drawn(count)
    else:
        given = image_files(folder)[:count] if folder.is_dir() else folder
        found = (picture.pixels() for picture in islice(open_inputs(given).pictures, count))
    images = []
    for pixels in found:
        resized = _resized(predictor, pixels) if size is None else _fitted(pixels, size)
        images.append(torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))))
    return images


def _drawn(count: int) -> Iterator[np.ndarray]:
    """Yield drawn images (H, W, 3) of different shapes."""
    for number in range(count):
        height, width = _DRAWN[number % len(_DRAWN)]
        yield draw_image("test", number, size=max(height, width))[0][:height, :width]


def _resized(predictor: Predictor, pixels: np.ndarray) -> np.ndarray:
    given: Any = T.AugInput(np.ascontiguousarray(pixels))
    predictor.augmentations(given)
    return given.image


def _fitted(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    new = (max(1, round(height * scale)), max(1, round(width * scale)))
    resized = T.ResizeTransform(height, width, *new).apply_image(np.ascontiguousarray(pixels))
    fitted = np.zeros((*size, 3), np.uint8)
    fitted[: new[0], : new[1]] = resized
    return fitted
