"""Read torch files, TorchScript archives and pickles of NumPy arrays without running anything.

Nothing that a file names is imported or called: the names below stand for tensors and plain values,
and the program in a TorchScript archive is not opened. torch.load(weights_only=True) imports
nothing either, but it looks at no checksum and hashes whatever a file has for keys: tuples nested
deeply end the process, and numbers made to collide keep it busy for hours.
"""

from __future__ import annotations

import argparse
import collections
import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from vitdet.utils.checks import InputError

_MAX_STEPS = 3_000_000  # of a pickle; published files take some 100,000
_MAX_PARTS = 5_000_000  # of a content, shared ones counted wherever they stand
_MAX_HEIGHT = 64  # of nested containers
_MAX_ITEMS = 10_000  # of a set, or a dictionary made of pairs
_MAX_ODD_KEYS = 1_000  # tuples and fractions, whose hashes can be made to collide
# Tensors may share numbers (EVA-02's rotary tables do), but not so that all of them take this many
# times the file's size, and so many bytes more.
_UNFOLD, _SPARE = 4, 1 << 26
_OLD_MAGIC = 0x1950A86A20F9469CFC6C  # first number of torch's old format (torch/serialization.py)
_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_PLAIN = (str, bytes, bool, type(None))
_REMEDIES = {
    "pickle": "No flag opens such a .pkl file: ask for one of NumPy arrays alone, or a .pth.",
    "script": "Open it with torch.jit.load in a program of yours and save its state_dict().",
    "torch": "Only if you trust its author: --trust opens it, and may run code of theirs.",
}

Storage = Callable[[torch.dtype, str, int], torch.Tensor]


def load(path: Path) -> Any:
    """Return the content of a file: tensors and arrays as tensors, mapped where that can be.

    Args:
        path: a .pkl; or a torch file of either format; or a TorchScript archive, which gives
            {name: tensor} of its modules.

    Raises:
        InputError: it names something that is not on the list.
        Exception: one of pickle's, torch's, NumPy's or zipfile's, when the file is damaged or made
            to be costly.
    """
    with path.open("rb") as file:
        if path.suffix == ".pkl":
            content = _Unpickler(file, path, "pickle").load()
        else:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            archive = data[:4] == b"PK\3\4"
            content = _load_archive(path, data) if archive else _load_old(path, data)
    size_of(content, {})
    return dict(_tensors_of(content)) if isinstance(content, _Module) else content


def _place(part: zipfile.ZipInfo, data: mmap.mmap) -> slice:
    """Return where a part of a zip file stands in it; it is as its checksum says."""
    if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
        raise zipfile.BadZipFile(f"its part {part.filename} is compressed")
    lengths = struct.unpack_from("<HH", data, part.header_offset + 26)
    start = part.header_offset + 30 + sum(lengths)
    place = slice(start, start + part.file_size)
    if zlib.crc32(memoryview(data)[place]) != part.CRC:
        raise zipfile.BadZipFile(f"the checksum of its part {part.filename} is wrong")
    return place


