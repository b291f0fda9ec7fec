"""Weights files read without running anything, and why their weights do not fit a model.

torch.load(weights_only=True) runs nothing either, but it looks at no checksum, and hashes any key:
deep tuples end the process, and numbers made to collide keep it busy for hours.
"""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import math
import mmap
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from vitdet.utils.checks import InputError, one_line

_MAX_PARTS = 5_000_000  # of a content, shared ones counted wherever they stand
_MAX_HEIGHT = 64  # of nested containers
_MAX_ODD_KEYS = 1_000  # tuples and fractions, whose hashes can be made to collide
# Tensors may share numbers (EVA-02's rotary tables do), but not so that all of them take this many
# times the file's size, and so many bytes more.
_UNFOLD, _SPARE = 4, 1 << 26
_OLD_MAGIC = 0x1950A86A20F9469CFC6C  # first number of torch's old format (torch/serialization.py)
_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_REMEDY = (
    "Ask for weights alone. --trust opens a torch file, no .pkl and no TorchScript, and may run "
    "code of its author."
)

Storage = Callable[[torch.dtype, str, int], torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

# --- files ---------------------------------------------------------------------------------------


def load(path: Path, *, trust: bool = False) -> Any:
    """Return the content of a .pkl, a torch file of either format, or a TorchScript archive.

    Arrays become tensors, which are mapped where that can be; an archive gives {name: tensor}.
    `trust` lets torch.load open a torch file, which may run code of its author.

    Raises:
        InputError: it names something that is not on the list.
        Exception: one of pickle's, torch's, NumPy's or zipfile's, when the file is damaged or made
            to be costly.
    """
    with path.open("rb") as file:
        if path.suffix == ".pkl":
            content = _Unpickler(file, path).load()
        else:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            archive = data[:4] == b"PK\3\4"
            content = _load_archive(path, data, trust) if archive else _load_old(path, data, trust)
    _size_of(content, {})
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


def _load_archive(path: Path, data: mmap.mmap, trust: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: part for part in archive.infolist()}
    described = [name for name in parts if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(described) != 1:
        raise zipfile.BadZipFile("it has no description of its tensors")
    folder = described[0].removesuffix("data.pkl")
    script = f"{folder}constants.pkl" in parts
    if trust and not script:
        return torch.load(path, map_location="cpu", weights_only=False)

    def storage(dtype: torch.dtype, key: str, count: int) -> torch.Tensor:
        place = _place(parts[f"{folder}data/{key}"], data)
        if place.stop - place.start != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"part {key} has another size than it says")
        if not count:
            return torch.empty(0, dtype=dtype)
        if place.start % dtype.itemsize:  # torch aligns them
            return torch.frombuffer(bytearray(data[place]), dtype=dtype)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=place.start)

    order = parts.get(f"{folder}byteorder")
    if order is not None and data[_place(order, data)] != b"little":
        raise pickle.UnpicklingError("its numbers are in another byte order")
    description = io.BytesIO(data[_place(parts[described[0]], data)])
    content = _Unpickler(description, path, storage, script=script).load()
    if script and not isinstance(content, _Module):
        raise pickle.UnpicklingError(f"a {type(content).__name__} and no module")
    return content


def _load_old(path: Path, data: mmap.mmap, trust: bool) -> Any:
    """Read the format of torch before 1.6: five pickles, then the numbers of every storage."""
    if trust:
        return torch.load(path, map_location="cpu", weights_only=False)
    unpickler = _Unpickler(data, path, lambda dtype, _, n: torch.empty(n, dtype=dtype))
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


class _Module(dict[str, Any]):
    """Stands for a module of TorchScript: its attributes by name."""


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


def _line(file: Any) -> bytes:
    if not (text := file.readline()).endswith(b"\n"):
        raise EOFError("it ends too early")
    return text


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how protocol 2 writes bytes
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _first(value: Any, *_: Any) -> Any:
    return value


