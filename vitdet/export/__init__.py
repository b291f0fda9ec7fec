"""A trained detector as an ONNX file, written only if it finds what PyTorch finds."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import nn

from vitdet.export.graph import Graph, example_image, exportable, paste
from vitdet.utils.checks import InputError

OPSETS = range(17, 21)  # 17 has LayerNormalization; the exporter ends at 20
# A file of protocol buffers ends at 2 GiB; larger models keep their weights in a file beside it.
EXTERNAL_FROM = 2**31 - 2**26
# How far a file may be from the model: sides of a box in pixels, scores, 1 - IoU of two masks,
# numbers of a level of the backbone.
LIMITS = {"box": 0.5, "score": 1e-3, "mask": 0.01, "level": 1e-4}

Tensors = list[torch.Tensor]
Run = Callable[[torch.Tensor], Tensors]  # how a file is run: image in, outputs out


def export(
    model: nn.Module,
    out: Path,
    images: Tensors,
    *,
    part: str = "detector",
    size: tuple[int, int] | None = None,
    masks: str = "pasted",
    opset: int = OPSETS[0],
    about: Mapping[str, Any] | None = None,
) -> Report:
    """Write a model to an ONNX file that is proved to find what the model finds.

    Args:
        model: a built detector with its weights, on the CPU; it is put into evaluation mode.
        out: the file. Beside it `<out>.parity.json` is written, and `<out>.data` for the weights of
            a large model. Nothing is written unless the report has no faults.
        images: uint8 (3, H, W) in RGB, to compare on.
        part, size, masks: see `Graph`.
        opset: of ONNX, one of OPSETS.
        about: what the file's metadata says besides: class names, recipe, resize.

    Raises:
        InputError: a setting that does not suit the model, a package that is missing, images
            without an object.
        RuntimeError, OSError: an operator that ONNX does not have; a full disk. Of a file no part
            is left.
    """
    check_output(out)
    graph = Graph(model, part, size, masks)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        if graph.detector and not any(len(outputs_of(graph, image)[0]) for image in images):
            raise InputError(
                f"no object is found on the {len(images)} images to compare on, so that the file "
                "could not be proved. Give images with objects of its classes: --images FOLDER."
            )
        made = Path(folder) / out.name
        write(graph, made, example_image(graph), opset)
        _finish(made, _metadata(graph, part, about or {}))
        report = compare(graph, load(made), images)
        if not report.faults:
            kept = json.dumps({"limits": LIMITS, **asdict(report)}, indent=1)
            (Path(folder) / f"{out.name}.parity.json").write_text(f"{kept}\n", encoding="utf-8")
            out.with_name(f"{out.name}.data").unlink(missing_ok=True)  # of an export before
            for path in sorted(Path(folder).iterdir(), reverse=True):  # the file itself comes last
                if path.name.startswith(out.name):
                    path.replace(out.with_name(path.name))
    return report


def check_output(out: Path) -> None:
    """Raise an InputError for a file that cannot be made, or a missing package."""
    missing = " and ".join(name for name in ("onnx", "onnxruntime") if find_spec(name) is None)
    for wrong, text in (
        (missing, f"export: {missing} is not installed. Run `pip install onnx onnxruntime`."),
        (out.suffix != ".onnx", f"--out {out}: the name must end in .onnx."),
        (out.is_dir(), f"--out {out}: this is a folder. Name a file in it."),
        (not out.parent.is_dir(), f"--out {out}: no folder {out.parent}. Make it first."),
    ):
        if wrong:
            raise InputError(text)


def write(graph: Graph, path: Path, image: torch.Tensor, opset: int = OPSETS[0]) -> None:
    """Write the file as torch's exporter makes it, with an image to follow the graph with."""
    from torch.onnx import register_custom_op_symbolic, unregister_custom_op_symbolic

    axes: dict[str, dict[int, str]] = {}
    if graph.size is None:
        axes["image"] = {1: "height", 2: "width"}
    if graph.detector:
        axes |= {name: {0: "detections"} for name in graph.outputs}
        if graph.size is None and graph.masks == "pasted":
            axes["masks"] |= {1: "height", 2: "width"}
    elif graph.size is None:
        axes |= {name: {2: f"{name}_height", 3: f"{name}_width"} for name in graph.outputs}
    register_custom_op_symbolic("aten::mT", _transpose, opset)
    try:
        with exportable(graph), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # a branch that the tracer lost shows in the comparison
            with redirect_stdout(io.StringIO()):  # it prints the whole graph where it fails
                torch.onnx.export(
                    graph,
                    (image,),
                    str(path),
                    dynamo=False,
                    opset_version=opset,
                    input_names=["image"],
                    output_names=list(graph.outputs),
                    dynamic_axes=axes,
                )
    finally:
        unregister_custom_op_symbolic("aten::mT", opset)


