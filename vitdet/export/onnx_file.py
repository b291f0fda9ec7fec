"""An export from beginning to end: follow, write, run, compare, and only then put into place."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from vitdet.export.graph import Detector, Graph, example_image, exportable, graph_of
from vitdet.export.parity import Report, Run, compare, detections
from vitdet.utils.checks import InputError

OPSETS = range(17, 21)  # 17 has LayerNormalization; the exporter ends at 20
PARTS = ("detector", "backbone")
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
            a large model. Nothing is written at `out` unless the report holds; otherwise
            `<out>.failed.parity.json` tells why.
        images: uint8 (3, H, W) in RGB, to compare on.
        part: "detector", or "backbone" for backbone and pyramid.
        size: (height, width) of all images; None for any size.
        masks: of a detector: "pasted", "boxes" or "none", see `graph.Detector`.
        opset: of ONNX.
        about: what the file's metadata says besides: class names, recipe.

    Returns:
        The report. Check `holds`.

    Raises:
        InputError: a setting that does not suit the model, a package that is missing, an image of
            another size, images without an object, operators that ONNX does not have, a disk that
            takes nothing more: no part of the file is left then.
    """
    check_output(out, opset, size)
    was_training = model.training
    try:
        graph = graph_of(model.eval(), part, size, masks)
        _check_images(graph, images)
        with _quiet(), TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            made = Path(folder) / out.name
            write(graph, made, example_image(graph), opset)
            _finish(made, _metadata(graph, part, about or {}))
            report = compare(model, graph, load(made), images)
            text = json.dumps(report.plain(), indent=1) + "\n"
            _put(made, out, text, holds=report.holds)
    except OSError as error:
        raise InputError(
            f"--out {out}: it cannot be written ({error.strerror or error}). Make space, or choose "
            "another folder."
        ) from error
    finally:
        model.train(was_training)
    return report


def check_output(out: Path, opset: int, size: tuple[int, int] | None = None) -> None:
    """Raise an InputError for a file that cannot be made, a wrong number, or a missing package."""
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"an export needs {' and '.join(missing)}, which is not installed. "
            "Run `pip install onnx onnxruntime`."
        )
    if out.suffix != ".onnx":
        raise InputError(f"--out {out}: the name must end in .onnx.")
    if out.is_dir():
        raise InputError(f"--out {out}: this is a folder. Name a file in it.")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no folder {out.parent}. Make it first.")
    if opset not in OPSETS:
        raise InputError(f"--opset {opset}: {OPSETS[0]} to {OPSETS[-1]} can be written.")
    if size is not None and min(size) < 1:
        raise InputError(f"--size {size[0]} {size[1]}: HEIGHT and WIDTH are pixels, 1 or more.")


def _check_images(graph: Graph, images: list[torch.Tensor]) -> None:
    for image in images:
        height, width = image.shape[-2:]
        if graph.size not in (None, (height, width)):
            raise InputError(f"image to compare on: {height} x {width} is not {graph.size}.")
        if graph.square and max(height, width) > graph.square:
            raise InputError(
                f"image to compare on: {height} x {width} does not fit into {graph.square} x "
                f"{graph.square} (model.backbone.square_pad). Resize it first."
            )
    if isinstance(graph, Detector):
        with torch.no_grad(), _quiet():
            if not any(len(detections(graph.model, image)[0]) for image in images):
                raise InputError(
                    f"no object is found on the {len(images)} images to compare on, so that the "
                    "file could not be proved. Give images with objects of its classes: --images "
                    "FOLDER."
                )


def write(graph: Graph, path: Path, image: torch.Tensor, opset: int = OPSETS[0]) -> None:
    """Write the file as torch's exporter makes it.

    Args:
        graph: the wrapper.
        path: the file.
        image: to follow the graph with, see `example_image`.
        opset: of ONNX.

    Raises:
        InputError: the model has an operator that ONNX cannot have.
    """
    from torch.onnx import register_custom_op_symbolic, unregister_custom_op_symbolic

    axes: dict[str, dict[int, str]] = {}
    if graph.size is None:
        axes["image"] = {1: "height", 2: "width"}
    if isinstance(graph, Detector):
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
        raise InputError(
            f"the model has an operator that ONNX cannot have ({str(error)[:400]})."
        ) from error
    finally:
        unregister_custom_op_symbolic("aten::mT", opset)


