"""Checkpoint files: read without running anything, write whole or not at all, load exactly.

Four containers are read: torch files (.pth .pt .bin .ckpt), TorchScript archives under the same
suffixes, .safetensors, and .pkl, the pickles of NumPy arrays of detectron2's model zoo. None of
them can run code here: torch files go through `torch.load(weights_only=True)`, pickles through
`vitdet.utils.safe_pickle`, archives through `vitdet.utils.torchscript`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import nn

from vitdet.utils import safe_pickle, torchscript
from vitdet.utils.checks import InputError, fail, nearest
from vitdet.utils.files import replacing
from vitdet.utils.state_dicts import compare_shapes, rows_of, some

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

# What torch, pickle, NumPy and zipfile raise on damaged content, found by damaging files.
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, MemoryError),
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(AssertionError, ImportError, RecursionError),
)
FORMAT = 1  # of what this project writes beside the weights
WEIGHTS = ("model", "ema")  # which a detector may take of a file
AVERAGE = "ema_state"  # moving average, as in EVA's published files (EVA-02/det, modeling/ema.py)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CONVERT = "python converter.py --source-model {} --output-model OUT.pth --config-file YOUR_RECIPE"


def read(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Return the whole content of a checkpoint file, tensors on the CPU, arrays as tensors.

    Args:
        path: a file ending in .pth .pt .bin .ckpt (torch), .safetensors or .pkl (NumPy arrays).
        trust: allow a torch file everything that pickle allows; opening it may then run code of
            its author. Other files are never trusted.

    Returns:
        The file's dictionary. A safetensors file gives {name: tensor}; when this project wrote it,
        {"model": {name: tensor}, "vitdet": ...}. A TorchScript archive gives {name: tensor}.

    Raises:
        InputError: no such file, unknown suffix, damaged, or more than tensors and plain values.
    """
    path = Path(path)
    what = f"checkpoint {path}"
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        fail(what, expected="a file", got=got, remedy="Check the path.")
    if not path.stat().st_size:
        _damaged(path, "it is empty")
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix == ".pkl":
        content = _read_pickle(path)
    elif path.suffix in TORCH_SUFFIXES:
        content = _read_torch(path, trust=trust)
    else:
        known = " ".join((*TORCH_SUFFIXES, ".safetensors", ".pkl"))
        got = path.suffix or "no suffix"
        fail(what, expected=f"one of {known}", got=got, remedy="Name it after what it is.")
    if not isinstance(content, dict):
        got = type(content).__name__
        fail(what, expected="a dictionary", got=got, remedy="Save a state dict instead.")
    return content


def write(
    path: str | Path,
    content: Mapping[str, Any],
    *,
    before_rename: Callable[[Path], None] | None = None,
) -> None:
    """Write `content` to a temporary file beside `path`, flush it to the disk, and rename it.

    Args:
        path: ends in .pth; or in .safetensors, for {"model": {name: tensor}, "vitdet": JSON}.
        content: the dictionary.
        before_rename: called with the complete temporary file, to note what will stand at `path`.

    Raises:
        InputError: unknown suffix, missing folder, or the disk refuses. What stood at `path`
            before stands there still.
    """
    path = Path(path)
    check_writable(path)
    extra = sorted(set(content) - {"model", "vitdet"})
    if path.suffix == ".safetensors" and extra:
        remedy = "Write it to a .pth file."
        fail(f"output {path}", expected="model and vitdet only", got=extra, remedy=remedy)
    try:
        with replacing(path) as partial:
            if path.suffix == ".safetensors":
                tensors, metadata = _safetensors_parts(content)
                safetensors.torch.save_file(tensors, partial, metadata)
            else:
                with partial.open("wb") as file:
                    torch.save(dict(content), file)
            if before_rename is not None:
                before_rename(partial)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        cause = _first_os_error(error)
        if cause is None and not isinstance(error, safetensors.SafetensorError):
            raise
        text = f"output {path}: it cannot be written ({cause or error}). Check space and rights "
        raise InputError(f"{text}of its disk.") from error


