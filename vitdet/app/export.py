"""`vitdet export`: a trained detector as an ONNX file, compared with PyTorch."""

from __future__ import annotations

import argparse
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
from vitdet.export.graph import MASKS
from vitdet.export.onnx_file import OPSETS, PARTS, check_output, export
from vitdet.export.parity import table
from vitdet.predict.inputs import image_files, open_inputs
from vitdet.predict.loading import building
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import InputError

_DRAWN = ((256, 256), (192, 256), (256, 160), (256, 192), (160, 256))  # sizes of drawn images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_weights_arguments(parser)
    parser.add_argument("--format", default="onnx", help="onnx, the only one")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.onnx")
    parser.add_argument(
        "--part",
        choices=PARTS,
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
    if args.format != "onnx":
        raise InputError(f"--format {args.format}: ONNX is what can be written. Use --format onnx.")
    size = (args.size[0], args.size[1]) if args.size else None
    check_output(args.out, args.opset, size)
    predictor = Predictor.from_checkpoint(
        args.weights, **file_options(args), overrides=args.overrides, device="cpu"
    )
    images = comparison_images(predictor, args.images, args.num_images, size)
    with building(predictor.source):
        report = export(
            predictor.detector,
            args.out,
            images,
            part=args.part,
            size=size,
            masks=args.masks,
            opset=args.opset,
            about=about(predictor, args.weights),
        )
    lines = table(report, args.part == "detector")
    if report.holds:
        files = (args.out, args.out.with_name(f"{args.out.name}.data"))
        megabytes = sum(path.stat().st_size for path in files if path.exists()) / 2**20
        lines.append(f"written              {args.out} ({megabytes:.1f} MiB)")
    else:
        lines.append(f"not written          {args.out}; see {args.out}.failed.parity.json")
    print("\n".join(lines))
    return 0 if report.holds else 1


def about(predictor: Predictor, weights: Path) -> dict[str, Any]:
    """Return what the file is to say of its model."""
    recipe, resize = "", ""
    if isinstance(predictor.cfg, DictConfig):
        recipe = config_text(predictor.cfg)
        resize = yaml.safe_load(recipe)["dataloader"]["test"]["mapper"]["augmentations"]
    return {
        "class_names": list(predictor.class_names),
        "category_ids": list(predictor.class_ids),
        "recipe": recipe,
        "resize": resize,
        "weights": weights.name,
    }


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
        raise InputError(f"--num-images {count}: 1 or more are needed to compare on.")
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