def _transpose(g: Any, x: Any) -> Any:
    """Write `x.mT`, which the exporter does not know. Can go when it does."""
    rank = x.type().dim()
    order = [*range(rank - 2), rank - 1, rank - 2]
    return g.op("Transpose", x, perm_i=order)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says of itself and of code that we have looked at.

    Every export is compared with PyTorch afterwards, so a branch that the tracer lost shows.
    """
    with warnings.catch_warnings():
        # Python branches on sizes: `example_image` chooses sizes that take the general branch.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+. is deprecated")
        # The tracer's exporter, which takes any size, in favour of the one on torch.export.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.onnx")
        warnings.filterwarnings("ignore", message=r".*legacy TorchScript-based ONNX export")
        # That it folds no constants somewhere, and that indices must not be negative: none is.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")
        # detectron2's anchors
        warnings.filterwarnings("ignore", message=r"torch\.meshgrid: in an upcoming release")
        yield


def _finish(path: Path, about: Mapping[str, str]) -> None:
    """Write metadata into the file, and large weights beside it. Standard operators only."""
    import onnx

    model = onnx.load(str(path))
    _check_operators(model)
    onnx.helper.set_model_props(model, dict(about))
    if sum(tensor.ByteSize() for tensor in model.graph.initializer) < EXTERNAL_FROM:
        onnx.save_model(model, str(path))
    else:
        beside = {"all_tensors_to_one_file": True, "location": f"{path.name}.data"}
        onnx.save_model(model, str(path), save_as_external_data=True, **beside)
    onnx.checker.check_model(str(path), full_check=False)


def _check_operators(model: Any) -> None:
    others = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    others += [function.name for function in model.functions]
    if others:
        raise InputError(
            f"the ONNX file would need operators of {', '.join(others)}, which not every runtime "
            "has. Export --part backbone."
        )


def load(path: Path) -> Run:
    """Return how onnxruntime runs a file on the CPU."""
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
            raise RuntimeError(str(error)) from error
        return [torch.from_numpy(each) for each in found]

    return run


def _metadata(graph: Graph, part: str, about: Mapping[str, Any]) -> dict[str, str]:
    """Return what the file says of itself: {name: text or JSON}."""
    size = graph.size or ("height", "width")
    outputs = {name: _MEANINGS.get(name, _LEVEL) for name in graph.outputs}
    if getattr(graph, "masks", "") == "boxes":
        outputs["masks"] = "(N, M, M) probabilities inside the boxes"
    preprocessing = {
        "channels": "RGB",
        "range": [0, 255],
        "resize": about.get("resize", ""),
        "largest": [graph.square, graph.square] if graph.square else None,
        "inside": "mean, standard deviation and padding on the right and below",
        "mean": graph.model.pixel_mean.flatten().tolist(),
        "std": graph.model.pixel_std.flatten().tolist(),
        "padded_to": f"{graph.square} square" if graph.square else f"multiples of {graph.stride}",
    }
    words = {
        "producer": f"vitdet {_version()}",
        "part": part,
        "input": {"image": {"shape": [3, *size], "type": "uint8"}},
        "outputs": outputs,
        "preprocessing": preprocessing,
        **{name: value for name, value in about.items() if name != "resize"},
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in words.items()}


_LEVEL = "(1, C, H, W) level of the pyramid"
_MEANINGS = {
    "boxes": "(N, 4) XYXY in pixels of the input",
    "scores": "(N,) falling",
    "classes": "(N,) place in class_names and category_ids",
    "masks": "bool (N, height, width)",
}


def _version() -> str:
    try:
        return metadata.version("vitdet")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "(not installed)"


def _put(made: Path, out: Path, report: str, *, holds: bool) -> None:
    """Put the files into place, or only the report of what does not hold."""
    failed, text = out.with_name(f"{out.name}.failed.parity.json"), made.with_name("report")
    text.write_text(report, encoding="utf-8")  # while a full disk costs nothing
    if not holds:
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
