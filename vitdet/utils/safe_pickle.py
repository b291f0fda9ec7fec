"""Read a pickle of containers, numbers, text and NumPy arrays, and nothing else.

Nothing that a file names is ever imported or called. Arrays are rebuilt by the few lines below:
NumPy's own hooks trust the state that a file hands them. `NUMPY` lends the same lines to
`torch.load(weights_only=True)`, which imports nothing else either, but hashes whatever a file has
for keys: `scan` goes through its pickle first.
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
_MAX_STEPS = 3_000_000  # of a pickle: published files take some 100,000
_MAX_PARTS = 5_000_000  # of a content, shared ones counted wherever they stand
_MAX_ITEMS = 10_000  # of what is given to a call
_MAX_ODD_KEYS = 1_000  # tuples and fractions, whose hashes can be made to collide
_PLAIN = (str, bytes, bool, type(None))
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


def ordered(items: Any = ()) -> collections.OrderedDict[Any, Any]:
    """Stand for collections.OrderedDict, to which Python 2 gave its pairs."""
    if len(items) > _MAX_ITEMS:
        raise pickle.UnpicklingError("an OrderedDict of one piece")
    return collections.OrderedDict((check_key(key), value) for key, value in items)


def check_key(key: Any) -> Any:
    """Return a dictionary's key that can be hashed at once.

    Raises:
        pickle.UnpicklingError: hashing it could take the stack or, with its like, hours.
    """
    parts = key if type(key) is tuple and len(key) <= 8 else (key,)
    if not all(_is_plain(part) for part in parts):
        raise pickle.UnpicklingError(f"a key of type {type(key).__name__} that is no plain one")
    return key


def _is_plain(value: Any) -> bool:
    if type(value) in (int, float):
        return abs(value) < 1 << 53  # hash(n) is n only below 2**61 - 1
    return type(value) in _PLAIN


NUMPY: dict[str, Any] = {"numpy.ndarray": Array, "numpy.dtype": DType}
for _room in ("numpy.core", "numpy._core"):
    NUMPY[f"{_room}.multiarray._reconstruct"] = _reconstruct
    NUMPY[f"{_room}.multiarray.scalar"] = _scalar
    NUMPY[f"{_room}.numeric._frombuffer"] = _from_buffer
_BUILTIN: dict[str, Any] = {
    "collections.OrderedDict": ordered,
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


class _Steps(dict[int, Any]):
    """The steps that an unpickler knows; taking one counts."""

    left = _MAX_STEPS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError("it has no end")
        return super().__getitem__(code)


class Unpickler(pickle._Unpickler):
    """Builds nothing but what is on the list, with keys that are plain and tuples that are flat.

    It derives from the Python version of the class: the C version lets a file of ten bytes ask for
    a memo of gigabytes.

    Attributes:
        builds: the stand-ins that take a state.
    """

    builds: tuple[type, ...] = (DType, Array)
    stack: list[Any]
    pop_mark: Any
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, *, encoding: str = "ASCII") -> None:
        super().__init__(file, encoding=encoding)
        self._odd_keys = 0
        self._deep: dict[int, tuple[tuple[Any, ...], int]] = {}  # tuples in tuples, by their id
        self.__dict__["dispatch"] = _Steps(type(self).dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands behind a name on the list."""
        dotted = f"{module}.{name}"
        found = _BUILTIN.get(dotted) or NUMPY.get(dotted)
        if found is None:
            raise ForbiddenError(dotted)
        return found

    def _build(self) -> None:
        # BUILD reaches the stand-ins only: on the functions and classes behind the names it could
        # change this module.
        state = self.stack.pop()
        if type(self.stack[-1]) is collections.OrderedDict:
            return  # the versions of a state dict's modules
        if not isinstance(self.stack[-1], self.builds):
            raise pickle.UnpicklingError(f"a state for {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    def _set(self, items: list[Any]) -> None:
        for place in range(0, len(items), 2):
            key = check_key(items[place])
            self._odd_keys += type(key) in (tuple, float)
            if self._odd_keys > _MAX_ODD_KEYS:
                raise pickle.UnpicklingError("too many keys that are tuples or fractions")
            self.stack[-1][key] = items[place + 1]

    def _set_one(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def _tuple(self, parts: list[Any]) -> None:
        depth = 1 + max((self._deep.get(id(part), (0, 0))[1] for part in parts), default=0)
        if depth > _MAX_DEPTH:
            raise pickle.UnpicklingError(f"tuples nested deeper than {_MAX_DEPTH}")
        made = tuple(parts)
        self._deep[id(made)] = made, depth
        self.stack.append(made)

    def _last(self, count: int) -> None:
        parts = self.stack[-count:]
        del self.stack[-count:]
        self._tuple(parts)

    def _no_set(self) -> None:
        raise pickle.UnpicklingError("a set is no part of a weights file")

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_one
    dispatch[pickle.SETITEMS[0]] = lambda self: self._set(self.pop_mark())
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.TUPLE[0]] = lambda self: self._tuple(self.pop_mark())
    dispatch[pickle.TUPLE1[0]] = lambda self: self._last(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self._last(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self._last(3)
    dispatch[pickle.EMPTY_SET[0]] = _no_set
    dispatch[pickle.ADDITEMS[0]] = _no_set
    dispatch[pickle.FROZENSET[0]] = _no_set


class _Anything:
    """Stands for whatever a torch file names, while nothing of it is made."""

    def __new__(cls, *args: Any) -> Any:
        if any(isinstance(each, list | tuple | dict) and len(each) > _MAX_ITEMS for each in args):
            raise pickle.UnpicklingError("a call with endless arguments")
        for each in args:
            for part in each if isinstance(each, list) else ():
                check_key(part) if isinstance(part, tuple) else None
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


class _Scan(Unpickler):
    builds = (_Anything,)

    def find_class(self, module: str, name: str) -> Any:
        return _BUILTIN.get(f"{module}.{name}", _Anything)

    def persistent_load(self, pid: Any) -> Any:
        del pid
        return _Anything()


def scan(path: Path, pickled: bytes | None = None) -> None:
    """Raise unless the pickle of a torch file is one that torch.load takes in bounded time.

    Args:
        path: the file. torch's old format begins with five pickles (torch/serialization.py).
        pickled: the description in a file of torch's new format.

    Raises:
        Exception: one of pickle's.
    """
    if pickled is not None:
        _Scan(io.BytesIO(pickled), encoding="latin1").load()
        return
    with _File(io.FileIO(path)) as file:
        for _ in range(5):
            _Scan(file, encoding="latin1").load()


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
    """Visits every part of a content once, and counts how many they are to one who does not.

    Attributes:
        room: bytes that further tensors may have.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._parts = 0
        # id -> (original, result, parts): shared parts are visited once and stay shared
        self._done: dict[int, tuple[Any, Any, int]] = {}

    def finish(self, value: Any, depth: int) -> Any:
        if id(value) in self._done:
            _, result, parts = self._done[id(value)]
            self._count(parts)
            return result
        if depth > _MAX_DEPTH:
            raise pickle.UnpicklingError(f"containers nested deeper than {_MAX_DEPTH}")
        result, before = value, self._parts
        self._count(1)
        if isinstance(value, (dict, list, argparse.Namespace)):
            self._done[id(value)] = value, value, _MAX_PARTS  # until all of it was visited
            items: Any = vars(value) if isinstance(value, argparse.Namespace) else value
            for key in range(len(items)) if isinstance(items, list) else list(items):
                items[key] = self.finish(items[key], depth + 1)
        elif type(value) is tuple:
            result = tuple(self.finish(part, depth + 1) for part in value)
        else:
            result = self._leaf(value)
        self._done[id(value)] = value, result, self._parts - before
        return result

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > _MAX_PARTS:
            raise pickle.UnpicklingError("a container that holds itself, or unfolds to millions")

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
