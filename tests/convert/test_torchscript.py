"""TorchScript archives: their tensors without their program."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitdet import checkpoint
from vitdet.backbones.vit import ViT
from vitdet.convert import convert
from vitdet.utils.checks import InputError


class Tower(nn.Module):
    """The names of a CLIP image tower of one block, and something of everything a file can hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.class_embedding = nn.Parameter(torch.randn(16))
        self.positional_embedding = nn.Parameter(torch.randn(17, 16))
        self.proj = nn.Parameter(torch.randn(16, 4))
        self.conv1 = nn.Conv2d(3, 16, 16, stride=16, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(16), nn.LayerNorm(16)
        block = nn.Module()
        block.attn = nn.MultiheadAttention(16, 2)
        block.ln_1, block.ln_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        block.mlp = nn.Module()
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(16, 64), nn.Linear(64, 16)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([block])
        self.sizes = [1, 2]
        self.names = {"a": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(x)


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Tower().half()
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.register_buffer("input_resolution", torch.tensor(64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.tied = self.logit_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "ViT.pt"
    torch.jit.script(Clip()).save(str(path))
    return path


def test_tensors_are_those_of_the_program(archive: Path) -> None:
    expected = Clip().state_dict()
    content = checkpoint.read(archive)
    assert set(content) == set(expected)
    for name, value in expected.items():
        assert torch.equal(content[name], value), name
        assert content[name].dtype == value.dtype


def test_a_clip_archive_converts(archive: Path) -> None:
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "pretrain_img_size": 64}
    vit = ViT(**sizes, pre_norm=True)
    target = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    content = checkpoint.read(archive)
    del content["empty"], content["tied"]
    output, report = convert(content, target)
    assert report.source_format == "clip"
    assert torch.equal(output["pos_embed"][0], Clip().visual.positional_embedding)
    assert torch.equal(output["patch_embed.proj.bias"], torch.zeros(16))
    assert report.dropped["input_resolution"] == "text tower"


def test_a_changed_byte_is_found(archive: Path) -> None:
    data = bytearray(archive.read_bytes())
    place = bytes(data).index(Clip().visual.proj.detach().numpy().tobytes())
    data[place] ^= 1
    archive.write_bytes(data)
    with pytest.raises(InputError, match="it cannot be read"):
        checkpoint.read(archive)


# --- archives that no torch wrote ----------------------------------------------------------------


def tensor(key: str = "0", count: int = 2, size: Any = (2,), stride: Any = (1,)) -> bytes:
    """Return the pickle of a tensor in a storage."""

    def put(value: object) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + put("storage") + b"ctorch\nFloatStorage\n" + put(key) + put("cpu") + put(count)
    arguments = (
        storage + b"tQ" + put(0) + put(size) + put(stride) + b"\x89ccollections\nOrderedDict\n)R"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def module(attributes: bytes, name: bytes = b"__torch__\nNet") -> bytes:
    """Return the pickle of a module with one attribute, `w`."""
    return b"c" + name + b"\n)\x81}(X\x01\x00\x00\x00w" + attributes + b"ub"


def write(path: Path, description: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("net/data/0", bytes(8))
        archive.writestr("net/data.pkl", b"\x80\x02" + description + b".")
        archive.writestr("net/constants.pkl", b"\x80\x02).")
    return path


def test_a_small_archive_by_hand(tmp_path: Path) -> None:
    content = checkpoint.read(write(tmp_path / "a.pt", module(tensor())))
    assert torch.equal(content["w"], torch.zeros(2))


FORBIDDEN: dict[str, bytes] = {
    "posix.system": b"cposix\nsystem\n(X\x09\x00\x00\x00touch ran\nXtR",
    "builtins.eval": b"cbuiltins\neval\n(X\x01\x00\x00\x001tR",
    "torch.jit.load": b"ctorch.jit\nload\n",
}


@pytest.mark.parametrize("wanted", FORBIDDEN)
def test_nothing_else_is_named(tmp_path: Path, wanted: str) -> None:
    path = write(tmp_path / "a.pt", module(FORBIDDEN[wanted]))
    with pytest.raises(InputError, match=rf"got the class {wanted}.*torch\.jit\.load"):
        checkpoint.read(path)


DAMAGED: dict[str, bytes] = {
    "no module": tensor(),
    "a storage that is missing": module(tensor(key="7")),
    "a storage of another size": module(tensor(count=3)),
    "a tensor beyond its storage": module(tensor(size=(2, 2), stride=(2, 1))),
    "a tensor that repeats its storage": module(tensor(size=(10**12,), stride=(0,))),
    "a negative size": module(tensor(size=(-2,))),
    "a state for a function": module(b"ctorch._utils\n_rebuild_tensor_v2\n}b"),
    "attributes without names": b"c__torch__\nNet\n)\x81}(K\x01K\x02ub",
    "a module in itself": b"c__torch__\nNet\n)\x81q\x00}(X\x01\x00\x00\x00wh\x00ub",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_descriptions(tmp_path: Path, what: str) -> None:
    path = write(tmp_path / "a.pt", DAMAGED[what])
    with pytest.raises(InputError, match=r"a\.pt: it cannot be read") as error:
        checkpoint.read(path)
    assert "\n" not in str(error.value)


def test_a_compressed_archive(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", module(tensor()), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="is compressed"):
        checkpoint.read(path)


def test_modules_without_end(tmp_path: Path) -> None:
    # every module holds the next one twice: 2 ** 40 names
    text = module(tensor()) + b"q\x00"
    for i in range(40):
        inner = bytes([i])
        text = b"0" + text if i else text
        text += b"c__torch__\nNet\n)\x81q" + bytes([i + 1])
        text += b"}(X\x01\x00\x00\x00ah" + inner + b"X\x01\x00\x00\x00bh" + inner + b"ub"
    with pytest.raises(InputError, match="it cannot be read"):
        checkpoint.read(write(tmp_path / "a.pt", text))
