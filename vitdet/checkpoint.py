"""Checkpoint files: read without running anything, write whole or not at all, load exactly."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from vitdet.utils.checks import InputError, check_word
from vitdet.utils.files import replacing
from vitdet.utils.state_dicts import compare_shapes, load, rows_of, some

# What torch, pickle, NumPy and zipfile raise on damaged content, found by damaging files.
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, MemoryError),
    *(RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, ValueError, safetensors.SafetensorError),
)
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".pkl")
FORMAT = 1  # of what this project writes beside the weights
WEIGHTS = ("model", "ema")  # which a detector may take of a file
AVERAGE = "ema_state"  # moving average, as in EVA's published files (EVA-02/det, modeling/ema.py)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CONVERT = "vitdet convert --source-model {} --output-model OUT.pth --config-file YOUR_RECIPE"


def read(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Return the whole content of a checkpoint file, tensors on the CPU, arrays as tensors.

    Args:
        path: torch's (.pth .pt .bin .ckpt), TorchScript under the same suffixes, .safetensors, or
            .pkl: the pickles of NumPy arrays of detectron2's model zoo.
        trust: allow a torch file everything that pickle allows; opening it may then run code of
            its author. Other files are never trusted.

    Returns:
        The file's dictionary. A safetensors file gives {name: tensor}; when this project wrote it,
        {"model": {name: tensor}, "vitdet": ...}. A TorchScript archive gives {name: tensor}.

    Raises:
        InputError: no such file, unknown suffix, damaged, or more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise InputError(f"checkpoint {path}: expected a file, got {got}. Check the path.")
    if path.suffix not in SUFFIXES:
        wanted = f"expected one of {' '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}"
        raise InputError(f"checkpoint {path}: {wanted}. Name it after what it is.")
    try:
        if not path.stat().st_size:
            raise EOFError("it is empty")
        safe = path.suffix == ".safetensors"
        content = _read_safetensors(path) if safe else load(path, trust=trust)
    except InputError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        if not re.search(r"[a-z]{3}", reason):  # a bare number, or nothing
            reason = f"damaged {reason}".strip()
        text = f"checkpoint {path}: it cannot be read ({reason}). Check it, or download it again."
        raise InputError(text) from error
    if not isinstance(content, dict):
        got = f"expected a dictionary, got {type(content).__name__}"
        raise InputError(f"checkpoint {path}: {got}. Save a state dict instead.")
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        about = (file.metadata() or {}).get("vitdet")
    return tensors if about is None else {"model": tensors, "vitdet": json.loads(about)}


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` to a temporary file beside `path`, flush it to the disk, and rename it.

    `path` ends in .pth; or in .safetensors, for {"model": {name: tensor}, "vitdet": JSON}.

    Raises:
        InputError: unknown suffix, missing folder, or the disk refuses. What stood there stays.
    """
    path = Path(path)
    check_writable(path)
    try:
        with replacing(path) as partial:
            if path.suffix == ".safetensors":
                _write_safetensors(partial, content, path)
            else:
                with partial.open("wb") as file:
                    torch.save(dict(content), file)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        cause: BaseException | None = error  # torch's writer raises another error on the disk's own
        while not isinstance(cause, OSError | safetensors.SafetensorError | None):
            cause = cause.__context__
        if cause is None:
            raise
        text = f"output {path}: it cannot be written ({cause}). Check space and rights of its disk."
        raise InputError(text) from error


def check_writable(path: str | Path) -> None:
    """Raise InputError unless `path` ends in .pth or .safetensors and its folder exists."""
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors") or path.is_dir():
        got = "a folder" if path.is_dir() else path.suffix or "no suffix"
        raise InputError(f"output {path}: expected .pth or .safetensors, got {got}. Rename it.")
    if not path.parent.is_dir():
        raise InputError(f"folder of {path}: it is not there. Create it: mkdir -p {path.parent}")


def _write_safetensors(partial: Path, content: Mapping[str, Any], path: Path) -> None:
    if extra := sorted(set(content) - {"model", "vitdet"}):
        got = f"expected model and vitdet only, got {extra}"
        raise InputError(f"output {path}: {got}. Write it to a .pth file.")
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, value in content["model"].items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # The format knows no views: a tensor that shares its memory is written as a copy.
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    # files for other projects have no part "vitdet"
    about = {"vitdet": json.dumps(content["vitdet"])} if "vitdet" in content else {}
    safetensors.torch.save_file(tensors, partial, {"format": "pt", **about})


