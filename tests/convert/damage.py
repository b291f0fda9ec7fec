"""Damaged weights files, one for every seed: what `test_fuzz.py` feeds to the commands.

A seed gives the same file on every machine with the same torch. Files are tiny.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitdet import checkpoint
from vitdet.backbones.vit import ViT
from vitdet.convert import export

Weights = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 2}
SIZES |= {"pretrain_img_size": 32, "use_rel_pos": True, "window_size": 1}


@dataclass(frozen=True)
class Damaged:
    """A file and how it came to be.

    Attributes:
        path: the file.
        kind: name of the damage.
        ran: appears when code in the file has run.
    """

    path: Path
    kind: str
    ran: Path


@cache
def _whole() -> dict[str, dict[str, Any]]:
    """Return contents of whole files, as formats have them."""
    torch.manual_seed(0)
    model = ViT(**SIZES)
    ours = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    plain = {name: value for name, value in ours.items() if "rel_pos" not in name}
    tokens = {"cls_token": torch.ones(1, 1, 8), "norm.weight": torch.ones(8)}
    mae = plain | tokens | {"norm.bias": torch.zeros(8)}
    about = {"format": 1, "source_format": "mae", "initialised": ["blocks.0.attn.rel_pos_h"]}
    detector = {f"backbone.net.{name}": value for name, value in ours.items()}
    detector["roi_heads.box_predictor.cls_score.weight"] = torch.ones(4, 2)
    sam, _ = export(ours, "sam", allow_inexact=True)
    hf, _ = export(ours, "hf_vitdet")
    return {
        "ours": {"model": ours, "vitdet": about},
        "training": {"model": ours, "vitdet": about | {"class_names": ["a"]}, "images_seen": 5},
        "mae": {"model": mae, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
        "timm": mae | {"head.weight": torch.ones(2, 8), "head.bias": torch.ones(2)},
        "detectron2": {"model": detector, "iteration": 7},
        "mmdet": {"state_dict": {f"backbone.{n}": v for n, v in ours.items()}, "meta": {}},
        "sam": {f"image_encoder.{name}": value for name, value in sam.items()},
        "hf": hf,
        "ddp": {f"module.{name}": value for name, value in mae.items()},
        "ema": {"model": plain, "ema_state": ours, "trainer": {"a": [1, (2.0, "b")]}},
    }


def _copy(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with containers of its own."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}


def _weights(content: dict[str, Any]) -> Weights:
    """Return the innermost dictionary of tensors, for changing."""
    for key in ("model", "state_dict"):
        if key in content:
            return content[key]
    return content


# --- files ----------------------------------------------------------------------------------------


def _arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy() if value.dtype != torch.bfloat16 else value.float().numpy()
    if isinstance(value, dict):
        return {key: _arrays(each) for key, each in value.items() if key != "args"}
    return value


def _torch_bytes(content: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _safetensors_bytes(content: dict[str, Any], folder: Path) -> bytes:
    path = folder / "whole.safetensors"
    about = {"vitdet": content["vitdet"]} if "vitdet" in content else {}
    tensors = {str(k): v for k, v in _weights(content).items() if isinstance(v, torch.Tensor)}
    checkpoint.write(path, {"model": tensors} | about)
    data = path.read_bytes()
    path.unlink()
    return data


@cache
def _torchscript_bytes() -> bytes:
    """Return an archive as torch.jit.save writes them, made by hand: no compiler is needed."""

    class Module(nn.Module):
        pass

    Module.__module__, Module.__qualname__ = "__torch__", "Module"
    buffer = io.BytesIO()
    names = b"visual.conv1.weight", b"visual.ln_post.bias"
    items = b"".join(
        b"X" + struct.pack("<I", len(name)) + name + _script_tensor(i)
        for i, name in enumerate(names)
    )
    description = b"\x80\x02c__torch__\nModule\n)\x81}(" + items + b"ub."
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("clip/data.pkl"), description)
        archive.writestr(zipfile.ZipInfo("clip/constants.pkl"), b"\x80\x02).")
        archive.writestr(zipfile.ZipInfo("clip/code/__torch__.py"), "class Module(Module): pass")
        for i in range(len(names)):
            archive.writestr(zipfile.ZipInfo(f"clip/data/{i}"), np.ones(2, np.float32).tobytes())
    return buffer.getvalue()


def _script_tensor(index: int) -> bytes:
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00%dX\x03\x00\x00\x00cpu"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    rest = b"K\x02tQK\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    return rebuild + pid % index + rest


def _file(choose: random.Random, content: dict[str, Any], folder: Path) -> tuple[bytes, str]:
    """Return the content as the bytes of some container, and the suffix."""
    kind = choose.choice(("torch", "torch", "legacy", "safetensors", "pickle", "pickle"))
    if kind == "torch":
        return _torch_bytes(content), choose.choice((".pth", ".pt", ".bin", ".ckpt"))
    if kind == "legacy":
        return _torch_bytes(content, legacy=True), ".pth"
    if kind == "safetensors":
        return _safetensors_bytes(content, folder), ".safetensors"
    protocol = choose.randrange(pickle.HIGHEST_PROTOCOL + 1)
    return pickle.dumps(_arrays(content), protocol=protocol), ".pkl"


def _some_content(choose: random.Random) -> dict[str, Any]:
    return _copy(_whole()[choose.choice(list(_whole()))])


# --- damage to bytes ------------------------------------------------------------------------------


def _bytes_damage(choose: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    place = choose.randrange(len(damaged))
    way = choose.choice(("truncate", "flip", "flip", "many", "zero", "cut", "insert", "double"))
    if way == "truncate":
        del damaged[place:]
    elif way in ("flip", "many"):
        for _ in range(1 if way == "flip" else choose.randrange(2, 40)):
            damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
    elif way == "zero":
        end = min(len(damaged), place + choose.randrange(1, 64))
        damaged[place:end] = bytes(end - place)
    elif way == "cut":
        del damaged[place : place + choose.randrange(1, 64)]
    elif way == "insert":
        damaged[place:place] = choose.randbytes(choose.randrange(1, 16))
    else:
        damaged += damaged[place:]
    return bytes(damaged)


def damaged_bytes(choose: random.Random, folder: Path, ran: Path) -> tuple[bytes, str]:
    """Truncated, flipped, cut, zeroed, doubled."""
    if choose.random() < 0.15:
        return _bytes_damage(choose, _torchscript_bytes()), ".pt"
    data, suffix = _file(choose, _some_content(choose), folder)
    return _bytes_damage(choose, data), suffix


def damaged_parts(choose: random.Random, folder: Path, ran: Path) -> tuple[bytes, str]:
    """A torch archive with a damaged part and right checksums."""
    script = choose.random() < 0.3
    whole = _torchscript_bytes() if script else _torch_bytes(_some_content(choose))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {member.filename: archive.read(member) for member in archive.infolist()}
    name = choose.choice([n for n in parts if n.endswith("data.pkl")] * 5 + list(parts))
    if choose.random() < 0.1:
        del parts[name]
    elif parts[name]:
        parts[name] = _bytes_damage(choose, parts[name])
    if choose.random() < 0.05:
        parts["../../evil" if choose.random() < 0.5 else "/evil"] = b"x"
    return _zipped(parts), ".pt"


def _zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def damaged_header(choose: random.Random, folder: Path, ran: Path) -> tuple[bytes, str]:
    """A safetensors file whose header lies."""
    data = _safetensors_bytes(_some_content(choose), folder)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = choose.choice([key for key in header if key != "__metadata__"])
    way = choose.choice(("shape", "huge", "dtype", "offsets", "length", "about", "deep", "none"))
    if way == "shape":
        header[name]["shape"] = [choose.choice((-1, 0, 1, 3, 2**31, 2**63)) for _ in range(3)]
    elif way == "huge":
        header[name]["shape"] = [2**20, 2**20]
    elif way == "dtype":
        header[name]["dtype"] = choose.choice(("F64", "I8", "F8_E4M3", "Q4", "", 3, "BOOL"))
    elif way == "offsets":
        header[name]["data_offsets"] = [choose.randrange(-5, 10**6) for _ in range(2)]
    elif way == "about":
        header["__metadata__"] = {"vitdet": choose.choice(("{", "[]", "3", '{"initialised": 3}'))}
    elif way == "deep":
        header["__metadata__"] = {"vitdet": "[" * choose.choice((100, 100_000))}
    elif way == "none":
        header = choose.choice(({}, [], {"a": 1}, {"__metadata__": {}}))
    text = json.dumps(header).encode()
    claimed = choose.choice((0, 2**40, 2**63, 1)) if way == "length" else len(text)
    return struct.pack("<Q", claimed) + text + data[8 + length :], ".safetensors"


# --- damage to content ----------------------------------------------------------------------------


def _odd_tensor(choose: random.Random, tensor: torch.Tensor) -> Any:
    """Return something that is not the tensor that was there."""
    shape = [choose.randrange(5) for _ in range(choose.randrange(6))]
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    if _is_huge(tensor) or not plain or tensor.device.type != "cpu":
        return torch.zeros(shape)  # it is odd already
    ways: list[Callable[[], Any]] = [
        lambda: torch.zeros(shape),
        lambda: torch.zeros(()),
        lambda: torch.zeros(0),
        tensor.flatten,
        lambda: tensor.unsqueeze(0),
        lambda: tensor.transpose(0, -1) if tensor.ndim else tensor,
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
        lambda: tensor * float("nan"),
        lambda: tensor / 0,
        lambda: tensor.to(choose.choice((torch.int64, torch.bool, torch.complex64, torch.uint8))),
        lambda: tensor.to(choose.choice((torch.float16, torch.bfloat16, torch.float64))),
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: torch.zeros(1).expand(2 ** choose.choice((10, 34, 60))),
        lambda: torch.zeros(1).expand(*tensor.shape[:-1], 2**33) if tensor.ndim else tensor,
        lambda: nn.Parameter(tensor.float()),
        tensor.to_sparse,
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.empty_like(tensor, device="meta"),
        lambda: None,
        lambda: choose.choice((3, 1.5, "text", b"bytes", [1], (2,), {}, {"a": 1}, True)),
        lambda: {"weight": tensor},
    ]
    return choose.choice(ways)()


_NAMES = (
    *("", "a", ".", "weight", "../x", "line\nbreak", "\x1b[31m", "é" * 50, "x" * 100_000),
    *("blocks.99999999999999999999.attn.qkv.weight", "blocks.-1.norm1.weight", "pos_embed"),
    *("blocks.0.ls1.gamma", "module.module.a", "net.patch_embed.proj.weight", "cls_token"),
    *("blocks.0.attn.q_bias", "rope.freqs_cos", "relative_position_index", "layer1.0.proj.weight"),
)


def odd_content(choose: random.Random, folder: Path, ran: Path) -> tuple[bytes, str]:
    """Wrong shapes and types, extra and missing keys, other names, other nesting."""
    content = _some_content(choose)
    for _ in range(choose.choice((1, 1, 1, 2, 5))):
        weights = _weights(content)
        names = list(weights)
        name = choose.choice(names) if names else "a"
        way = choose.choice(("value", "value", "missing", "extra", "rename", "nest", "alias"))
        if way == "value" and isinstance(weights.get(name), torch.Tensor):
            weights[name] = _odd_tensor(choose, weights[name])
        elif way == "missing":
            weights.pop(name, None)
        elif way == "extra":
            odd: Any = choose.choice(_NAMES) if choose.random() < 0.9 else choose.choice((3, None))
            weights[odd] = torch.ones(choose.randrange(1, 4))
        elif way == "rename":
            weights[choose.choice(_NAMES) + choose.choice(("", name))] = weights.pop(name, None)
        elif way == "alias":
            weights[choose.choice(_NAMES)] = weights.get(name)
        else:
            key = choose.choice(("model", "state_dict", "net", "module", "teacher", "x", "ema"))
            content = {key: content} | choose.choice(({}, {"model": {}}, {"vitdet": 3}))
    return _torch_or_pickle(choose, content, folder)


def odd_about(choose: random.Random, folder: Path, ran: Path) -> tuple[bytes, str]:
    """A file of ours whose notes on itself are wrong."""
    content = _copy(_whole()["ours"])
    entry = "blocks.0.attn.qkv.bias"
    initialised = choose.choice(
        (
            *(3, None, "abc", {}, [3], [None], [[]], [entry], ["absent"], [f"{entry}[0]"]),
            *([f"{entry}[0-999999999]"], [f"{entry}[7-3]"], [f"{entry}[{'9' * 5000}]"]),
            *([f"{entry}[0,0]"], [f"absent[{choose.randrange(9)}]"], ["[0]"], [entry + "["]),
        )
    )
    content["vitdet"] = choose.choice(
        (
            *(3, None, [], "x", {}, {"initialised": initialised}),
            *({"initialised": initialised, "format": 99}, {"class_names": initialised}),
            {"source_format": initialised, "initialised": initialised},
        )
    )
    return _torch_or_pickle(choose, content, folder)


def _torch_or_pickle(choose: random.Random, content: Any, folder: Path) -> tuple[bytes, str]:
    kinds = [
        lambda: (_torch_bytes(content), ".pth"),
        lambda: (_torch_bytes(content, legacy=True), ".bin"),
        lambda: (pickle.dumps(_arrays(content)), ".pkl"),
        lambda: (_safetensors_bytes(content, folder), ".safetensors"),
    ]
    choose.shuffle(kinds)
    if _is_huge(content):
        return _torch_bytes(content), ".pth"  # the others would write every repetition
    for kind in kinds:
        try:
            return kind()
        except (TypeError, RuntimeError, ValueError, AttributeError, KeyError, MemoryError):
            continue  # this container cannot hold it
    return _torch_bytes({"model": {}}), ".pth"


def _is_huge(value: Any) -> bool:
    """Whether there is a tensor that repeats numbers without end."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 2**24
    return isinstance(value, dict) and any(_is_huge(each) for each in value.values())