def _first_os_error(error: BaseException | None) -> OSError | None:
    """The disk's own error: torch's zip writer raises a RuntimeError of its own on top of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def check_writable(path: str | Path) -> None:
    """Raise InputError unless `path` ends in .pth or .safetensors and its folder exists."""
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        got = path.suffix or "no suffix"
        fail(f"output {path}", expected=".pth or .safetensors", got=got, remedy="Rename it.")
    if path.is_dir():
        fail(f"output {path}", expected="a file name", got="a folder", remedy="Rename it.")
    if not path.parent.is_dir():
        remedy = f"Create it first: mkdir -p {path.parent}"
        fail(f"folder of {path}", expected="an existing folder", got="none", remedy=remedy)


def weights_of(
    content: Mapping[str, Any], *, source: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return (state dict, names left to initialisation) of what `read` returned.

    The content is the state dict itself or holds it under "model".

    Raises:
        InputError: there is no state dict in it.
    """
    inner = content.get("model", content)
    if not isinstance(inner, dict) or not all(isinstance(v, torch.Tensor) for v in inner.values()):
        remedy = "Convert it first: " + _CONVERT.format(source)
        got = f"the keys {some(content)}"
        fail(source, expected='{"model": {name: tensor}}', got=got, remedy=remedy)
    about = content.get("vitdet")
    if isinstance(about, dict) and about.get("format", FORMAT) != FORMAT:
        got = f"format {about['format']!r:.50}"
        remedy = "It is of another version of vitdet: use that one."
        fail(source, expected=f"format {FORMAT}", got=got, remedy=remedy)
    names = about.get("initialised", []) if isinstance(about, dict) else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        remedy = "Convert the file again."
        got = type(names).__name__ if not isinstance(names, list) else "other things"
        fail(f"{source}: initialised", expected="a list of names", got=got, remedy=remedy)
    return inner, names


def chosen(content: Mapping[str, Any], which: str, *, source: str) -> Mapping[str, Any]:
    """Return a file's content with the wanted weights in the place of "model".

    Args:
        content: what `read` returned.
        which: "model", or "ema" for the moving average of a run with train.ema_decay.
        source: file name for error messages.

    Raises:
        InputError: another word, or no average in the file.
    """
    if which not in WEIGHTS:
        remedy = "ema is the moving average of a run with train.ema_decay."
        fail("weights", expected=" or ".join(WEIGHTS), got=repr(which), remedy=remedy)
    if which == "model":
        return content
    if AVERAGE not in content:
        fail(
            f"weights of {source}",
            expected=f'a moving average of the weights ("{AVERAGE}"), as "ema" says',
            got=f"only the keys {', '.join(map(str, list(content)[:8]))}",
            remedy='Take "model" (train.eval_weights=model), or a run with train.ema_decay.',
        )
    return {**content, "model": content[AVERAGE]}


def check_trained(content: Mapping[str, Any], *, source: str) -> None:
    """Raise an InputError for weights that are meant to be trained first."""
    _, initialised = weights_of(content, source=source)
    if initialised:
        fail(
            f"weights of {source}",
            expected="a trained detector",
            got=f"a start of training: {len(initialised)} tensors ({initialised[0]}, ...) are left "
            "to initialisation",
            remedy="Train from it first, and take the checkpoint of that run.",
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
        model: any module. When this raises, nothing in it has changed.
        state_dict: {name: tensor}, with the names of `model.state_dict()`.
        source: where the weights come from, for the messages.
        initialised: names that may be missing: the model keeps its own initialisation there; or
            "name[0-3,7]": rows of a tensor for which the same holds.

    Raises:
        InputError: a name or a shape differs. The line says why: another number of classes,
            another size, another format.
    """
    check_fits(model, state_dict, source=source, initialised=initialised)
    _check_values(model.state_dict(), state_dict, source)
    model.load_state_dict(_with_own_rows(model, state_dict, initialised, source), strict=False)


def check_fits(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    *,
    source: str,
    initialised: Collection[str] = (),
) -> None:
    """Raise what `load_weights` raises; a model on the meta device will do."""
    target = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state_dict.items()}
    if not given.keys() & target.keys():
        remedy = "Convert it first: " + _CONVERT.format(source)
        got = f"{some(given)}" if given else "none"
        fail(f"{source}: names", expected=f"some of {some(target)}", got=got, remedy=remedy)
    remedy = "Use the recipe it was made for. For another image, window or position grid size "
    remedy += "convert it: " + _CONVERT.format(source)
    compare_shapes(given, target, source=source, remedy=remedy)
    allowed = set(initialised)
    missing = [name for name in target if name not in given and name not in allowed]
    unexpected = [name for name in given if name not in target]
    if missing or unexpected:
        parts = ((missing, "missing"), (unexpected, "unexpected"))
        got = " and ".join(f"{len(names)} {word} ({some(names)})" for names, word in parts if names)
        expected = f"the model's {len(target)}"
        remedy = _remedy(missing, unexpected, source)
        fail(f"{source}: names", expected=expected, got=got, remedy=remedy)


def _check_values(
    target: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], source: str
) -> None:
    """Raise InputError for numbers of another kind than the model's, and such that are none."""
    for name, tensor in given.items():
        theirs, ours = tensor.dtype, target[name].dtype
        if theirs != ours and not (ours.is_floating_point and theirs in _FLOATS):
            kind = "floating point numbers" if ours in _FLOATS else f"{ours}".split(".")[-1]
            expected, got = f"{kind} as the model's", f"{theirs}".split(".")[-1]
            remedy = "Convert the weights to float32 in the program that wrote the file."
            fail(f"{source}: {name}", expected=expected, got=got, remedy=remedy)
        wrong = 0 if bool(tensor.isfinite().all()) else int((~tensor.isfinite()).sum())
        if wrong:
            expected, got = "finite weights", f"{wrong} values that are not finite"
            remedy = "That training diverged: take an earlier checkpoint."
            fail(f"{source}: {name}", expected=expected, got=got, remedy=remedy)


def _with_own_rows(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], entries: Iterable[str], source: str
) -> dict[str, torch.Tensor]:
    """Return the state dict with the model's own values in the rows that `entries` name."""
    result, own = dict(state_dict), model.state_dict()
    for entry in entries:
        found = rows_of(entry)
        if found is None:
            continue
        name, rows = found
        if name not in result or not rows or rows[-1].stop > len(result[name]):
            remedy = "Convert the file again."
            expected = "rows of a tensor in the file"
            fail(f"{source}: initialised", expected=expected, got=entry, remedy=remedy)
        tensor = result[name].clone()
        for each in rows:
            tensor[each.start : each.stop] = own[name][each.start : each.stop].to(tensor)
        result[name] = tensor
    return result


