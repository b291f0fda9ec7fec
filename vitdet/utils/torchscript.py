"""Read the tensors of a TorchScript archive without running the program in it.

The archive is a zip file: `data.pkl` describes the modules and their attributes, `data/0`,
`data/1`, ... hold the numbers, and `code/` the program, which is not even opened. Nothing that the
description names is imported or called: modules become the stand-in below, tensors are rebuilt from
their bytes, anything else is refused.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from vitdet.utils.safe_pickle import ForbiddenError, Unpickler, error_of, ordered

_END = struct.Struct("<4s18x")  # of a zip file without a comment
_FOLDER_BIT = 0x10  # of MS-DOS, in a zip entry's external attributes
_PIECE = 1 << 22
_MAX_DEPTH = 64
_MAX_MODULES = 100_000
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Module:
    """Stands for a scripted module: its attributes by name."""

    attributes: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise error_of("a module without attributes")
        self.attributes = state


def _rebuild(
    storage: torch.Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: object,
) -> torch.Tensor:
    """Return the view of a storage; one that repeats elements could claim any size."""
    if not isinstance(storage, torch.Tensor) or math.prod(size) > storage.numel():
        raise error_of("a tensor larger than its storage")
    return torch.as_strided(storage, size, stride, offset)


def _value(value: object, *_: object) -> object:
    # lists are wrapped in calls that tell their type
    return value


def check_archive(path: Path) -> tuple[bool, bytes]:
    """Check every part of the zip file that torch.save or torch.jit.save writes.

    Returns:
        Whether it is a TorchScript archive, and else the pickle that describes its tensors.

    Raises:
        zipfile.BadZipFile: zipfile and torch could read it differently, a part is not what its
            checksum says, or it unfolds to more than the file.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        names = [part.filename for part in parts]
        file.seek(-_END.size, io.SEEK_END)
        end, *_ = _END.unpack(file.read())
        if end != b"PK\5\6" or archive.comment:
            raise zipfile.BadZipFile("something is appended to it")
        if len({name.casefold() for name in names}) < len(names):
            raise zipfile.BadZipFile("it has two parts of one name")
        # torch reads nothing from a part with this bit, and gives whatever its memory holds
        if any(part.external_attr & _FOLDER_BIT for part in parts):
            raise zipfile.BadZipFile("one of its parts calls itself a folder")
        script = any(name.endswith("/constants.pkl") for name in names)
        stored = [part for part in parts if not script or "/code/" not in part.filename]
        swells = sum(part.file_size for part in stored) > path.stat().st_size
        if swells or any(part.compress_type for part in stored):
            raise zipfile.BadZipFile("it is compressed, as no torch file is")
        if script:
            return True, b""
        # torch.load does not look at the checksums that torch.save wrote
        for part in parts:
            try:
                with archive.open(part) as content:
                    while content.read(_PIECE):
                        pass
            except (zipfile.BadZipFile, EOFError) as error:
                text = f"the checksum of its part {part.filename} is wrong"
                raise zipfile.BadZipFile(text) from error
        described = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(described) != 1:
            raise zipfile.BadZipFile("it has no description of its tensors")
        return False, archive.read(described[0])


def load(path: Path) -> dict[str, torch.Tensor]:
    """Return {name: tensor} of the parameters, buffers and tensor attributes of an archive.

    Raises:
        ForbiddenError: it names anything but modules and tensors.
        Exception: one of pickle's, torch's or zipfile's, when the file is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(member.compress_size for member in archive.infolist()) > path.stat().st_size:
            raise error_of("its parts overlap")
        described = [name for name in archive.namelist() if name.count("/") == 1]
        (name,) = [name for name in described if name.endswith("/data.pkl")]
        reader = _Reader(archive, name.removesuffix(".pkl"), _stored(archive, name))
        root = reader.load()
    if not isinstance(root, _Module):
        raise error_of(f"a {type(root).__name__} and no module")
    return _collect(root)


class _Reader(Unpickler):
    """Reads the description, and the numbers where it speaks of them."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, description: bytes) -> None:
        super().__init__(io.BytesIO(description), encoding="utf-8")
        self._archive = archive
        self._folder = folder
        self._storages: dict[str, torch.Tensor] = {}

    builds = (_Module,)

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        dotted = f"{module}.{name}"
        if dotted in _NAMES:
            return _NAMES[dotted]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise ForbiddenError(dotted)

    def persistent_load(self, pid: Any) -> torch.Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise error_of("something else than numbers outside the description")
        if key not in self._storages:
            data = _stored(self._archive, f"{self._folder}/{key}")
            # An empty tensor has no bytes, and torch takes no empty buffer.
            numbers = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0)
            self._storages[key] = numbers.to(dtype)
        storage = self._storages[key]
        if storage.dtype != dtype or storage.numel() != count:
            raise error_of(f"a storage of another size or type than it says ({key})")
        return storage


_NAMES: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch.jit._pickle.restore_type_tag": _value,
    "torch.jit._pickle.build_intlist": _value,
    "torch.jit._pickle.build_doublelist": _value,
    "torch.jit._pickle.build_boollist": _value,
    "torch.jit._pickle.build_tensorlist": _value,
    "torch.device": _value,
    "collections.OrderedDict": ordered,
}


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    # torch compresses the program only: what is stored as it is cannot swell
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise error_of(f"its part {name} is compressed")
    return archive.read(info)


def _collect(root: _Module) -> dict[str, torch.Tensor]:
    """Return the tensors in modules; modules may hold the same module many times, or themselves."""
    tensors: dict[str, torch.Tensor] = {}
    waiting = [("", root, 0)]
    for _ in range(_MAX_MODULES):
        if not waiting:
            return tensors
        prefix, module, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            break
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
    raise error_of("modules without end")
