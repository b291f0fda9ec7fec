"""`vitdet export`: a trained detector as an ONNX file, compared with PyTorch."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import DictConfig
from PIL import Image, ImageOps

from vitdet.app.options import file_options
from vitdet.config import config_text
from vitdet.data.shapes import draw_image
from vitdet.export import check_output, export, table
from vitdet.predict.loading import building
from vitdet.predict.predictor import Predictor, find_files, open_inputs
from vitdet.utils.checks import InputError

_DRAWN = ((256, 256), (192, 256), (256, 160), (256, 192), (160, 256))  # sizes of drawn images


def run(args: argparse.Namespace) -> int:
    """Export and print the report; return 0, or 1 when the file differs from the model.

    Raises:
        InputError: a wrong option, weights or images that cannot be used.
    """
    check_output(args.out)
    size = tuple(args.size) if args.size else None
    predictor = Predictor.from_checkpoint(
        args.weights, **file_options(args), overrides=args.overrides, device="cpu"
    )
    images = comparison_images(predictor, args.images, args.num_images, size)
    options: dict[str, Any] = {"part": args.part, "masks": args.masks, "opset": args.opset}
    about = {"class_names": predictor.class_names, "category_ids": predictor.class_ids}
    about["weights"] = args.weights.name
    if predictor.threshold.found:
        about["thresholds"] = predictor.threshold.of(predictor.class_names)
    if isinstance(predictor.cfg, DictConfig):
        about["recipe"] = recipe = config_text(predictor.cfg)
        about["resize"] = yaml.safe_load(recipe)["dataloader"]["test"]["mapper"]["augmentations"]
    with building(str(args.weights)):
        report = export(predictor.detector, args.out, images, size=size, about=about, **options)
    print(*table(report), sep="\n")
    if report.faults:
        print(f"not written          {args.out}")
        return 1
    files = (args.out, args.out.with_name(f"{args.out.name}.data"))
    megabytes = sum(path.stat().st_size for path in files if path.exists()) / 2**20
    print(f"written              {args.out} ({megabytes:.1f} MiB)")
    return 0


def comparison_images(
    predictor: Predictor, given: Path | None, count: int, size: tuple[int, int] | None
) -> list[torch.Tensor]:
    """Return at most `count` images to compare on, as the model gets them: uint8 (3, H, W) RGB.

    They are those of a folder or drawn, resized by the recipe's rule, or fitted into a size
    (height, width), the rest black.
    """
    if count < 1:
        raise InputError(f"--num-images {count}: 1 or more are needed to compare on.")
    if given is None:
        sides = [_DRAWN[number % len(_DRAWN)] for number in range(count)]
        whole = [draw_image("test", number, size=256)[0] for number in range(count)]
        found = iter([image[:h, :w] for image, (h, w) in zip(whole, sides, strict=True)])
    else:
        found = (picture.pixels() for picture in open_inputs(find_files(given)[0])[1])
    images = []
    for pixels in islice(found, count):
        if size is None:
            images.append(predictor.model_input(pixels)["image"])
            continue
        fitted = ImageOps.pad(Image.fromarray(pixels), (size[1], size[0]), centering=(0, 0))
        images.append(torch.from_numpy(np.array(fitted).transpose(2, 0, 1).copy()))
    return images
