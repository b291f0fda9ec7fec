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
from vitdet.convert.names import shapes_of
from vitdet.utils.checks import InputError


class Clip(nn.Module):
    """The names of a CLIP with an image tower of one block, and some of all a file can hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        tower, block = nn.Module(), nn.Module()
        tower.class_embedding = nn.Parameter(torch.randn(16))
        tower.positional_embedding = nn.Parameter(torch.randn(17, 16))
        tower.proj = nn.Parameter(torch.randn(16, 4))
        tower.conv1 = nn.Conv2d(3, 16, 16, stride=16, bias=False)
        tower.ln_pre, tower.ln_post = nn.LayerNorm(16), nn.LayerNorm(16)
        block.attn = nn.MultiheadAttention(16, 2)
        block.ln_1, block.ln_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        block.mlp = nn.Module()
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(16, 64), nn.Linear(64, 16)
        tower.transformer = nn.Module()
        tower.transformer.resblocks = nn.ModuleList([block])
        self.visual = tower.half()
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.register_buffer("input_resolution", torch.tensor(64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.tied, self.sizes, self.names = self.logit_scale, [1, 2], {"a": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.logit_scale


def test_a_clip_archive_is_read_and_converts(tmp_path: Path) -> None:
    path, expected = tmp_path / "ViT.pt", Clip().state_dict()
    torch.jit.script(Clip()).save(str(path))
    content = checkpoint.read(path)
    assert set(content) == set(expected)
    for name, value in expected.items():
        assert torch.equal(content[name], value), name
        assert content[name].dtype == value.dtype
    vit = ViT(embed_dim=16, depth=1, num_heads=2, pretrain_img_size=64, pre_norm=True)
    del content["empty"], content["tied"]
    output, report = convert(content, shapes_of(vit.state_dict()))
    assert report.source_format == "clip"
    assert torch.equal(output["pos_embed"][0], expected["visual.positional_embedding"])
    assert torch.equal(output["patch_embed.proj.bias"], torch.zeros(16))
    assert report.dropped["input_resolution"] == "text tower"
    data = bytearray(path.read_bytes())  # a changed byte is found
    data[bytes(data).index(expected["visual.proj"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="it cannot be read"):
        checkpoint.read(path)


# --- archives that no torch wrote ----------------------------------------------------------------


def tensor(key: str = "0", count: int = 2, size: Any = (2,), stride: Any = (1,)) -> bytes:
    """Return the pickle of a tensor in a storage."""

    def put(value: object) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + put("storage") + b"ctorch\nFloatStorage\n" + put(key) + put("cpu") + put(count)
    rest = b"tQ" + put(0) + put(size) + put(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest


def module(attributes: bytes) -> bytes:
    """Return the pickle of a module with one attribute, `w`."""
    return b"c__torch__\nNet\n)\x81}(X\x01\x00\x00\x00w" + attributes + b"ub"


def read(path: Path, description: bytes, method: int = zipfile.ZIP_STORED) -> dict[str, Any]:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("net/data/0", bytes(8))
        archive.writestr("net/data.pkl", b"\x80\x02" + description + b".")
        archive.writestr("net/constants.pkl", b"\x80\x02).")
    return checkpoint.read(path)


def endless() -> bytes:
    """Return modules each of which holds the next one twice: 2 ** 40 names."""
    text = module(tensor()) + b"q\x00"
    for i in range(40):
        get, put = b"h" + bytes([i]), b"q" + bytes([i + 1])
        both = b"X\x01\x00\x00\x00a" + get + b"X\x01\x00\x00\x00b" + get
        text += b"0" * (i > 0) + b"c__torch__\nNet\n)\x81" + put + b"}(" + both + b"ub"
    return text


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
    "modules without end": endless(),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_descriptions(tmp_path: Path, what: str) -> None:
    with pytest.raises(InputError, match=r"a\.pt: it cannot be read"):
        read(tmp_path / "a.pt", DAMAGED[what])


def test_archives_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert torch.equal(read(path, module(tensor()))["w"], torch.zeros(2))
    with pytest.raises(InputError, match="is compressed"):
        read(path, module(tensor()), zipfile.ZIP_DEFLATED)
    for wanted in ("posix.system", "builtins.eval", "torch.jit.load"):
        name = "\n".join(wanted.rsplit(".", 1)).encode()
        call = b"c" + name + b"\n(X\x09\x00\x00\x00touch ran\x74R"
        with pytest.raises(InputError, match=f"got the class {wanted}"):
            read(path, module(call))
