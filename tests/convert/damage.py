"""Damaged weights files, one for every seed, the same on every machine with the same torch."""

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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitdet import checkpoint
from vitdet.backbones.vit import ViT
from vitdet.convert import export

SIZES: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depth": 1, "num_heads": 2}
SIZES |= {"pretrain_img_size": 32, "use_rel_pos": True, "window_size": 1}
Content = dict[str, Any]
Made = tuple[bytes, str]  # what a file holds, and its suffix


@cache
def _whole() -> dict[str, Content]:
    """Return contents of whole files, as formats have them."""
    torch.manual_seed(0)
    ours = {name: torch.randn_like(value) for name, value in ViT(**SIZES).state_dict().items()}
    plain = {name: value for name, value in ours.items() if "rel_pos" not in name}
    mae = plain | {"cls_token": torch.ones(1, 1, 8), "norm.weight": torch.ones(8)}
    mae |= {"norm.bias": torch.zeros(8)}
    about = {"format": 1, "source_format": "mae", "initialised": ["blocks.0.attn.rel_pos_h"]}
    detector = {f"backbone.net.{name}": value for name, value in ours.items()}
    detector["roi_heads.box_predictor.cls_score.weight"] = torch.ones(4, 2)
    sam, _ = export(ours, "sam", allow_inexact=True)
    return {
        "ours": {"model": ours, "vitdet": about | {"class_names": ["a"]}, "images_seen": 5},
        "mae": {"model": mae, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
        "timm": mae | {"head.weight": torch.ones(2, 8), "head.bias": torch.ones(2)},
        "detectron2": {"model": detector, "iteration": 7},
        "mmdet": {"state_dict": {f"backbone.{n}": v for n, v in ours.items()}, "meta": {}},
        "sam": {f"image_encoder.{name}": value for name, value in sam.items()},
        "hf": export(ours, "hf_vitdet")[0],
        "ddp": {f"module.{name}": value for name, value in mae.items()},
        "ema": {"model": plain, "ema_state": ours, "trainer": {"a": [1, (2.0, "b")]}},
    }


def _some(choose: random.Random) -> Content:
    """Return the content of a whole file, with containers of its own."""
    content = _whole()[choose.choice(list(_whole()))]
    return {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}


def _weights(content: Content) -> Content:
    return next((content[key] for key in ("model", "state_dict") if key in content), content)


# --- containers ----------------------------------------------------------------------------------


def _arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, dict):
        return {key: _arrays(each) for key, each in value.items() if key != "args"}
    return value


def _torch(content: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _safetensors(content: Content, folder: Path) -> bytes:
    path = folder / "whole.safetensors"
    about = {"vitdet": content["vitdet"]} if "vitdet" in content else {}
    tensors = {str(k): v for k, v in _weights(content).items() if isinstance(v, torch.Tensor)}
    checkpoint.write(path, {"model": tensors} | about)
    data = path.read_bytes()
    path.unlink()
    return data


def _zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _script() -> bytes:
    """Return an archive as torch.jit.save writes them, made by hand: no compiler is needed."""
    rebuild = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + _text("storage") + b"ctorch\nFloatStorage\n"
    )
    rest = _text("cpu") + b"K\x02tQK\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    tensors = [rebuild + _text(str(i)) + rest for i in (0, 1)]
    names = "visual.conv1.weight", "visual.ln_post.bias"
    items = b"".join(_text(name) + value for name, value in zip(names, tensors, strict=True))
    parts = {"clip/data.pkl": b"\x80\x02c__torch__\nModule\n)\x81}(" + items + b"ub."}
    parts |= {"clip/constants.pkl": b"\x80\x02).", "clip/code/__torch__.py": b"class Module: pass"}
    return _zipped(parts | {f"clip/data/{i}": np.ones(2, np.float32).tobytes() for i in (0, 1)})


def _file(choose: random.Random, content: Any, folder: Path) -> Made:
    """Return the content in a container that can hold it."""
    kinds: list[Callable[[], Made]] = [
        lambda: (_torch(content), choose.choice((".pth", ".pt", ".bin", ".ckpt"))),
        lambda: (_torch(content, legacy=True), ".pth"),
        lambda: (_safetensors(content, folder), ".safetensors"),
        lambda: (pickle.dumps(_arrays(content), choose.randrange(6)), ".pkl"),
    ]
    if _is_huge(content):
        return kinds[0]()  # the others would write every repetition
    choose.shuffle(kinds)
    for kind in kinds:
        try:
            return kind()
        except (TypeError, RuntimeError, ValueError, AttributeError, KeyError, MemoryError):
            continue  # this container cannot hold it
    return _torch({"model": {}}), ".pth"