def weights_of(
    content: Mapping[str, Any], *, source: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return (state dict, names left to initialisation) of what `read` returned.

    Raises:
        InputError: the content neither is a state dict nor holds one under "model".
    """
    inner = content.get("model", content)
    if not isinstance(inner, dict) or not all(isinstance(v, torch.Tensor) for v in inner.values()):
        got = f'expected {{"model": {{name: tensor}}}}, got the keys {some(content)}'
        raise InputError(f"{source}: {got}. Convert it first: {_CONVERT.format(source)}")
    about = content.get("vitdet")
    about = about if isinstance(about, dict) else {}
    if about.get("format", FORMAT) != FORMAT:
        got = f"expected format {FORMAT}, got format {about['format']!r:.50}"
        raise InputError(f"{source}: {got}. It is of another version of vitdet: use that one.")
    names = about.get("initialised", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        text = "initialised: expected a list of names, got something else. Convert the file again."
        raise InputError(f"{source}: {text}")
    return inner, names


def chosen(content: Mapping[str, Any], which: str, *, source: str) -> Mapping[str, Any]:
    """Return a file's content with the wanted weights in the place of "model".

    `which` is "model", or "ema" for the moving average of a run with train.ema_decay.

    Raises:
        InputError: another word, or no average in the file.
    """
    check_word("weights", which, WEIGHTS)
    if which == "model":
        return content
    if AVERAGE not in content:
        raise InputError(
            f'weights of {source}: expected a moving average ("{AVERAGE}"), as "ema" says, got '
            f'only the keys {some(content, 8)}. Take "model" (train.eval_weights=model), or a run '
            "with train.ema_decay."
        )
    return {**content, "model": content[AVERAGE]}


def check_trained(content: Mapping[str, Any], *, source: str) -> None:
    """Raise an InputError for weights that are meant to be trained first."""
    _, initialised = weights_of(content, source=source)
    if initialised:
        start = f"{len(initialised)} tensors ({initialised[0]}, ...) are left to initialisation"
        raise InputError(
            f"weights of {source}: expected a trained detector, got a start of training: {start}. "
            "Train from it first, and take the checkpoint of that run."
        )


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    *,
    source: str,
    initialised: Collection[str] = (),
) -> None:
    """Copy `state_dict` into `model`: every name and every shape must agree.

    Args:
        model: any module.
        state_dict: {name: tensor}, with the names of `model.state_dict()`.
        source: where the weights come from, for the messages.
        initialised: names that may be missing, or "name[0-3,7]": rows of a tensor. The model keeps
            its own initialisation there.

    Raises:
        InputError: a name or a shape differs, or a value is none. Nothing in the model has changed.
    """
    check_fits(model, state_dict, source=source, initialised=initialised)
    result, own = dict(state_dict), model.state_dict()
    for name, tensor in state_dict.items():
        _check_values(name, tensor, own[name].dtype, source)
    for name, rows in filter(None, map(rows_of, initialised)):
        if name not in result or not rows or rows[-1].stop > len(result[name]):
            got = f"expected rows of a tensor in the file, got others of {name}"
            raise InputError(f"{source}: initialised: {got}. Convert the file again.")
        result[name] = result[name].clone()
        for each in rows:
            places = slice(each.start, each.stop)
            result[name][places] = own[name][places].to(result[name])
    model.load_state_dict(result, strict=False)


def check_fits(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    *,
    source: str,
    initialised: Collection[str] = (),
) -> None:
    """Raise what `load_weights` raises of names and shapes; a model on the meta device will do."""
    target = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state_dict.items()}
    convert = _CONVERT.format(source)
    if not given.keys() & target.keys():
        got = f"expected some of {some(target)}, got {some(given) or 'none'}"
        raise InputError(f"{source}: names: {got}. Convert it first: {convert}")
    remedy = "Use the recipe it was made for. For another image, window or position grid size "
    compare_shapes(given, target, source=source, remedy=f"{remedy}convert it: {convert}")
    allowed = set(initialised)
    missing = [name for name in target if name not in given and name not in allowed]
    unexpected = [name for name in given if name not in target]
    if missing or unexpected:
        parts = ((missing, "missing"), (unexpected, "unexpected"))
        got = " and ".join(f"{len(names)} {word} ({some(names)})" for names, word in parts if names)
        remedy = f"Use the recipe the file was made for, or convert it: {convert}"
        raise InputError(
            f"{source}: names: expected the model's {len(target)}, got {got}. {remedy}"
        )


def _check_values(name: str, tensor: torch.Tensor, ours: torch.dtype, source: str) -> None:
    if tensor.dtype != ours and not (ours.is_floating_point and tensor.dtype in _FLOATS):
        kind = "floating point numbers" if ours in _FLOATS else f"{ours}".split(".")[-1]
        got = f"expected {kind} as the model's, got {str(tensor.dtype).split('.')[-1]}"
        remedy = "Convert the weights to float32 in the program that wrote the file."
        raise InputError(f"{source}: {name}: {got}. {remedy}")
    if not bool(tensor.isfinite().all()):
        got = f"{int((~tensor.isfinite()).sum())} values that are not finite"
        remedy = "That training diverged: take an earlier checkpoint."
        raise InputError(f"{source}: {name}: expected finite weights, got {got}. {remedy}")