def _load_archive(path: Path, data: mmap.mmap) -> Any:
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: part for part in archive.infolist()}

    def storage(dtype: torch.dtype, key: str, count: int) -> torch.Tensor:
        place = _place(parts[f"{folder}data/{key}"], data)
        if place.stop - place.start != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"part {key} has another size than it says")
        if not count:
            return torch.empty(0, dtype=dtype)
        if place.start % dtype.itemsize:  # torch aligns them
            return torch.frombuffer(bytearray(data[place]), dtype=dtype)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=place.start)

    described = [name for name in parts if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(described) != 1:
        raise zipfile.BadZipFile("it has no description of its tensors")
    folder = described[0].removesuffix("data.pkl")
    order = parts.get(f"{folder}byteorder")
    if order is not None and data[_place(order, data)] != b"little":
        raise pickle.UnpicklingError("its numbers are in another byte order")
    kind = "script" if f"{folder}constants.pkl" in parts else "torch"
    unpickler = _Unpickler(io.BytesIO(data[_place(parts[described[0]], data)]), path, kind, storage)
    content = unpickler.load()
    if kind == "script" and not isinstance(content, _Module):
        raise pickle.UnpicklingError(f"a {type(content).__name__} and no module")
    return content


def _load_old(path: Path, data: mmap.mmap) -> Any:
    """Read the format of torch before 1.6: five pickles, then the numbers of every storage."""
    unpickler = _Unpickler(data, path, "torch", lambda dtype, _, n: torch.empty(n, dtype=dtype))
    if unpickler.load() != _OLD_MAGIC:
        raise pickle.UnpicklingError("no torch file")
    _, system, content, keys = (unpickler.load() for _ in range(4))
    if not system["little_endian"]:
        raise pickle.UnpicklingError("its numbers are in another byte order")
    for key in keys:
        values = unpickler.storages.pop(key) if isinstance(key, str) else torch.empty(0)
        (count,) = struct.unpack("<q", data.read(8))
        raw = data.read(values.nbytes)
        if count != values.numel() or len(raw) != values.nbytes:
            raise pickle.UnpicklingError("it ends too early")
        if count:
            values.copy_(torch.frombuffer(bytearray(raw), dtype=values.dtype))
    if unpickler.storages:
        raise pickle.UnpicklingError("numbers of its tensors are missing")
    return content


class _Module:
    """Stands for a module of TorchScript: its attributes by name."""

    attributes: dict[str, Any]


class _DType:
    """Stands for numpy.dtype: a type of numbers and a byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _SCALARS:
            raise pickle.UnpicklingError(f"arrays of type {code!r} are not weights")
        self.value = np.dtype(code)

    def array(self, raw: Any, shape: Any, column_major: bool) -> torch.Tensor:
        data = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2's bytes are text
        array = np.frombuffer(data, self.value).reshape(shape, order="F" if column_major else "C")
        return torch.from_numpy(array.astype(self.value.newbyteorder("="), order="C"))


class _Steps(dict[int, Any]):
    """What an unpickler does at each opcode; every look-up counts."""

    left = _MAX_STEPS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError("it has no end")
        return super().__getitem__(code)


def _key(key: Any) -> Any:
    """Return the key of a dictionary if hashing it, or many like it, takes no time."""
    for part in key if type(key) is tuple and len(key) <= 8 else (key,):
        number = isinstance(part, int | float) and abs(part) < 1 << 53  # hash(n) is n only there
        if not number and type(part) not in _PLAIN:
            raise pickle.UnpicklingError(f"a key of type {type(key).__name__} that is no plain one")
    return key


def _few(items: Any) -> Any:
    if len(items) > _MAX_ITEMS:
        raise pickle.UnpicklingError("a container of one piece")
    return items


def _mapping(items: Any = ()) -> collections.OrderedDict[Any, Any]:
    """Stand for OrderedDict, to which Python 2 gave its pairs, and for Counter."""
    pairs = items.items() if isinstance(items, dict) else _few(items)
    return collections.OrderedDict((_key(key), value) for key, value in pairs)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how protocol 2 writes bytes
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _first(value: Any, *_: Any) -> Any:
    return value


_NAMES: dict[str, Any] = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.Tensor": _first,
    "torch.Size": _first,
    "torch.device": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda function, _, arguments, __: function(*arguments),
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "builtins.set": lambda items=(): {_key(each) for each in _few(items)},
    "argparse.Namespace": argparse.Namespace,
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",  # how protocol 2 writes no bytes at all
    "numpy.ndarray": _first,
    "numpy.dtype": _DType,
    "numpy._core.multiarray._reconstruct": lambda *_: torch.empty(0),  # BUILD fills it
    "numpy._core.multiarray.scalar": lambda dtype, raw: dtype.array(raw, (), False).item(),
}


class _Unpickler(pickle._Unpickler):
    """Makes what is on the list only. The C version lets ten bytes ask for a memo of gigabytes."""

    stack: list[Any]
    pop_mark: Any
    read: Any
    memo: dict[int, Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, path: Path, kind: str, storage: Storage | None = None) -> None:
        super().__init__(file, encoding="latin1")  # how Python 3 reads arrays of Python 2
        self.path, self.kind, self.storage = path, kind, storage
        self.storages: dict[str, torch.Tensor] = {}
        size = path.stat().st_size
        self.room = _UNFOLD * size + _SPARE
        self.odd_keys = 0
        self.__dict__["dispatch"] = _Steps(type(self).dispatch)

        def line() -> bytes:
            text = file.readline()
            if not text.endswith(b"\n"):
                raise EOFError("it ends too early")
            return text

        # whatever length the file claims, no more is allocated than it has
        self._file_read, self._file_readline = lambda count: file.read(min(count, size)), line

    def load(self) -> Any:
        try:
            return super().load()
        finally:
            self.memo = {}  # it holds methods of this object, which would hold the file

    def claim(self, size: int) -> None:
        """Count bytes that the content takes."""
        self.room -= size
        if size < 0 or self.room < 0:
            raise pickle.UnpicklingError("its tensors unfold to many times the size of the file")

    def find_class(self, module: str, name: str) -> Any:
        room = module.replace("__builtin__", "builtins").replace("numpy.core", "numpy._core")
        dotted = f"{room}.{name}"
        if dotted in _NAMES:
            return _NAMES[dotted]
        if dotted in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return self._tensor
        if dotted == "numpy._core.numeric._frombuffer":
            return lambda raw, dtype, shape, order: self._array(raw, dtype, shape, order == "F")
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "torch.jit._pickle" and self.kind == "script":  # wrapped round lists
            return _first
        if dotted.startswith("__torch__.") and self.kind == "script":
            return _Module
        expected = "expected tensors and plain values only"
        got = f"got the class {module}.{name}. {_REMEDIES[self.kind]}"
        raise InputError(f"checkpoint {self.path}: {expected}, {got}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        kind, dtype, key, _, count, *views = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not known or any(views) or self.storage is None:
            raise pickle.UnpicklingError("something else than numbers outside the description")
        if key not in self.storages:
            self.claim(count * dtype.itemsize)
            self.storages[key] = self.storage(dtype, key, count)
        values = self.storages[key]
        if values.dtype != dtype or values.numel() != count:
            raise pickle.UnpicklingError(f"part {key} has another size than it says")
        return values

    def _tensor(
        self, storage: Any, offset: int, size: Any, stride: Any, *others: Any
    ) -> torch.Tensor:
        if any(others[2:]):  # after requires_grad and hooks
            raise pickle.UnpicklingError("a tensor whose sign is not applied yet")
        self.claim(math.prod(size) * storage.element_size())
        return storage.as_strided(size, stride, offset)

    def _array(self, raw: Any, dtype: Any, shape: Any, column_major: bool) -> torch.Tensor:
        self.claim(len(raw))
        return dtype.array(raw, shape, column_major)

    def _build(self) -> None:
        """Give an object its state; on a function of ours it could change this module."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _DType):  # (version, byte order, subarray, names, fields, ...)
            if any(part is not None for part in state[2:5]):
                raise pickle.UnpicklingError("structured arrays are not weights")
            target.value = target.value.newbyteorder(state[1])
        elif isinstance(target, torch.Tensor):
            # (version, shape, dtype, column-major, bytes); the oldest files have no version
            shape, dtype, column_major, raw = state[-4:]
            target.data = self._array(raw, dtype, shape, column_major)
        elif isinstance(target, _Module) and all(isinstance(name, str) for name in state):
            target.attributes = dict(state)
        elif isinstance(target, argparse.Namespace):
            vars(target).update(state)
        elif type(target) is not collections.OrderedDict:  # its state: versions of modules
            raise pickle.UnpicklingError(f"a state for {type(target).__name__}")

    def _set(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.odd_keys += type(key) in (tuple, float)
            if self.odd_keys > _MAX_ODD_KEYS:
                raise pickle.UnpicklingError("too many keys that are tuples or fractions")
            self.stack[-1][_key(key)] = value

    def _set_one(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def _bytes(self) -> None:
        self.stack.append(self.read(*struct.unpack("<Q", self.read(8))))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("a set is no part of a weights file")

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_one
    dispatch[pickle.SETITEMS[0]] = lambda self: self._set(self.pop_mark())
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.BYTEARRAY8[0]] = _bytes  # the parent's makes room for what the file claims
    for _opcode in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        dispatch[_opcode[0]] = _refuse


def size_of(value: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many parts nested containers have, and how high they are.

    Args:
        value: the content of a file.
        known: sizes by id, empty at first.

    Raises:
        pickle.UnpicklingError: too many, containers that hold themselves, or a tensor that is
            sparse, quantized, nested or on no CPU.
    """
    if isinstance(value, torch.Tensor):
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized or value.is_nested:
            raise pickle.UnpicklingError("a tensor without plain numbers")
    inside = vars(value) if isinstance(value, argparse.Namespace | _Module) else value
    if not isinstance(inside, dict | list | tuple):
        return 1, 0
    if id(inside) not in known:
        known[id(inside)] = _MAX_PARTS, 0  # until all of it is known: it may hold itself
        each = inside.values() if isinstance(inside, dict) else inside
        found = [size_of(part, known) for part in each]
        known[id(inside)] = 1 + sum(n for n, _ in found), 1 + max((h for _, h in found), default=0)
    parts, height = known[id(inside)]
    if parts >= _MAX_PARTS or height > _MAX_HEIGHT:
        raise pickle.UnpicklingError("containers that hold themselves, or unfold to millions")
    return parts, height


def _tensors_of(module: _Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in module.attributes.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors_of(value, f"{prefix}{name}.")
