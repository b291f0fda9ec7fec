"""An export from beginning to end: follow, write, run, compare, and only then put into place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from vitdet.export.example import example_image
from vitdet.export.formats import (
    EXTERNAL_FROM,
    FORMATS,
    OPSETS,
    Order,
    check_packages,
    quiet,
    run_errors,
)
from vitdet.export.graphs import MASKS, Graph, exportable, graph_of
from vitdet.export.parity import Limits, Report, compare
from vitdet.utils.checks import fail
from vitdet.utils.files import write_text

PARTS = ("detector", "backbone")
INPUTS = {"uint8": torch.uint8, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """What to export, and as what.

    Attributes:
        format: name in `formats.FORMATS`.
        part: "detector", or "backbone" for backbone and pyramid.
        size: (height, width) of all images; None for any size.
        masks: of a detector: "pasted", "boxes" or "none", see `graphs.Detector`.
        input: type of the image's numbers, 0 to 255: "uint8" or "float32".
        opset: of ONNX.
        external_from: bytes of weights from which on an ONNX file keeps them beside it.
    """

    format: str
    part: str = "detector"
    size: tuple[int, int] | None = None
    masks: str = "pasted"
    input: str = "uint8"
    opset: int = 17
    external_from: int = EXTERNAL_FROM


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: the part of a file's note that no model knows.

    Attributes:
        class_names: in the order of the classes; empty if unknown.
        recipe: as YAML text.
        resize: how images are resized before the model, as the recipe has it.
        weights: name of the weights file.
    """

    class_names: Sequence[str] = ()
    recipe: str = ""
    resize: str = ""
    weights: str = ""


def export(
    model: nn.Module,
    out: Path,
    settings: Settings,
    images: list[torch.Tensor],
    origin: Origin | None = None,
    limits: Limits | None = None,
) -> Report:
    """Write a model to a file that is proved to find what the model finds.

    Args:
        model: a built detector with its weights, on the CPU.
        out: the file. Beside it `<out>.parity.json` is written, and `<out>.data` for the weights of
            a large ONNX model. Nothing stands at `out` unless the report holds; otherwise
            `<out>.failed.parity.json` tells why, and what stood at `out` before is untouched.
        settings: what to export.
        images: uint8 (3, H, W) in RGB, to compare on.
        origin: see there.
        limits: of the comparison.

    Returns:
        The report. Check `holds`.

    Raises:
        InputError: a setting that does not suit the model, a package that is missing, an image of
            another size, operators that a format does not have.
    """
    check_settings(settings, out)
    was_training, device = model.training, next(model.parameters()).device
    if device.type != "cpu":
        fail("model to export", expected="on the CPU", got=str(device), remedy="Move it there.")
    kind = FORMATS[settings.format]
    try:
        late = settings.format == "torch-export"
        graph = graph_of(model, settings.part, settings.size, masks=settings.masks, late=late)
        _check_size(graph, settings, images)
        images = [image.to(INPUTS[settings.input]) for image in images]
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            made = Path(folder) / out.name
            example = example_image(graph, INPUTS[settings.input])
            note = note_of(graph, settings, origin or Origin())
            with exportable(model):
                order = Order(example, note, settings.opset, settings.external_from)
                kind.write(graph.eval(), made, order)
            model.eval()
            with quiet():
                errors = run_errors(settings.format)
                run = kind.load(made)
                report = compare(model, graph, run, images, limits or Limits(), errors)
            _finish(made, out, report)
    finally:
        model.train(was_training)
    return report


def check_settings(settings: Settings, out: Path) -> None:
    """Raise an InputError for a wrong word, a missing package, or a name of another format."""
    words = (
        ("--format", settings.format, tuple(FORMATS)),
        ("--part", settings.part, PARTS),
        ("--masks", settings.masks, MASKS),
        ("--input", settings.input, tuple(INPUTS)),
    )
    for what, word, known in words:
        if word not in known:
            expected = f"one of {', '.join(known)}"
            fail(what, expected=expected, got=repr(word), remedy="Take one of these.")
    if settings.opset not in OPSETS:
        expected = f"{OPSETS[0]} to {OPSETS[-1]}"
        fail("--opset", expected=expected, got=settings.opset, remedy="Take one of these.")
    suffix = FORMATS[settings.format].suffix
    if out.suffix != suffix:
        got = out.suffix or "no suffix"
        fail(f"--out {out}", expected=f"a name in {suffix}", got=got, remedy="Rename it.")
    if not out.parent.is_dir():
        remedy = f"Create it first: mkdir -p {out.parent}"
        fail(f"folder of {out}", expected="an existing folder", got="none", remedy=remedy)
    check_packages(settings.format)