def _transpose(g: Any, x: Any) -> Any:
    """Write `x.mT`, which the exporter does not know. Can go when it does."""
    rank = x.type().dim()
    return g.op("Transpose", x, perm_i=[*range(rank - 2), rank - 1, rank - 2])


def _finish(path: Path, about: Mapping[str, str]) -> None:
    """Write metadata into the file, and large weights beside it."""
    import onnx

    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, dict(about))
    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) >= EXTERNAL_FROM
    beside = {"save_as_external_data": True, "location": f"{path.name}.data"} if large else {}
    onnx.save_model(model, str(path), **beside)


def load(path: Path) -> Run:
    """Return how onnxruntime runs a file on the CPU; both raise InputError where it cannot."""
    import onnxruntime

    state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    errors = (state.Fail, state.InvalidArgument, state.RuntimeException, state.InvalidGraph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except errors as error:
        raise InputError(f"onnxruntime cannot take the file that torch wrote: {error}") from error

    def run(image: torch.Tensor) -> Tensors:
        try:
            found = session.run(None, {"image": image.numpy()})
        except errors as error:
            raise InputError(str(error)) from error
        return [torch.from_numpy(each) for each in found]

    return run


def _metadata(graph: Graph, part: str, about: Mapping[str, Any]) -> dict[str, str]:
    """Return what the file says of itself: {name: text or JSON}."""
    words = dict(about)
    words |= {"producer": "vitdet", "part": part}
    words["preprocessing"] = {
        "channels": "RGB",
        "range": [0, 255],
        "resize": words.pop("resize", ""),
        "largest": [graph.square] * 2 if graph.square else None,
        "inside": "mean, standard deviation and padding on the right and below",
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in words.items()}


# --- the comparison ------------------------------------------------------------------------------


@dataclass
class Report:
    """How a file differs from the model over all images.

    Attributes:
        sizes: (height, width) of each image.
        detections: of the model.
        matched: of these, found by both.
        at_the_edge: found by one alone, with a score where rounding decides which are the last.
        extra: the others that one alone found, none for an export that holds.
        largest: differences by name, see LIMITS.
        faults: what does not hold, as sentences.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    detections: int = 0
    matched: int = 0
    at_the_edge: int = 0
    extra: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def note(self, name: str, differences: torch.Tensor) -> None:
        """Take differences into the largest one of a name; nan, which is no number, stays."""
        before = differences.new_tensor([self.largest.get(name, 0.0)])
        self.largest[name] = float(torch.cat([differences.abs().flatten(), before]).max())


def compare(graph: Graph, run: Run, images: Tensors) -> Report:
    """Run a wrapped model's own code and a file of it on images (3, H, W)."""
    report = Report()
    for image in images:
        height, width = image.shape[-2:]
        report.sizes.append((height, width))
        try:
            found = run(image)
        except InputError as error:
            text = f"an image of {height}x{width} cannot be run: {str(error)[-200:]}"
            report.faults.append(text)
            continue
        compare_one = _compare_detections if graph.detector else _compare_levels
        compare_one(report, graph, outputs_of(graph, image), found)
    for name, value in report.largest.items():
        if not value <= LIMITS[name]:
            report.faults.append(f"largest {name} difference {value:.3g} > {LIMITS[name]:g}")
    if report.extra:
        report.faults.append(f"detections of one alone {report.extra} > 0")
    if not report.largest and not report.faults:
        report.faults.append("nothing was found on any image, so nothing was compared")
    return report


@torch.no_grad()
def outputs_of(graph: Graph, image: torch.Tensor) -> Tensors:
    """Return what the model's own code finds, or its levels."""
    model: Any = graph.model
    bgr = getattr(model, "input_format", "RGB") == "BGR"
    record = {"image": image.flip(0) if bgr else image}
    if not graph.detector:
        features = model.backbone(model.preprocess_image([record]).tensor)
        return [features[name] for name in graph.outputs]
    found = model([record])[0]["instances"]
    parts = [found.pred_boxes.tensor, found.scores, found.pred_classes]
    return [*parts, found.pred_masks] if found.has("pred_masks") else parts


def _compare_levels(report: Report, _: Graph, wanted: Tensors, found: Tensors) -> None:
    for ours, theirs in zip(wanted, found, strict=True):
        if ours.shape == theirs.shape:
            report.note("level", ours - theirs)
        else:
            report.faults.append(f"a level is {tuple(theirs.shape)} and not {tuple(ours.shape)}")


def _compare_detections(report: Report, graph: Graph, wanted: Tensors, found: Tensors) -> None:
    pairs = match(wanted, found)
    report.detections += len(wanted[0])
    report.matched += len(pairs)
    # below the threshold, or the last of a full list, rounding decides
    full = [float(scores.min()) for scores in (wanted[1], found[1]) if len(scores) >= graph.most]
    edge = max([graph.threshold, *full]) + LIMITS["score"]
    for side, scores in enumerate((wanted[1], found[1])):
        alone = set(range(len(scores))) - {pair[side] for pair in pairs}
        # not `score > edge`: a score that is no number is no excuse
        extra = sum(not float(scores[place]) <= edge for place in alone)
        report.extra += extra
        report.at_the_edge += len(alone) - extra
    if not pairs:
        return
    first, second = (torch.tensor(each) for each in zip(*pairs, strict=True))
    report.note("box", wanted[0][first] - found[0][second])
    report.note("score", wanted[1][first] - found[1][second])
    if graph.masks == "none":
        return
    ours, theirs = wanted[3][first], found[3][second]
    if graph.masks == "boxes":
        theirs = paste(theirs, found[0][second], (ours.shape[-2], ours.shape[-1]))
    either, apart = (ours | theirs).flatten(1).sum(1), (ours ^ theirs).flatten(1).sum(1)
    # one pixel may differ whatever the size: 0.5 is rounded to either side
    report.note("mask", torch.where(apart > 1, apart / either, 0.0))


def match(wanted: Tensors, found: Tensors) -> list[tuple[int, int]]:
    """Return pairs of places of the same detection in both lists (boxes, scores, classes, ...).

    In the order of falling scores each of `wanted` takes what overlaps it most, at least half,
    among those of its class that are left; so ties in another order still find each other.
    """
    overlap = pairwise_iou(Boxes(wanted[0]), Boxes(found[0]))
    overlap = torch.where(wanted[2][:, None] == found[2][None], overlap, -1.0)
    pairs = []
    for place in wanted[1].argsort(descending=True, stable=True).tolist() if len(found[0]) else ():
        best, other = overlap[place].max(0)
        if best >= 0.5:
            pairs.append((place, int(other)))
            overlap[:, int(other)] = -1.0
    return pairs


def table(report: Report) -> list[str]:
    """Return the report as lines to read."""
    sizes = [f"{height}x{width}" for height, width in dict.fromkeys(report.sizes)]
    more = ", ..." if len(sizes) > 4 else ""
    lines = [f"images               {len(report.sizes)} ({', '.join(sizes[:4])}{more})"]
    if report.detections:
        lines.append(
            f"detections           {report.detections}, {report.matched} found by both, "
            f"{report.at_the_edge} at the edge, {report.extra} by one alone"
        )
    for name, value in report.largest.items():
        lines.append(f"{f'{name} difference':<20} {value:.2e} (limit {LIMITS[name]:g})")
    return [*lines, *(f"does not hold        {fault}" for fault in report.faults)]