def _remedy(missing: list[str], unexpected: list[str], source: str) -> str:
    if missing and unexpected and (close := nearest(missing[0], unexpected)):
        return f"{close} may be {missing[0]}: convert the file: {_CONVERT.format(source)}"
    return f"Use the recipe the file was made for, or convert it: {_CONVERT.format(source)}"


def _damaged(path: Path, why: object) -> NoReturn:
    reason = " ".join(str(why).split()).split(". ")[0][:200]
    if not re.search(r"[a-z]{3}", reason):  # a bare number, or nothing
        reason = f"damaged {reason}".strip()
    text = f"checkpoint {path}: it cannot be read ({reason}). Check it, or download it again."
    raise InputError(text)


def _refused(path: Path, wanted: str, remedy: str) -> NoReturn:
    expected = "tensors and plain values only"
    fail(f"checkpoint {path}", expected=expected, got=f"the class {wanted}", remedy=remedy)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            about = (file.metadata() or {}).get("vitdet")
        return tensors if about is None else {"model": tensors, "vitdet": json.loads(about)}
    except (safetensors.SafetensorError, *_DAMAGE) as error:
        _damaged(path, error)


def _safetensors_parts(
    content: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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
    return tensors, {"format": "pt", **about}


def _read_pickle(path: Path) -> Any:
    try:
        return safe_pickle.load(path)
    except safe_pickle.ForbiddenError as error:
        remedy = "No flag opens such a .pkl file: ask for one of NumPy arrays alone, or a .pth."
        _refused(path, str(error), remedy)
    except _DAMAGE as error:
        _damaged(path, error)


def _starts_as_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"  # torch looks at no more


def _read_torch(path: Path, *, trust: bool) -> Any:
    size = path.stat().st_size
    try:
        script, pickled = False, None
        if _starts_as_archive(path):
            script, pickled = torchscript.check_archive(path)
        if script:
            return safe_pickle.finish(torchscript.load(path), size)
        if trust:
            whole = torch.load(path, map_location="cpu", weights_only=False)
            return safe_pickle.finish(whole, size)
        safe_pickle.scan(path, pickled)
        harmless = [(stand_in, name) for name, stand_in in safe_pickle.NUMPY.items()]
        allowed = torch.serialization.safe_globals([argparse.Namespace, *harmless])
        with allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of, it refuses next
            whole = torch.load(path, map_location="cpu", weights_only=True)
            return safe_pickle.finish(whole, size)
    except InputError:
        raise
    except safe_pickle.ForbiddenError as error:
        remedy = "Open it with torch.jit.load in a program of yours and save its state_dict()."
        _refused(path, str(error), remedy)
    except _DAMAGE as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted and not trust:
            remedy = "Only if you trust its author: --trust opens it, and may run code of theirs."
            _refused(path, wanted[1], remedy)
        # torch puts the cause between pieces of advice that do not hold here
        cause = str(error).rsplit("WeightsUnpickler error:", 1)[-1]
        _damaged(path, cause.split("Check the documentation", 1)[0])
