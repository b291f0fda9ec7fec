"""Damaged files and what each is told: one line, no code run, nothing left behind."""

import collections
import io
import json
import pickle
import struct
import zipfile

import pytest
import torch
from torch import nn

import converter
from vitdet import checkpoint
from vitdet.app import cli
from vitdet.convert import convert
from vitdet.convert.names import shapes_of
from vitdet.utils.checks import InputError

from .manifests import RECIPE, mae, vit

MAE = mae()


def saved(content, *, legacy=False):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def edited(change, method=zipfile.ZIP_STORED):
    """Return a torch file with other parts and right checksums."""
    with zipfile.ZipFile(io.BytesIO(saved({"model": MAE}))) as archive:
        parts = {each.filename: archive.read(each) for each in archive.infolist()}
    change(parts)
    return zipped(parts, method)


def zipped(parts, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def header(length=None, **changes):
    """Return a safetensors file of one tensor whose header lies."""
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}} | changes)
    return struct.pack("<Q", length or len(text)) + text.encode() + bytes(8)


def call(name):
    """Return a pickle that would call something, deep in an innocent content."""
    lines = "\n".join(name.rsplit(".", 1)).encode()
    return b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00wc" + lines + b"\n(Vtouch ran\ntRss."


def script(description):
    """Return an archive as torch.jit.save writes them, with one storage of two numbers."""
    parts = {"net/data/0": bytes(8), "net/data.pkl": b"\x80\x02" + description + b"."}
    return zipped(parts | {"net/constants.pkl": b"\x80\x02)."})


def tensor(key="0", count=2, size=(2,), stride=(1,)):
    """Return the pickle of a tensor in a storage."""

    def put(value):
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + put("storage") + b"ctorch\nFloatStorage\n" + put(key) + put("cpu") + put(count)
    rest = b"tQ" + put(0) + put(size) + put(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest


def module(attributes):
    """Return the pickle of a module with one attribute, `w`."""
    return b"c__torch__\nNet\n)\x81}(X\x01\x00\x00\x00w" + attributes + b"ub"


def endless():
    """Return modules each of which holds the next one twice: 2 ** 40 names."""
    text = module(tensor()) + b"q\x00"
    for i in range(40):
        get, put = b"h" + bytes([i]), b"q" + bytes([i + 1])
        both = b"X\x01\x00\x00\x00a" + get + b"X\x01\x00\x00\x00b" + get
        text += b"0" * (i > 0) + b"c__torch__\nNet\n)\x81" + put + b"}(" + both + b"ub"
    return text


def changed(**changes):
    """Return MAE's file with other weights, None takes one away; `bias` is one of them."""
    names = {"bias": "blocks.0.mlp.fc1.bias"}
    weights = MAE | {names.get(name, name): value for name, value in changes.items()}
    return saved({"model": {name: value for name, value in weights.items() if value is not None}})


def ours(**about):
    weights = {f"net.{name}": value for name, value in MAE.items() if "cls" not in name}
    return saved({"model": weights, "vitdet": about})


LOOP = {}
LOOP["model"] = {"model": LOOP}
WHOLE, BIAS = saved({"model": MAE}), MAE["blocks.0.mlp.fc1.bias"]
READ, CLASS = "it cannot be read", "expected tensors and plain values only, got the class "
# what is wrong, the file's suffix, what it holds, and some of the line
DAMAGED = [
    ("nothing", ".pth", b"", f"{READ} (it is empty)"),
    ("a text", ".pth", b"<html>404</html>", READ),
    ("cut", ".pth", WHOLE[:-2000], READ),
    ("cut in the old format", ".pth", saved({"model": MAE}, legacy=True)[:-100], READ),
    ("a flipped bit", ".pth", flipped(WHOLE, len(WHOLE) // 2), "the checksum of its part"),
    ("compressed", ".pth", edited(dict, zipfile.ZIP_DEFLATED), "is compressed"),
    ("a missing part", ".pth", edited(lambda parts: parts.pop("archive/data/0")), READ),
    ("no description", ".pth", edited(lambda parts: parts.pop("archive/data.pkl")), READ),
    ("two descriptions", ".pth", edited(lambda parts: parts.update({"b/data.pkl": b"."})), READ),
    ("another byte order", ".pth", edited(lambda p: p.update({"archive/byteorder": b"big"})), READ),
    ("a file in itself", ".pth", saved(LOOP), READ),
    ("numbers without end", ".pth", changed(bias=torch.zeros(1).expand(2**34)), "many times"),
    ("a sparse tensor", ".pth", changed(bias=BIAS.to_sparse()), "_rebuild_sparse_tensor"),
    ("no data", ".pth", changed(bias=BIAS.to("meta")), "_rebuild_meta_tensor_no_storage"),
    ("a deque", ".pkl", pickle.dumps({"x": collections.deque([1])}), f"{CLASS}collections.deque"),
    ("endless digits", ".pkl", b"}X\x01\x00\x00\x00wL" + b"9" * 200_000 + b"L\ns.", READ),
    ("code", ".pth", edited(lambda p: p.update({"archive/data.pkl": call("posix.system")})), CLASS),
    ("code in a script", ".pt", script(module(call("os.system")[2:-3])), f"{CLASS}os.system"),
    ("no module", ".pt", script(tensor()), READ),
    ("a storage that is missing", ".pt", script(module(tensor(key="7"))), READ),
    ("a storage of another size", ".pt", script(module(tensor(count=3))), READ),
    ("beyond its storage", ".pt", script(module(tensor(size=(2, 2), stride=(2, 1)))), READ),
    ("a repeated storage", ".pt", script(module(tensor(size=(10**12,), stride=(0,)))), READ),
    ("a negative size", ".pt", script(module(tensor(size=(-2,)))), READ),
    ("no names", ".pt", script(b"c__torch__\nNet\n)\x81}(K\x01K\x02ub"), READ),
    (
        "a module in itself",
        ".pt",
        script(b"c__torch__\nNet\n)\x81q\x00}(X\x01\x00\x00\x00wh\x00ub"),
        READ,
    ),
    ("modules without end", ".pt", script(endless()), READ),
    ("a header of terabytes", ".safetensors", header(2**40), READ),
    ("a shape of terabytes", ".safetensors", header(w={"dtype": "F32", "shape": [2**40]}), READ),
    ("an unknown type", ".safetensors", header(w={"dtype": "Q4", "shape": [2]}), READ),
    (
        "numbers elsewhere",
        ".safetensors",
        header(x={"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}),
        READ,
    ),
    ("a note that is no JSON", ".safetensors", header(__metadata__={"vitdet": "{"}), READ),
    ("no tensors", ".pth", saved({"model": {"a": 1}}), "expected tensors, got other things: a"),
    ("nothing known", ".pth", saved({"a": BIAS}), "format: expected one of vitdet, "),
    ("another shape", ".pth", changed(bias=BIAS[:3]), "expected (64,) (model), got (3,) (file)"),
    ("no dimension", ".pth", changed(pos_embed=torch.ones(())), "shape of net.pos_embed"),
    ("a name with a line", ".pth", changed(**{"blocks.0.a\nb": BIAS}), "(blocks.0.a b)"),
    ("a wrong list", ".pth", ours(initialised=3), "initialised: expected a list of names"),
]


@pytest.mark.parametrize(
    ("suffix", "data", "line"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED]
)
def test_damaged_files(suffix, data, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where code of a file would leave one named "ran"
    path, recipe = tmp_path / f"a{suffix}", tmp_path / "recipe.py"
    path.write_bytes(data)
    recipe.write_text(RECIPE)
    words = ["--source-model", str(path), "--output-model", str(tmp_path / "out.pth")]
    assert converter.main([*words, "--config-file", str(recipe)]) in (1, 2)
    error = capsys.readouterr().err
    assert line in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    assert cli.main(["inspect", str(path), "--no-recipes"]) in (0, 1, 2)
    assert capsys.readouterr().err.count("\n") <= 1
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, recipe.name]


# --- OpenAI's CLIP, a TorchScript archive --------------------------------------------------------


class Clip(nn.Module):
    """The names of a CLIP with an image tower of one block, and some of all a file can hold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        tower, block = nn.Module(), nn.Module()
        tower.class_embedding = nn.Parameter(torch.randn(16))
        tower.positional_embedding = nn.Parameter(torch.randn(17, 16))
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
        self.sizes, self.names = [1, 2], {"a": 1}

    def forward(self, x):
        return x * self.logit_scale


@pytest.mark.slow
def test_a_clip_archive_is_read_and_converts(tmp_path):
    path, expected = tmp_path / "ViT.pt", Clip().state_dict()
    torch.jit.script(Clip()).save(str(path))
    content = checkpoint.read(path)
    assert set(content) == set(expected)
    for name, value in expected.items():
        assert torch.equal(content[name], value), name
        assert content[name].dtype == value.dtype
    target = shapes_of(vit(depth=1, pre_norm=True).state_dict())
    output, report = convert(content, target)
    assert report.source_format == "clip"
    assert torch.equal(output["pos_embed"][0], expected["visual.positional_embedding"])
    assert torch.equal(output["patch_embed.proj.bias"], torch.zeros(16))
    assert report.dropped["input_resolution"] == "text tower"
    data = path.read_bytes()  # a changed byte is found
    place = data.index(expected["visual.conv1.weight"].numpy().tobytes())
    path.write_bytes(flipped(data, place))
    with pytest.raises(InputError, match="the checksum of its part"):
        checkpoint.read(path)