_STORAGES = {
    **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8},
    **{"Byte": torch.uint8, "Bool": torch.bool, "BFloat16": torch.bfloat16},
    "ComplexFloat": torch.complex64,
}
# Nothing else that a file names is made, and none of this is what it names.
_NAMES: dict[str, Any] = {
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **dict.fromkeys(
        (
            *("torch.Tensor", "torch.Size", "torch.device", "torch.nn.parameter.Parameter"),
            *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
            "numpy.ndarray",
        ),
        _first,
    ),
    "torch._tensor._rebuild_from_type_v2": lambda function, _, arguments, __: function(*arguments),
    "argparse.Namespace": argparse.Namespace,
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",  # how protocol 2 writes no bytes at all
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

    def __init__(
        self, file: Any, path: Path, storage: Storage | None = None, *, script: bool = False
    ) -> None:
        super().__init__(file, encoding="latin1")  # how Python 3 reads arrays of Python 2
        self.path, self.storage, self.script = path, storage, script
        self.storages: dict[str, torch.Tensor] = {}
        self.odd_keys, size = 0, path.stat().st_size
        self.room = _UNFOLD * size + _SPARE
        # whatever length the file claims, no more is allocated than it has
        self._file_read = lambda count: file.read(min(count, size))
        self._file_readline = lambda: _line(file)

    def load(self) -> Any:
        try:
            return super().load()
        finally:
            self.memo = {}  # it holds methods of this object, which would hold the file

    def find_class(self, module: str, name: str) -> Any:
        room = module.replace("__builtin__", "builtins").replace("numpy.core", "numpy._core")
        known = _NAMES | {  # not kept: it holds this object
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "numpy._core.numeric._frombuffer": lambda raw, dtype, shape, order: self._array(
                raw, dtype, shape, order == "F"
            ),
            "collections.OrderedDict": self._mapping,
            "collections.Counter": self._mapping,
        }
        if f"{room}.{name}" in known:
            return known[f"{room}.{name}"]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if self.script and module == "torch.jit._pickle":  # wrapped round lists
            return _first
        if self.script and module.startswith("__torch__"):
            return _Module
        raise InputError(
            f"checkpoint {self.path}: expected tensors and plain values only, got the class "
            f"{module}.{name}. {_REMEDY}"
        )

    def persistent_load(self, pid: Any) -> torch.Tensor:
        kind, dtype, key, _, count, *views = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not known or any(views) or self.storage is None:
            raise pickle.UnpicklingError("something else than numbers outside the description")
        if key not in self.storages:
            self.storages[key] = self.storage(dtype, key, count)
        return self.storages[key]

    def _claim(self, size: int) -> None:
        """Count bytes that the content takes."""
        self.room -= abs(size)
        if self.room < 0:
            raise pickle.UnpicklingError("its tensors unfold to many times the size of the file")

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *more: Any) -> Any:
        if any(more[2:]):  # after requires_grad and hooks
            raise pickle.UnpicklingError("a tensor whose sign is not applied yet")
        self._claim(math.prod(size) * storage.element_size())
        return storage.as_strided(size, stride, offset)

    def _array(self, raw: Any, dtype: Any, shape: Any, column_major: bool) -> torch.Tensor:
        self._claim(len(raw))
        return dtype.array(raw, shape, column_major)

    def _mapping(self, items: Any = ()) -> collections.OrderedDict[Any, Any]:
        """Stand for OrderedDict, to which Python 2 gave its pairs, and for Counter."""
        made: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        for key, value in items.items() if isinstance(items, dict) else items:
            made[self._key(key)] = value
        return made

    def _key(self, key: Any) -> Any:
        """Return the key of a dictionary if hashing it, and many like it, takes no time."""
        self.odd_keys += type(key) in (tuple, float)
        if self.odd_keys > _MAX_ODD_KEYS:
            raise pickle.UnpicklingError("too many keys that are tuples or fractions")
        for part in key if type(key) is tuple and len(key) <= 8 else (key,):
            number = isinstance(part, int | float) and abs(part) < 1 << 53  # hash(n) is n there
            if not number and type(part) not in (str, bytes, bool, type(None)):
                raise pickle.UnpicklingError(f"a key of type {type(key).__name__}")
        return key

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
            target.update(state)
        elif isinstance(target, argparse.Namespace):
            vars(target).update(state)
        elif type(target) is not collections.OrderedDict:  # its state: versions of modules
            raise pickle.UnpicklingError(f"a state for {type(target).__name__}")

    def _set(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][self._key(key)] = value

    def _set_one(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def _bytes(self) -> None:
        self.stack.append(self.read(*struct.unpack("<Q", self.read(8))))

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_one
    dispatch[pickle.SETITEMS[0]] = lambda self: self._set(self.pop_mark())
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.BYTEARRAY8[0]] = _bytes  # the parent's makes room for what the file claims
    for _opcode in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[_opcode[0]]