def cyclic(choose: random.Random, folder: Path, ran: Path) -> tuple[bytes, str]:
    """Containers that hold themselves, or each other many times."""
    content = _some_content(choose)
    weights = _weights(content)
    way = choose.randrange(7)
    if way == 0:
        content["self"] = content
    elif way == 1:
        weights["model"] = weights  # type: ignore[assignment]
    elif way == 2:
        ring: list[Any] = []
        ring.append(ring)
        content[choose.choice(("model", "state_dict", "x"))] = ring
    elif way == 3:
        part: Any = [1]
        for _ in range(60):
            part = choose.choice(([part, part], {"a": part, "b": part}, (part, part)))
        content["x"] = part
    elif way == 4:
        loop: dict[str, Any] = {}
        loop["model"] = {"model": loop, "state_dict": loop}
        content = loop
    elif way == 5:
        deep: Any = torch.ones(1)
        for _ in range(choose.choice((50, 70, 400))):
            deep = choose.choice(([deep], {"model": deep}, (deep,)))
        content["model"] = deep
    else:
        inner: Any = weights
        content = {"vitdet": inner, "model": inner, "state_dict": {"model": inner}}
    if choose.random() < 0.5:
        return _torch_bytes(content), ".pth"
    protocol = choose.randrange(pickle.HIGHEST_PROTOCOL + 1)
    return pickle.dumps(content if way in (2, 3, 5) else _arrays_once(content), protocol), ".pkl"


