"""The file formats: how a graph is written to each, and how a file of each is run."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitdet.export.graphs import Graph
from vitdet.utils.checks import InputError, fail

OPSETS = range(17, 21)  # 17 has LayerNormalization; the exporter ends at 20
# A file of protocol buffers ends at 2 GiB; larger models keep their weights in a file beside it.
EXTERNAL_FROM = 2**31 - 2**26
META = "vitdet.json"  # name of the note inside an archive of torch

Run = Callable[[torch.Tensor], list[torch.Tensor]]


class Order(NamedTuple):
    """What to write.

    Attributes:
        image: example image (3, H, W) to follow the graph with.
        note: {name: text} to keep in the file.
        opset: of ONNX.
        external_from: bytes of weights from which on ONNX keeps them in a file of its own.
    """

    image: torch.Tensor
    note: Mapping[str, str]
    opset: int = 17
    external_from: int = EXTERNAL_FROM


class Format(NamedTuple):
    """A format.

    Attributes:
        suffix: of its files.
        packages: that it needs beside torch.
        any_size: whether a file can take images of any size, whatever the model.
        write: writes the graph to the path.
        load: returns how to run the file: image in, outputs out.
        note: reads the note of the file back.
    """

    suffix: str
    packages: tuple[str, ...]
    any_size: bool
    write: Callable[[Graph, Path, Order], None]
    load: Callable[[Path], Run]
    note: Callable[[Path], dict[str, str]]


def run_errors(name: str) -> tuple[type[Exception], ...]:
    """Return what running a file of a format raises where it does not suit its input."""
    if name != "onnx":
        return (RuntimeError,)
    state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    return (state.Fail, state.InvalidArgument, state.RuntimeException, state.InvalidGraph)


def check_packages(name: str) -> None:
    """Raise an InputError unless the packages of a format are installed."""
    missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
    if missing:
        fail(
            f"--format {name}",
            expected=f"the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            got="no such package",
            remedy='Run `pip install "vitdet[export]"`.',
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch's exporters say of themselves and of code that we have looked at.

    Every export is compared with PyTorch afterwards, so a branch that a tracer lost shows.
    """
    with warnings.catch_warnings():
        # Python branches on sizes: `example` chooses sizes that take the general branch.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+. is deprecated")
        # The tracer's exporter, which takes any size, in favour of the one on torch.export.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.onnx")
        warnings.filterwarnings("ignore", message=r".*legacy TorchScript-based ONNX export")
        # That it folds no constants somewhere, and that indices must not be negative: none is.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")
        # torchvision's NMS, of a name in torch that changed
        warnings.filterwarnings("ignore", message=r".create_unbacked_symint. is deprecated")
        # detectron2's anchors
        warnings.filterwarnings("ignore", message=r"torch\.meshgrid: in an upcoming release")
        yield


# --- ONNX ----------------------------------------------------------------------------------------


def write_onnx(graph: Graph, path: Path, order: Order) -> None:
    """Write an ONNX file of standard operators; weights of `external_from` bytes beside it."""
    import onnx
    from torch.onnx import register_custom_op_symbolic, unregister_custom_op_symbolic

    axes: dict[str, dict[int, str]] = {}
    if graph.size is None:
        axes["image"] = {1: "height", 2: "width"}
        if graph.part == "backbone":
            axes |= {name: {2: f"{name}_height", 3: f"{name}_width"} for name in graph.outputs}
    if graph.part == "detector":
        axes |= {name: {0: "detections"} for name in graph.outputs}
        if graph.size is None and getattr(graph, "masks", "none") == "pasted":
            axes["masks"] |= {1: "height", 2: "width"}
    first = path.with_name(f"traced_{path.name}")
    register_custom_op_symbolic("aten::mT", _transpose, order.opset)
    try:
        # It prints the whole graph where it fails.
        with quiet(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                graph,
                (order.image,),
                str(first),
                dynamo=False,
                opset_version=order.opset,
                input_names=["image"],
                output_names=list(graph.outputs),
                dynamic_axes=axes,
            )
    except torch.onnx.OnnxExporterError as error:
        text = f"ONNX: the model has an operator that cannot be exported ({error})."
        raise InputError(text[:500] + " Try --format torch-export.") from error
    finally:
        unregister_custom_op_symbolic("aten::mT", order.opset)
    model = onnx.load(str(first))
    _check_operators(model)
    onnx.helper.set_model_props(model, dict(order.note))
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    if size < order.external_from:
        onnx.save_model(model, str(path))
    else:
        onnx.save_model(
            model,
            str(path),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=f"{path.name}.data",
        )
    onnx.checker.check_model(str(path), full_check=False)