def _is_huge(value: Any) -> bool:
    """Whether there is a tensor that repeats numbers without end."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 2**24
    return isinstance(value, dict) and any(map(_is_huge, value.values()))


# --- damage --------------------------------------------------------------------------------------


def _damaged(choose: random.Random, data: bytes) -> bytes:
    damaged, place = bytearray(data), choose.randrange(len(data))
    way, end = choose.randrange(6), place + choose.randrange(1, 64)
    if way == 0:
        del damaged[place:]
    elif way == 1:
        damaged[place:end] = bytes(len(damaged[place:end]))
    elif way == 2:
        del damaged[place:end]
    elif way == 3:
        damaged[place:place] = choose.randbytes(choose.randrange(1, 16))
    else:
        for _ in range(1 if way == 4 else choose.randrange(2, 40)):
            damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
    return bytes(damaged)


def damaged_bytes(choose: random.Random, folder: Path, ran: Path) -> Made:
    """Truncated, flipped, cut, zeroed."""
    script = choose.random() < 0.15
    data, suffix = (_script(), ".pt") if script else _file(choose, _some(choose), folder)
    return _damaged(choose, data), suffix


def damaged_parts(choose: random.Random, folder: Path, ran: Path) -> Made:
    """A torch archive with a damaged part and right checksums."""
    whole = _script() if choose.random() < 0.3 else _torch(_some(choose))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {member.filename: archive.read(member) for member in archive.infolist()}
    name = choose.choice([n for n in parts if n.endswith("data.pkl")] * 5 + list(parts))
    if choose.random() < 0.1:
        del parts[name]
    elif parts[name]:
        parts[name] = _damaged(choose, parts[name])
    if choose.random() < 0.1:
        parts[choose.choice(("../../evil", "/evil"))] = b"x"
    return _zipped(parts), ".pt"


def damaged_header(choose: random.Random, folder: Path, ran: Path) -> Made:
    """A safetensors file whose header lies."""
    data = _safetensors(_some(choose), folder)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = choose.choice([key for key in header if key != "__metadata__"])
    odd_sizes = [choose.choice((-1, 0, 1, 3, 2**31, 2**63)) for _ in range(3)]
    abouts = ("{", "[]", "3", '{"initialised": 3}', "[" * 100_000)
    changes: tuple[Callable[[], Any], ...] = (
        lambda: header[name].update(shape=choose.choice((odd_sizes, [2**20, 2**20]))),
        lambda: header[name].update(dtype=choose.choice(("F64", "F8_E4M3", "Q4", "", 3, "BOOL"))),
        lambda: header[name].update(data_offsets=[choose.randrange(-5, 10**6) for _ in range(2)]),
        lambda: header.update(__metadata__={"vitdet": choose.choice(abouts)}),
        header.clear,
    )
    choose.choice(changes)()
    text = json.dumps(header).encode()
    claimed = choose.choice((0, 2**40, 2**63)) if choose.random() < 0.1 else len(text)
    return struct.pack("<Q", claimed) + text + data[8 + length :], ".safetensors"


def _odd(choose: random.Random, tensor: Any) -> Any:
    """Return something that is not the tensor that was there."""
    shape = [choose.randrange(5) for _ in range(choose.randrange(6))]
    if not isinstance(tensor, torch.Tensor) or type(tensor) is not torch.Tensor or _is_huge(tensor):
        return torch.zeros(shape)  # it is odd already
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return torch.zeros(shape)
    types = (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn)
    ways: list[Callable[[], Any]] = [
        lambda: torch.zeros(shape),
        lambda: torch.zeros(0),
        tensor.flatten,
        lambda: tensor.unsqueeze(0),
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
        lambda: tensor * float("nan"),
        lambda: tensor / 0,
        lambda: tensor.to(choose.choice(types)),
        lambda: torch.zeros(1).expand(2 ** choose.choice((10, 34, 60))),
        lambda: nn.Parameter(tensor.float()),
        tensor.to_sparse,
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.empty_like(tensor, device="meta"),
        lambda: choose.choice((None, 3, 1.5, "text", b"bytes", [1], (2,), {}, {"a": 1}, True)),
    ]
    return choose.choice(ways)()


_NAMES = (
    *("", ".", "weight", "../x", "line\nbreak", "\x1b[31m", "é" * 50, "x" * 100_000, "pos_embed"),
    *("blocks.99999999999999999999.attn.qkv.weight", "blocks.-1.norm1.weight", "cls_token"),
    *("blocks.0.ls1.gamma", "module.module.a", "net.patch_embed.proj.weight", "rope.freqs_cos"),
    *("blocks.0.attn.q_bias", "relative_position_index", "layer1.0.proj.weight"),
)


def odd_content(choose: random.Random, folder: Path, ran: Path) -> Made:
    """Wrong shapes and types, extra and missing keys, other names, other nesting."""
    content = _some(choose)
    for _ in range(choose.choice((1, 1, 1, 2, 5))):
        weights = _weights(content)
        name, new = choose.choice(list(weights) or ["a"]), choose.choice(_NAMES)
        way = choose.randrange(7)
        if way < 2:
            weights[name] = _odd(choose, weights.get(name))
        elif way == 2:
            weights.pop(name, None)
        elif way == 3:
            odd: Any = choose.choice((new, new, new, 3, None))
            weights[odd] = torch.ones(choose.randrange(1, 4))
        elif way == 4:
            weights[new + choose.choice(("", str(name)))] = weights.pop(name, None)
        elif way == 5:
            weights[new] = weights.get(name)
        else:
            key = choose.choice(("model", "state_dict", "net", "module", "teacher", "x", "ema"))
            content = {key: content} | choose.choice(({}, {"model": {}}, {"vitdet": 3}))
    return _file(choose, content, folder)


def odd_about(choose: random.Random, folder: Path, ran: Path) -> Made:
    """A file of ours whose notes on itself are wrong."""
    entry = "blocks.0.attn.qkv.bias"
    rows = ("[0]", "[0-999999999]", "[7-3]", f"[{'9' * 5000}]", "[0,0]", "[")
    lists = [[entry + choose.choice(rows)], [3], [None], [[]], ["absent"], ["absent[1]"], ["[0]"]]
    names = choose.choice((3, None, "abc", {}, *lists))
    word = choose.choice(("initialised", "class_names", "source_format", "config"))
    about = choose.choice((3, None, [], "x", {}, *[{word: names, "format": 99}] * 5))
    return _file(choose, _whole()["ours"] | {"vitdet": about}, folder)


def cyclic(choose: random.Random, folder: Path, ran: Path) -> Made:
    """Containers that hold themselves, or each other many times."""
    content = _some(choose)
    ring: list[Any] = []
    ring.append(ring)
    part: Any = [1]
    deep: Any = torch.ones(1)
    for _ in range(60):
        part = choose.choice(([part, part], {"a": part, "b": part}, (part, part)))
        deep = choose.choice(([deep], {"model": deep}, (deep,)))
    loop: Content = {}
    loop["model"] = {"model": loop, "state_dict": loop}
    changes = ({"model": ring}, {"x": ring}, {"x": part}, {"model": deep}, {"self": loop}, loop)
    content |= choose.choice(changes)
    if choose.random() < 0.5:
        return _torch(content), ".pth"
    plain = {k: v for k, v in content.items() if k != "args" and not isinstance(v, torch.Tensor)}
    return pickle.dumps(plain, choose.randrange(6)), ".pkl"


_CALLS = (
    *("posix.system", "os.system", "builtins.eval", "builtins.exec", "builtins.open"),
    *("builtins.__import__", "builtins.getattr", "subprocess.Popen", "pathlib.Path.touch"),
    *("numpy.load", "numpy.fromfile", "torch.load", "torch.hub.load", "torch.jit.load"),
    *("importlib.import_module", "runpy.run_path", "vitdet.checkpoint.write", "codecs.open"),
    *("operator.attrgetter", "functools.partial", "types.FunctionType", "_codecs.encode"),
    *("numpy.core.multiarray._reconstruct", "torch._utils._rebuild_tensor_v2", "numpy.memmap"),
    *("torch._tensor._rebuild_from_type_v2", "torch.storage._load_from_bytes"),
)


def code(choose: random.Random, folder: Path, ran: Path) -> Made:
    """A pickle that would call something."""
    module, _, attribute = choose.choice(_CALLS).rpartition(".")
    call = _text(choose.choice((f"touch {ran}", f"open({str(ran)!r}, 'w')", str(ran))))
    lines = f"{module}\n{attribute}\n".encode()
    bodies = (
        b"c" + lines + b"(" + call + b"tR",
        b"(" + call + b"i" + lines,
        _text(module) + _text(attribute) + b"\x93(" + call + b"tR",
        b"(c" + lines + call + b"o",
        b"c" + lines + b"(" + call + b"t\x81",
        b"c" + lines + b")R}" + call + b"K\x01sb",
    )
    body = choose.choice(bodies)
    if choose.random() < 0.5:  # a value deep in an innocent file
        body = b"}" + _text("model") + b"}" + _text("w") + body + b"ss"
    data = b"\x80\x04" + body + b"."
    parts = {"a/data.pkl": data, "a/version": b"3\n"}
    script = parts | {"a/constants.pkl": b"\x80\x02)."}
    files = ((data, ".pkl"), (_zipped(parts), ".pth"), (_zipped(script), ".pt"), (data, ".bin"))
    return choose.choice(files)


class _Objects:
    """Something that a file should not bring."""


def objects(choose: random.Random, folder: Path, ran: Path) -> Made:
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
    content = _some(choose)
    choose.choice((content, _weights(content)))[choose.choice(("odd", "model", "pos_embed"))] = odd
    return choose.choice(((_torch(content), ".pth"), (pickle.dumps(_arrays(content)), ".pkl")))


def bomb(choose: random.Random, folder: Path, ran: Path) -> Made:
    """A small file that claims or unfolds to a large one."""
    parts = {"a/data.pkl": b"\x80\x02}.", "a/version": b"3\n", "a/data/0": bytes(3_000_000)}
    whole = bytearray(_zipped(parts | {"a/data/0": bytes(20_000)}))
    start, end = whole.index(b"PK\x01\x02"), whole.rindex(b"PK\x05\x06")
    entry, tail = bytes(whole[whole.rindex(b"PK\x01\x02") : end]), bytearray(whole[end:])
    directory = bytes(whole[start:end]) + entry * 1000  # many entries for the same bytes
    struct.pack_into("<HHII", tail, 8, 1003, 1003, len(directory), start)
    claimed = bytearray(_torch(_whole()["mae"]))
    for offset in (20, 24):
        place = claimed.rindex(b"PK\x01\x02") + offset
        struct.pack_into("<I", claimed, place, choose.choice((2**31, 2**32 - 1)))
    digits = b"9" * choose.choice((4000, 200_000))
    repeated = {f"w{i}": torch.zeros(1).expand(2**28) for i in range(20)}
    pickles = (
        b"\x80\x04\x8e\x00\x00\x00\x00\x10\x00\x00\x00abc.",  # a string of gigabytes
        b"\x80\x04B\xff\xff\xff\x7fabc.",
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a memo of gigabytes
        b"\x80\x04]" + b"q\x00h\x00" * 2000 + b".",
        b"\x80\x04" + b"(" * 5000 + b"t" * 5000 + b".",
        b"}" + _text("w") + choose.choice((b"L" + digits + b"L\n", b"I" + digits + b"\n")) + b"s.",
    )
    return choose.choice(
        (
            *((_zipped(parts, kind), ".pth") for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)),
            (bytes(whole[:start]) + directory + bytes(tail), choose.choice((".pth", ".pt"))),
            (bytes(claimed), ".pth"),
            (_torch({"model": repeated}), ".pth"),
            *((choose.choice(pickles), choose.choice((".pkl", ".pth"))) for _ in range(4)),
        )
    )


MAKERS: tuple[Callable[[random.Random, Path, Path], Made], ...] = (
    *(damaged_bytes, damaged_bytes, damaged_bytes, damaged_parts, damaged_parts, damaged_header),
    *(odd_content, odd_content, odd_content, odd_about, cyclic, code, objects, bomb),
)


def damaged(seed: int, folder: Path) -> tuple[Path, str, Path]:
    """Write the file of a seed; return it, its kind, and what appears when code in it has run."""
    choose = random.Random(seed)
    maker, ran = choose.choice(MAKERS), folder / "ran"
    data, suffix = maker(choose, folder, ran)
    path = folder / f"{seed}_{maker.__name__}{suffix}"
    path.write_bytes(data)
    return path, maker.__name__, ran