def _size_of(value: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many parts nested containers have, and how high they are; refuse odd tensors."""
    if isinstance(value, torch.Tensor):
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized or value.is_nested:
            raise pickle.UnpicklingError("a tensor without plain numbers")
    inside = vars(value) if isinstance(value, argparse.Namespace) else value
    if not isinstance(inside, dict | list | tuple):
        return 1, 0
    if id(inside) not in known:
        known[id(inside)] = _MAX_PARTS, 0  # until all of it is known: it may hold itself
        each = inside.values() if isinstance(inside, dict) else inside
        found = [_size_of(part, known) for part in each]
        known[id(inside)] = 1 + sum(n for n, _ in found), 1 + max((h for _, h in found), default=0)
    parts, height = known[id(inside)]
    if parts >= _MAX_PARTS or height > _MAX_HEIGHT:
        raise pickle.UnpicklingError("containers that hold themselves, or unfold to millions")
    return parts, height


def _tensors_of(module: _Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in module.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors_of(value, f"{prefix}{name}.")


# --- names, rows and shapes ----------------------------------------------------------------------

_BLOCK = re.compile(r"^(?:.*\.)?blocks\.(\d+)\.")
_ROWS = re.compile(r"(.+)\[(\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*)\]$")
_SIZE = "Use the recipe of its size."
# (name, what its first dimension counts, entries that are not counted, remedy)
_COUNTS = (
    (re.compile(r"patch_embed\.proj\.weight$"), "channels (embed_dim)", 0, _SIZE),
    (
        re.compile(r"box_predictor\.(\d+\.)?cls_score\.weight$"),
        *("classes", 1, "Use a recipe, or lists, with its classes, or convert its backbone alone."),
    ),
)


def without_data(value: Any) -> Any:
    """Return tensors on the meta device, in mappings too, so that the data can go."""
    if isinstance(value, Mapping):
        return {name: without_data(each) for name, each in value.items()}
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def some(names: Collection[str], count: int = 3) -> str:
    """Return the first names as text, with dots when there are more."""
    shown = one_line(", ".join(str(name) for name in list(names)[:count]))
    return shown + (", ..." if len(names) > count else "")


def rows_of(entry: str) -> tuple[str, list[range]] | None:
    """Read "name[0-3,7]": rows of a tensor that a file leaves to the model's own initialisation.

    Returns:
        (name, rising ranges of rows), no ranges when the numbers do not rise; None for a name.
    """
    found = _ROWS.match(entry)
    if found is None:
        return None
    ends = [part.partition("-") for part in found[2].split(",")]
    rows = [range(int(a), int(b or a) + 1) for a, _, b in ends]
    rising = all(rows) and all(a.stop <= b.start for a, b in itertools.pairwise(rows))
    return found[1], rows if rising else []


def rows_entry(name: str, rows: Sequence[int]) -> str:
    """Write rising row numbers as `rows_of` reads them."""
    ends: list[list[int]] = []
    for row in rows:
        if ends and row == ends[-1][1] + 1:
            ends[-1][1] = row
        else:
            ends.append([row, row])
    return f"{name}[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in ends)}]"


def _blocks(names: Iterable[str]) -> int:
    return len({found[1] for found in map(_BLOCK.match, names) if found})


def compare_sizes(given: Shapes, target: Shapes, *, source: str) -> None:
    """Raise InputError when a file (`given`) and a model differ in width, depth or classes."""
    for pattern, what, spare, remedy in _COUNTS:
        for name in filter(pattern.search, given):
            have, want = given[name], target.get(name, given[name])
            if have and want and have[0] != want[0]:
                numbers = f"file has {have[0] - spare} {what}, model {want[0] - spare}"
                raise InputError(f"{source}: {numbers}. {remedy}")
    blocks, wanted = _blocks(given), _blocks(target)
    if blocks and wanted and blocks != wanted:
        raise InputError(f"{source}: file has {blocks} blocks, model {wanted}. {_SIZE}")


def compare_shapes(given: Shapes, target: Shapes, *, source: str, remedy: str) -> None:
    """Raise InputError when a name that both have has two shapes; sizes are named as sizes."""
    compare_sizes(given, target, source=source)
    wrong = [name for name in given if name in target and given[name] != target[name]]
    if wrong:
        more = f" (and of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        shapes = f"expected {target[wrong[0]]} (model), got {given[wrong[0]]} (file)"
        raise InputError(f"{source}: shape of {wrong[0]}{more}: {shapes}. {remedy}")
