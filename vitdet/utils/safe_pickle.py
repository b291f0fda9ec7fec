"""Read a pickle of containers, numbers, text and NumPy arrays, and nothing else.

Nothing that a file names is ever imported or called. Arrays are rebuilt by the few lines below:
NumPy's own hooks trust the state that a file hands them. `NUMPY` lends the same lines to
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_MAX_DEPTH = 64
# How many times its own size, and how many bytes more, the tensors of a file may have: parts of it
# may be shared, as the rotary tables of EVA-02 are.
_UNFOLD, _SPARE = 4, 1 << 26


class ForbiddenError(Exception):
    """A file names something that is not on the list; the text is its dotted name."""


class DType:
    """Stands for numpy.dtype while a file is read: a scalar type and a byte order."""

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        del align, copy
        if code not in _SCALARS:
            raise pickle.UnpicklingError(f"arrays of type {code!r} are not weights")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags)
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("structured arrays are not weights")
        self.value = self.value.newbyteorder(state[1])

    def array(self, raw: object) -> np.ndarray:
        """Return the bytes `raw` as a one-dimensional array, without a copy."""
        # Python 2 pickled bytes as text
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError(f"array data of type {type(raw).__name__}")
        return np.frombuffer(data, self.value)


class Array:
    """Stands for numpy.ndarray while a file is read."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # (version, shape, dtype, column-major, bytes); the oldest files have no version
        shape, dtype, column_major, raw = state[-4:]
        self.value = dtype.array(raw).reshape(shape, order="F" if column_major else "C")

    def tensor(self) -> torch.Tensor:
        """Copy the data out and let the file's bytes go."""
        if self.value is None:
            raise pickle.UnpicklingError("an array without data")
        native = self.value.dtype.newbyteorder("=")
        tensor = torch.from_numpy(self.value.astype(native, order="C", copy=True))
        self.value = None
        return tensor


def _reconstruct(*_: object) -> Array:
    return Array()


def _from_buffer(raw: object, dtype: DType, shape: tuple[int, ...], order: str) -> Array:
    array = Array()
    array.__setstate__((shape, dtype, order == "F", raw))
    return array


def _scalar(dtype: DType, raw: object) -> float | int | bool:
    return dtype.array(raw)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    # how protocol 2 writes bytes
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _bytes() -> bytes:
    # how protocol 2 and older write no bytes at all
    return b""


NUMPY: dict[str, Any] = {"numpy.ndarray": Array, "numpy.dtype": DType}
for _room in ("numpy.core", "numpy._core"):
    NUMPY[f"{_room}.multiarray._reconstruct"] = _reconstruct
    NUMPY[f"{_room}.multiarray.scalar"] = _scalar
    NUMPY[f"{_room}.numeric._frombuffer"] = _from_buffer
_ALLOWED: dict[str, Any] = {
    **NUMPY,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _bytes,
    "builtins.bytes": _bytes,
}


class _File(io.BufferedReader):
    """Never allocates more than is left of the file, whatever length the file claims."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self._size = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._size - self.tell()
        if size is not None and size > left:
            raise EOFError("it ends too early")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n"):
            raise EOFError("it ends too early")
        return line


def error_of(what: str) -> Exception:
    """Return the exception for content that no weights file has."""
    return pickle.UnpicklingError(what)


class Unpickler(pickle._Unpickler):
    """Builds nothing but what is on the list.

    It derives from the Python version of the class: the C version lets a file of ten bytes ask for
    a memo of gigabytes.

    Attributes:
        builds: the stand-ins that take a state.
    """

    builds: tuple[type, ...] = (DType, Array)
    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands behind a name on the list."""
        found = _ALLOWED.get(f"{module}.{name}")
        if found is None:
            raise ForbiddenError(f"{module}.{name}")
        return found

    def _build(self) -> None:
        # BUILD reaches the stand-ins only: on the functions and classes behind the names it could
        # change this module.
        state = self.stack.pop()
        if not isinstance(self.stack[-1], self.builds):
            raise pickle.UnpicklingError(f"a state for {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    dispatch[pickle.BUILD[0]] = _build


def load(path: Path) -> Any:
    """Return the content of the pickle at `path`, arrays as tensors.

    Raises:
        ForbiddenError: it names anything but NumPy arrays and plain containers.
        Exception: one of pickle's or NumPy's, when the file is damaged.
    """
    with _File(io.FileIO(path)) as file:
        # latin1 is how Python 3 reads the arrays that Python 2 pickled
        content = Unpickler(file, encoding="latin1").load()
    return finish(content, path.stat().st_size)


def finish(content: Any, file_size: int) -> Any:
    """Replace the stand-ins inside nested containers by tensors, in place where it can be.

    Args:
        content: what an unpickler made.
        file_size: bytes of the file. Its tensors may share their numbers, but not so that they
            would unfold to many times the file.

    Raises:
        pickle.UnpicklingError: more numbers than that, tensors that are no plain ones, containers
            nested too deep.
    """
    return _Finisher(_UNFOLD * file_size + _SPARE).finish(content, 0)


class _Finisher:
    """Visits every part of a content once.

    Attributes:
        room: bytes that further tensors may have.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        # id -> (original, result): shared parts are visited once and stay shared
        self._done: dict[int, tuple[Any, Any]] = {}

    def finish(self, value: Any, depth: int) -> Any:
        if id(value) in self._done:
            return self._done[id(value)][1]
        if depth > _MAX_DEPTH:
            raise pickle.UnpicklingError(f"containers nested deeper than {_MAX_DEPTH}")
        result = value
        if isinstance(value, (dict, list, argparse.Namespace)):
            self._done[id(value)] = value, value
            items: Any = vars(value) if isinstance(value, argparse.Namespace) else value
            for key in range(len(items)) if isinstance(items, list) else list(items):
                items[key] = self.finish(items[key], depth + 1)
        elif type(value) is tuple:
            result = tuple(self.finish(part, depth + 1) for part in value)
        else:
            result = self._leaf(value)
        self._done[id(value)] = value, result
        return result

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self._check(value)
            return value.detach() if value.requires_grad else value
        if isinstance(value, Array):
            self._claim(0 if value.value is None else value.value.nbytes)
            return value.tensor()
        if isinstance(value, DType):
            return str(value.value)
        if isinstance(value, np.ndarray) and value.dtype.str[1:] in _SCALARS:
            self._claim(value.nbytes)
            native = value.astype(value.dtype.newbyteorder("="), copy=True)
            return torch.from_numpy(native)
        return value

    def _check(self, tensor: torch.Tensor) -> None:
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.is_nested or tensor.device.type != "cpu":
            kind = "quantized" if tensor.is_quantized else f"{tensor.layout}"
            place = tensor.device.type
            raise pickle.UnpicklingError(f"a tensor without plain numbers ({kind} on {place})")
        self._claim(tensor.numel() * tensor.element_size())

    def _claim(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise pickle.UnpicklingError("its tensors unfold to many times the size of the file")