def _arrays_once(content: dict[str, Any]) -> dict[str, Any]:
    """Replace tensors by arrays in containers that may hold themselves, in place of copies."""
    done: dict[int, Any] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.numpy()
        if isinstance(value, argparse.Namespace):
            return None
        if not isinstance(value, dict):
            return value
        if id(value) not in done:
            done[id(value)] = {}
            done[id(value)] |= {}
            for key, each in value.items():
                done[id(value)][key] = walk(each)
        return done[id(value)]

    return walk(content)


# --- code -----------------------------------------------------------------------------------------

_CALLS = (
    *("posix.system", "os.system", "builtins.eval", "builtins.exec", "builtins.open"),
    *("builtins.__import__", "builtins.getattr", "subprocess.call", "subprocess.Popen"),
    *("pathlib.Path.touch", "shutil.copyfile", "numpy.load", "numpy.fromfile", "torch.load"),
    *("torch.hub.load", "torch.jit.load", "importlib.import_module", "runpy.run_path"),
    *("vitdet.checkpoint.write", "vitdet.utils.weights_files.load", "operator.attrgetter"),
    *("functools.partial", "types.FunctionType", "collections.Counter", "numpy.memmap"),
    *("numpy.core.multiarray._reconstruct", "torch._utils._rebuild_tensor_v2", "_codecs.encode"),
    *("torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2", "codecs.open"),
    *("collections.OrderedDict", "builtins.bytearray", "torch.storage._load_from_bytes"),
)