def _transpose(g: Any, x: Any) -> Any:
    """Write `x.mT`, which the exporter does not know. Can go when it does."""
    rank = x.type().dim()
    order = [*range(rank - 2), rank - 1, rank - 2]
    return g.op("Transpose", x, perm_i=order)


def _check_operators(model: Any) -> None:
    """Every runtime knows the standard operators; a file must have no others."""
    others = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    functions = [function.name for function in model.functions]
    if others or functions:
        fail(
            "ONNX file",
            expected="standard operators only",
            got=f"operators of {', '.join(others)} {', '.join(functions)}".strip(),
            remedy="Export --part backbone, or take another format.",
        )


def load_onnx(path: Path) -> Run:
    """Return how onnxruntime runs a file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image: torch.Tensor) -> list[torch.Tensor]:
        found = session.run(None, {"image": image.numpy()})
        return [torch.from_numpy(each) for each in found]

    return run


def onnx_note(path: Path) -> dict[str, str]:
    """Return the metadata of an ONNX file."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return {each.key: each.value for each in model.metadata_props}


# --- torch ---------------------------------------------------------------------------------------


def write_torchscript(graph: Graph, path: Path, order: Order) -> None:
    """Write a TorchScript archive, traced."""
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(graph, (order.image,), check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={META: json.dumps(dict(order.note))})


def load_torchscript(path: Path) -> Run:
    """Return how torch runs a TorchScript archive."""
    with quiet():
        return _runner(torch.jit.load(str(path), map_location="cpu"))


def torchscript_note(path: Path) -> dict[str, str]:
    """Return the note of a TorchScript archive."""
    extra = {META: ""}
    with quiet():
        torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    return json.loads(extra[META])


def write_torch_export(graph: Graph, path: Path, order: Order) -> None:
    """Write an archive of torch.export.

    The sizes of images are a part of the program; where the model pads to a square, any size that
    fits into it is.
    """
    sizes = None
    if graph.size is None:
        side = torch.export.Dim.DYNAMIC(max=graph.square or None)
        sizes = {"image": (torch.export.Dim.STATIC, side, side)}
    with quiet(), torch.no_grad():
        program = torch.export.export(graph, (order.image,), dynamic_shapes=sizes, strict=False)
        torch.export.save(program, str(path), extra_files={META: json.dumps(dict(order.note))})


def load_torch_export(path: Path) -> Run:
    """Return how torch runs an archive of torch.export."""
    return _runner(torch.export.load(str(path)).module())


def torch_export_note(path: Path) -> dict[str, str]:
    """Return the note of an archive of torch.export."""
    extra = {META: ""}
    torch.export.load(str(path), extra_files=extra)
    return json.loads(extra[META])


def _runner(module: Callable[..., Sequence[torch.Tensor]]) -> Run:
    def run(image: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(module(image))

    return run


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxruntime"), True, write_onnx, load_onnx, onnx_note),
    "torchscript": Format(".pt", (), True, write_torchscript, load_torchscript, torchscript_note),
    "torch-export": Format(
        ".pt2", (), False, write_torch_export, load_torch_export, torch_export_note
    ),
}
