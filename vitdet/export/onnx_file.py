"""An export from beginning to end: follow, write, run, compare, and only then put into place."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from vitdet.export.graph import Graph, example_image, exportable
from vitdet.export.parity import LIMITS, Report, Run, compare, outputs_of
from vitdet.utils.checks import InputError

OPSETS = range(17, 21)  # 17 has LayerNormalization; the exporter ends at 20
# A file of protocol buffers ends at 2 GiB; larger models keep their weights in a file beside it.
EXTERNAL_FROM = 2**31 - 2**26


def export(
    model: nn.Module,
    out: Path,
    images: list[torch.Tensor],
    *,
    part: str = "detector",
    size: tuple[int, int] | None = None,
    masks: str = "pasted",
    opset: int = OPSETS[0],
    about: Mapping[str, Any] | None = None,
) -> Report:
    """Write a model to an ONNX file that is proved to find what the model finds.

    Args:
        model: a built detector with its weights, on the CPU.
        out: the file. Beside it `<out>.parity.json` is written, and `<out>.data` for the weights of
            a large model. Nothing is written at `out` unless the report has no faults; otherwise
            `<out>.failed.parity.json` tells why.
        images: uint8 (3, H, W) in RGB, to compare on.
        part, size, masks: see `Graph`.
        opset: of ONNX.
        about: what the file's metadata says besides: class names, recipe.

    Raises:
        InputError: a setting that does not suit the model, a package that is missing, images
            without an object, operators that ONNX does not have, a full disk.
    """
    check_output(out, opset, size)
    was_training = model.training
    try:
        graph = Graph(model.eval(), part, size, masks)
        with _quiet(), TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            if graph.detector and not any(len(outputs_of(graph, x)[0]) for x in images):
                raise InputError(
                    f"no object is found on the {len(images)} images to compare on, so that the "
                    "file could not be proved. Give images with objects of its classes: --images "
                    "FOLDER."
                )
            made = Path(folder) / out.name
            write(graph, made, example_image(graph), opset)
            _finish(made, _metadata(graph, part, about or {}))
            report = compare(graph, load(made), images)
            about = {"holds": not report.faults, "limits": LIMITS, **asdict(report)}
            _put(made, out, json.dumps(about, indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or error
        text = f"--out {out}: it cannot be written ({reason}). Make space, or choose another folder"
        raise InputError(f"{text}.") from error
    finally:
        model.train(was_training)
    return report


def check_output(out: Path, opset: int, size: tuple[int, int] | None = None) -> None:
    """Raise an InputError for a file that cannot be made, a wrong number, or a missing package."""
    missing = " and ".join(name for name in ("onnx", "onnxruntime") if find_spec(name) is None)
    numbers = " ".join(map(str, size or ()))
    for wrong, text in (
        (missing, f"export: {missing} is not installed. Run `pip install onnx onnxruntime`."),
        (out.suffix != ".onnx", f"--out {out}: the name must end in .onnx."),
        (out.is_dir(), f"--out {out}: this is a folder. Name a file in it."),
        (not out.parent.is_dir(), f"--out {out}: no folder {out.parent}. Make it first."),
        (opset not in OPSETS, f"--opset {opset}: {OPSETS[0]} to {OPSETS[-1]} can be written."),
        (size and min(size) < 1, f"--size {numbers}: HEIGHT and WIDTH are pixels, 1 or more."),
    ):
        if wrong:
            raise InputError(text)


def write(graph: Graph, path: Path, image: torch.Tensor, opset: int = OPSETS[0]) -> None:
    """Write the file as torch's exporter makes it, with an image to follow the graph with.

    Raises:
        InputError: the model has an operator that ONNX cannot have.
    """
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
        # It prints the whole graph where it fails.
        with exportable(graph), _quiet(), torch.no_grad(), redirect_stdout(io.StringIO()):
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
    except torch.onnx.OnnxExporterError as error:
        text = f"the model has an operator that ONNX cannot have ({str(error)[:400]})."
        raise InputError(text) from error
    finally:
        unregister_custom_op_symbolic("aten::mT", opset)


def _transpose(g: Any, x: Any) -> Any:
    """Write `x.mT`, which the exporter does not know. Can go when it does."""
    rank = x.type().dim()
    return g.op("Transpose", x, perm_i=[*range(rank - 2), rank - 1, rank - 2])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter; a branch that the tracer lost shows in the comparison."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _finish(path: Path, about: Mapping[str, str]) -> None:
    """Write metadata into the file, and large weights beside it. Standard operators only."""
    import onnx

    model = onnx.load(str(path))
    if others := sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"}):
        raise InputError(
            f"the ONNX file would need operators of {', '.join(others)}, which not every runtime "
            "has. Export --part backbone."
        )
    onnx.helper.set_model_props(model, dict(about))
    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) >= EXTERNAL_FROM
    beside = {"save_as_external_data": True, "location": f"{path.name}.data"} if large else {}
    onnx.save_model(model, str(path), **beside)
    onnx.checker.check_model(str(path), full_check=False)


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

    def run(image: torch.Tensor) -> list[torch.Tensor]:
        try:
            found = session.run(None, {"image": image.numpy()})
        except errors as error:
            raise InputError(str(error)) from error
        return [torch.from_numpy(each) for each in found]

    return run


def _metadata(graph: Graph, part: str, about: Mapping[str, Any]) -> dict[str, str]:
    """Return what the file says of itself: {name: text or JSON}."""
    square = graph.square
    whole = "bool (N, height, width)"
    meanings = {
        "boxes": "(N, 4) XYXY in pixels of the input",
        "scores": "(N,) falling",
        "classes": "(N,) place in class_names and category_ids",
        "masks": "(N, M, M) probabilities in the boxes" if graph.masks == "boxes" else whole,
    }
    preprocessing = {
        "channels": "RGB",
        "range": [0, 255],
        "resize": about.get("resize", ""),
        "largest": [square, square] if square else None,
        "inside": "mean, standard deviation and padding on the right and below",
        "mean": graph.model.pixel_mean.flatten().tolist(),
        "std": graph.model.pixel_std.flatten().tolist(),
        "padded_to": f"{square} square" if square else f"multiples of {graph.stride}",
    }
    words = {
        "producer": f"vitdet {_version()}",
        "part": part,
        "input": {"image": {"shape": [3, *(graph.size or ("height", "width"))], "type": "uint8"}},
        "outputs": {name: meanings.get(name, "(1, C, H, W) level") for name in graph.outputs},
        "preprocessing": preprocessing,
        **{name: value for name, value in about.items() if name != "resize"},
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in words.items()}


def _version() -> str:
    try:
        return metadata.version("vitdet")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "(not installed)"


def _put(made: Path, out: Path, report: str) -> None:
    """Put the files into place, or only the report of what does not hold."""
    failed, text = out.with_name(f"{out.name}.failed.parity.json"), made.with_name("report")
    text.write_text(report, encoding="utf-8")  # while a full disk costs nothing
    if json.loads(report)["faults"]:
        text.replace(failed)
        return
    data = made.with_name(f"{made.name}.data")
    if data.exists():
        data.replace(out.with_name(data.name))
    else:  # one of an export before does not belong to this file
        out.with_name(data.name).unlink(missing_ok=True)
    made.replace(out)
    text.replace(out.with_name(f"{out.name}.parity.json"))
    failed.unlink(missing_ok=True)