def _check_size(graph: Graph, settings: Settings, images: list[torch.Tensor]) -> None:
    if settings.size is None and not graph.square and not FORMATS[settings.format].any_size:
        fail(
            f"--format {settings.format}",
            expected="one size of images, or a model that pads them to a square",
            got="any size, and model.backbone.square_pad=0",
            remedy="Add --size HEIGHT WIDTH.",
        )
    if settings.size is None and not graph.any_size:
        fail(
            "export of this backbone",
            expected="one size of images, or a model that pads them to a square",
            got="any size, and model.backbone.square_pad=0",
            remedy="Add --size HEIGHT WIDTH, which a Vision Longformer lays its chunks out for.",
        )
    if settings.size is not None and min(settings.size) < 1:
        got = f"{settings.size[0]} x {settings.size[1]}"
        fail("--size", expected="HEIGHT and WIDTH in pixels", got=got, remedy="Correct it.")
    for image in images:
        size = (image.shape[-2], image.shape[-1])
        if settings.size not in (None, size) or (graph.square and max(size) > graph.square):
            most = f"at most {graph.square} x {graph.square}" if graph.square else "any size"
            expected = most if settings.size is None else "{} x {}".format(*settings.size)
            fail(
                "image to compare on",
                expected=expected,
                got=f"{size[0]} x {size[1]}",
                remedy="Resize it first.",
            )


def note_of(graph: Graph, settings: Settings, origin: Origin) -> dict[str, str]:
    """Return what a file says of itself: {name: text or JSON}."""
    size = settings.size or ("height", "width")
    layout: dict[str, Any] = {"image": {"shape": [3, *size], "type": settings.input}}
    preprocessing = {
        "channels": "RGB",
        "range": [0, 255],
        "resize": origin.resize,
        "largest": [graph.square, graph.square] if graph.square else None,
        "inside": "mean, standard deviation and padding on the right and below",
        "mean": graph.model.pixel_mean.flatten().tolist(),
        "std": graph.model.pixel_std.flatten().tolist(),
        "padded_to": f"{graph.square} square" if graph.square else f"multiples of {graph.stride}",
    }
    note: dict[str, Any] = {
        "producer": f"vitdet {_version()}",
        "part": settings.part,
        "input": layout,
        "outputs": {name: _MEANINGS.get(name, _LEVEL) for name in graph.outputs},
        "preprocessing": preprocessing,
        "class_names": list(origin.class_names),
        "weights": origin.weights,
        "recipe": origin.recipe,
    }
    if getattr(graph, "masks", "") == "boxes":
        note["outputs"]["masks"] = "(N, M, M) probabilities inside the boxes"
    return {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in note.items()
    }


_LEVEL = "(1, C, H, W) level of the pyramid"
_MEANINGS = {
    "boxes": "(N, 4) XYXY in pixels of the input",
    "scores": "(N,) falling",
    "classes": "(N,) number in class_names",
    "masks": "bool (N, height, width)",
}


def _version() -> str:
    try:
        return metadata.version("vitdet")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "(not installed)"


def _finish(made: Path, out: Path, report: Report) -> None:
    """Put the files into place, or only the report of what does not hold."""
    failed = out.with_name(f"{out.name}.failed.parity.json")
    text = json.dumps(report.plain(), indent=1) + "\n"
    if not report.holds:
        write_text(failed, text)
        return
    data = made.with_name(f"{made.name}.data")
    if data.exists():
        data.replace(out.with_name(data.name))
    else:  # one of an export before does not belong to this file
        out.with_name(data.name).unlink(missing_ok=True)
    made.replace(out)
    failed.unlink(missing_ok=True)
    write_text(out.with_name(f"{out.name}.parity.json"), text)