def code(choose: random.Random, folder: Path, ran: Path) -> tuple[bytes, str]:
    """A pickle that would call something."""
    name = choose.choice(_CALLS)
    module, _, attribute = name.rpartition(".")
    call = choose.choice((f"touch {ran}", f"open({str(ran)!r}, 'w')", str(ran)))
    text = _text(call)
    way = choose.randrange(6)
    if way == 0:
        body = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n(" + text + b"tR"
    elif way == 1:
        body = b"(" + text + b"i" + module.encode() + b"\n" + attribute.encode() + b"\n"
    elif way == 2:
        body = _text(module) + _text(attribute) + b"\x93(" + text + b"tR"
    elif way == 3:
        body = b"(c" + module.encode() + b"\n" + attribute.encode() + b"\n" + text + b"o"
    elif way == 4:
        body = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n(" + text + b"t\x81"
    else:
        body = b"c" + module.encode() + b"\n" + attribute.encode() + b"\n)R}" + text + b"K\x01sb"
    if choose.random() < 0.5:  # a value deep in an innocent file
        body = b"}" + _text("model") + b"}" + _text("w") + body + b"ss"
    data = b"\x80\x04" + body + b"."
    container = choose.randrange(4)
    if container == 0:
        return data, ".pkl"
    if container == 1:
        return _zipped({"archive/data.pkl": data, "archive/version": b"3\n"}), ".pth"
    if container == 2:
        parts = {"a/data.pkl": data, "a/constants.pkl": b"\x80\x02).", "a/version": b"3\n"}
        return _zipped(parts), ".pt"
    return data, choose.choice((".pth", ".bin"))


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


class _Objects:
    """Something that a file should not bring."""

    def __init__(self) -> None:
        self.values = [1]


def objects(choose: random.Random, folder: Path, ran: Path) -> tuple[bytes, str]:
    """A file with other classes than tensors beside the weights or among them."""
    odd = choose.choice(
        (
            *(datetime.date(2022, 3, 30), Path("x"), _Objects(), collections.Counter("aab")),
            *(nn.Linear(1, 1), np.array(["a"]), np.array([1, "a"], dtype=object), {1, 2}, 1j),
            *(np.zeros(2, dtype=[("a", "f4")]), range(3), slice(1), np.ma.ones(2), Ellipsis),
            *(torch.device("cpu"), torch.float16, torch.Size([1]), np.random.default_rng(0)),
            *(collections.defaultdict(list), collections.deque([1]), np.datetime64("2020-01-01")),
        )
    )
    content = _some_content(choose)
    choose.choice((content, _weights(content)))[choose.choice(("odd", "model", "pos_embed"))] = odd
    if choose.random() < 0.5:
        return _torch_bytes(content), ".pth"
    return pickle.dumps(_arrays(content)), ".pkl"


# --- bombs ----------------------------------------------------------------------------------------


def bomb(choose: random.Random, folder: Path, ran: Path) -> tuple[bytes, str]:
    """A small file that claims or unfolds to a large one."""
    ways = (_deflated, _overlapping, _claimed, _memo, _number, _shared_bytes, _script_modules)
    return choose.choice(ways)(choose)


def _deflated(choose: random.Random) -> tuple[bytes, str]:
    parts = {"a/data.pkl": b"\x80\x02}.", "a/version": b"3\n", "a/data/0": bytes(3_000_000)}
    if choose.random() < 0.5:
        parts["a/constants.pkl"] = b"\x80\x02)."
    kind = choose.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    return _zipped(parts, kind), ".pth"


def _overlapping(choose: random.Random) -> tuple[bytes, str]:
    """Let many entries of a zip file's directory point at the same bytes."""
    whole = bytearray(_zipped({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(20_000)}))
    end = whole.rindex(b"PK\x05\x06")
    start = whole.index(b"PK\x01\x02")
    entry = bytes(whole[whole.rindex(b"PK\x01\x02") : end])
    copies = choose.choice((10, 1000))
    directory = bytes(whole[start:end]) + entry * copies
    tail = bytearray(whole[end:])
    struct.pack_into("<HHII", tail, 8, copies + 2, copies + 2, len(directory), start)
    return bytes(whole[:start]) + directory + bytes(tail), choose.choice((".pth", ".pt"))


def _claimed(choose: random.Random) -> tuple[bytes, str]:
    """Let a zip file's directory claim gigabytes."""
    whole = bytearray(_torch_bytes(_whole()["mae"]))
    place = whole.rindex(b"PK\x01\x02")
    for offset in choose.choice(((20,), (24,), (20, 24))):
        struct.pack_into("<I", whole, place + offset, choose.choice((2**31, 2**32 - 1, 10**9)))
    return bytes(whole), ".pth"


def _memo(choose: random.Random) -> tuple[bytes, str]:
    """Claim a memo, a string or a tuple of gigabytes."""
    bodies = (
        b"\x80\x04\x8e\x00\x00\x00\x00\x10\x00\x00\x00abc.",
        b"\x80\x04B\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8d\x00\x00\x00\x00\x00\x01\x00\x00abc.",
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"\x80\x04]" + b"q\x00h\x00" * 2000 + b".",
        b"\x80\x04" + b"(" * 5000 + b"t" * 5000 + b".",
        b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00abc.",
    )
    return choose.choice(bodies), choose.choice((".pkl", ".pth"))


def _number(choose: random.Random) -> tuple[bytes, str]:
    """A number of thousands of digits."""
    digits = b"9" * choose.choice((4000, 200_000))
    value = choose.choice((b"L" + digits + b"L\n", b"I" + digits + b"\n", b"F" + digits + b"\n"))
    return b"}" + _text("w") + value + b"s.", choose.choice((".pkl", ".pth"))


def _shared_bytes(choose: random.Random) -> tuple[bytes, str]:
    """Many arrays on the same bytes, or a tensor that repeats one number."""
    if choose.random() < 0.5:
        tensors = {f"w{i}": torch.zeros(1).expand(2**28) for i in range(20)}
        return _torch_bytes({"model": tensors}), ".pth"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01J"
        + struct.pack("<i", 1 << 18)
        + b"\x85cnumpy\ndtype\nX\x02\x00\x00\x00f4K\x00K\x01\x87R"
        + b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89h\x00tb"
    )
    data = b"B" + struct.pack("<i", 1 << 20) + bytes(1 << 20) + b"q\x000}"
    for i in range(choose.choice((100, 300))):
        data += _text(f"w{i}") + array + b"s"
    return b"\x80\x03" + data + b".", ".pkl"


def _script_modules(choose: random.Random) -> tuple[bytes, str]:
    """Modules of a TorchScript archive that hold each other twice, or themselves."""
    new = b"c__torch__\nModule\n)\x81"
    body = new + b"}(" + _text("w") + _script_tensor(0) * choose.randrange(2) + b"ub"
    if body.count(b"Q") == 0:
        body = new + b"}b"
    if choose.random() < 0.3:
        body = new + b"q\x01}(" + _text("a") + b"h\x01" + _text("b") + b"h\x01ub"
    else:
        for level in range(2, 50):
            put = b"r" + struct.pack("<I", level)
            get = b"j" + struct.pack("<I", level)
            body = body + put + b"0" + new + b"}(" + _text("a") + get + _text("b") + get + b"ub"
    parts = {"a/data.pkl": b"\x80\x02" + body + b".", "a/constants.pkl": b"\x80\x02)."}
    parts["a/data/0"] = np.ones(2, np.float32).tobytes()
    return _zipped(parts), ".pt"


Maker = Callable[[random.Random, Path, Path], tuple[bytes, str]]
MAKERS: tuple[Maker, ...] = (
    *(damaged_bytes, damaged_bytes, damaged_bytes, damaged_parts, damaged_parts, damaged_header),
    *(odd_content, odd_content, odd_content, odd_about, cyclic, code, objects, bomb),
)


def damaged(seed: int, folder: Path) -> Damaged:
    """Write the file of a seed into a folder; its name tells the seed and the damage."""
    choose = random.Random(seed)
    maker = choose.choice(MAKERS)
    ran = folder / "ran"
    data, suffix = maker(choose, folder, ran)
    path = folder / f"{seed}_{maker.__name__}{suffix}"
    path.write_bytes(data)
    return Damaged(path, maker.__name__, ran)
