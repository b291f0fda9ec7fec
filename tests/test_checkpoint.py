"""Reading without running anything, writing whole or not at all, loading exactly."""

import argparse
import collections
import datetime
import io
import pickle
import random
import time
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import largest_file
from vitdet import checkpoint
from vitdet.backbones.vit import ViT
from vitdet.utils.checks import InputError

ARRAYS = {
    "rows": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big_endian": np.array([1, 2], dtype=">i4"),
    "half": np.ones(2, np.float16),
    "number": np.array(3, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


def tiny(**changes):
    options = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2}
    options |= {"pretrain_img_size": 64, "use_rel_pos": True, "window_size": 2}
    return ViT(**options | changes)


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_of_arrays_gives_their_values(tmp_path, protocol):
    ordered = collections.OrderedDict(same=ARRAYS["rows"])
    content = {"model": ARRAYS, "ordered": ordered, "pair": (np.float64(2.5), np.bool_(True))}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = checkpoint.read(path)
    assert list(read["model"]) == list(ARRAYS)
    for name, array in ARRAYS.items():
        tensor = read["model"][name]
        assert tensor.dtype == torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).dtype
        assert (tensor.shape, tensor.numpy().tolist()) == (array.shape, array.tolist())
        assert tensor.is_contiguous()
    assert read["ordered"]["same"] is read["model"]["rows"]
    assert read["pair"] == (2.5, True)


def test_pickle_of_python_2(tmp_path):
    # the array's bytes are a text of Python 2, opcode U
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
    )
    array += np.array([1.5, -2.0], dtype="<f4").tobytes() + b"tb"
    path = tmp_path / "old.pkl"
    path.write_bytes(b"\x80\x02}U\x01w" + array + b"s.")
    assert checkpoint.read(path)["w"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_torch_files(tmp_path, suffix):
    """Of both formats, with what trainings leave in them beside weights."""
    content = {"state": {0: torch.ones(1), 7: {}}, None: 1, (1, "a"): 2, True: 3, 0.5: 4, b"x": 5}
    content["model"] = nn.BatchNorm2d(2).state_dict()  # has an attribute of its own
    content["args"] = argparse.Namespace(lr=np.float64(1e-3), sizes=[np.int64(2)])
    content |= {"extra": ARRAYS["columns"], "counter": collections.Counter("aab")}
    path = tmp_path / f"weights{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=suffix != ".bin")
    read = checkpoint.read(path)
    assert list(read) == list(content)
    assert list(read["state"]) == [0, 7]
    for name, value in content["model"].items():
        assert torch.equal(read["model"][name], value)
    assert (read["args"].lr, read["args"].sizes) == (1e-3, [2])
    assert read["extra"].tolist() == ARRAYS["columns"].tolist()
    assert read["counter"] == {"a": 2, "b": 1}


# Every one of these would touch the file {ran} if it were run.
FORBIDDEN = {
    "posix.system": b"cposix\nsystem\n(S'touch {ran}'\ntR.",
    "builtins.eval": b'cbuiltins\neval\n(S\'open("{ran}", "w")\'\ntR.',
    "os.system": b"(ios\nsystem\n.",
    "numpy.load": b"cnumpy\nload\n(S'{ran}'\ntR.",
    "torch.nn.modules.linear.Linear": b"ctorch.nn.modules.linear\nLinear\n(K\x01K\x01tR.",
    "builtins.getattr": b"cbuiltins\ngetattr\n(cos\npath\nS'join'\ntR.",
}


def test_a_forbidden_class_is_refused_by_name(tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "evil.pkl"
    for name, description in FORBIDDEN.items():
        path.write_bytes(description.replace(b"{ran}", str(ran).encode()))
        for trust in (False, True):
            with pytest.raises(InputError, match=f"the class {name}.*no .pkl and no TorchScript"):
                checkpoint.read(path, trust=trust)
    assert not ran.exists()
    path = tmp_path / "date.pth"
    for zipped in (True, False):
        content = {"w": torch.ones(1), "when": datetime.date(2022, 3, 30)}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=r"got the class datetime.date\. .*--trust"):
            checkpoint.read(path)
        assert checkpoint.read(path, trust=True)["when"].year == 2022


def _long(number):
    data = number.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _nested(opening, closing, count):
    return opening * count + closing * count


_LIST_OF_DEEP = b"](" + b"N" + b"\x85" * 100_000 + b"e\x85R"
# description of a content each, that a few bytes make costly or fatal for who reads it
HOSTILE = {
    "a key of deep tuples": b"}" + b"N" + b"\x85" * 100_000 + b"Ns.",
    "a dictionary of deep tuples": b"(" + b"N" + b"\x85" * 100_000 + b"Nd.",
    "deep tuples by marks": b"}" + _nested(b"(", b"t", 100_000) + b"Ns.",
    "a set of deep tuples": b"cbuiltins\nset\n" + _LIST_OF_DEEP + b".",
    "a new set of deep tuples": b"\x8f(" + b"N" + b"\x85" * 100_000 + b"\x90.",
    "a counter of deep tuples": b"ccollections\nCounter\n" + _LIST_OF_DEEP + b".",
    "numbers that collide": b"}("
    + b"".join(_long((2**61 - 1) * i) + b"N" for i in range(20_000))
    + b"u.",
    "pairs whose numbers collide": b"ccollections\nOrderedDict\n]("
    + b"".join(_long((2**61 - 1) * i) + b"N\x86" for i in range(20_000))
    + b"e\x85R.",
    "tuples as keys": b"}("
    + b"".join(_long(i) + _long(i) + b"\x86N" for i in range(20_000))
    + b"u.",
    "a list in itself": b"}X\x01\x00\x00\x00a]q\x01h\x01as.",
    "a dictionary in itself": b"}q\x01X\x01\x00\x00\x00ah\x01s.",
    "shared lists": b"}X\x01\x00\x00\x00a]q\x01"
    + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(1, 60))
    + b"s.",
    "a list as a key": b"}]Ns.",
    "a terabyte claimed": b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00abc.",
    "an array of a terabyte": b"\x96\x00\x00\x00\x00\x00\x01\x00\x00abc.",
    "a memo of gigabytes": b"Nr\xff\xff\xff\x7f.",
    # BUILD on an allowed function would let a file change this program
    "state for a function": b"cnumpy.core.multiarray\n_reconstruct\nN}S'x'\nK\x01s\x86b.",
    "object array": pickle.dumps({"w": np.array([1, "a"], dtype=object)}, protocol=2)[2:],
    "structured array": pickle.dumps({"w": np.zeros(2, dtype=[("a", "f4")])}, protocol=2)[2:],
    "text array": pickle.dumps({"w": np.array(["a"])}, protocol=2)[2:],
    "shape and bytes differ": pickle.dumps(np.ones(4), 2)[2:].replace(b"K\x04\x85", b"K\x05\x85"),
    "persistent id": b"Pother\n.",
    "deep tuples": b"(" * 200 + b"t" * 200 + b".",
}


def _as_torch(description):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + description)
        archive.writestr("a/version", b"3\n")
    return buffer.getvalue()


def _as_old_torch(description):
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(each, 2) for each in head) + b"\x80\x02" + description


def _as_script(description):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + description)
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    return buffer.getvalue()


CONTAINERS = {
    "a.pkl": lambda description: b"\x80\x02" + description,
    "a.pth": _as_torch,
    "a.bin": _as_old_torch,
    "a.pt": _as_script,
}


@pytest.mark.parametrize("file", CONTAINERS)
def test_hostile_pickle_is_one_line_in_bounded_time(tmp_path, file):
    path, started = tmp_path / file, time.process_time()
    for description in HOSTILE.values():
        path.write_bytes(CONTAINERS[file](description))
        with pytest.raises(InputError, match=r"checkpoint .*/a\.\w+: ") as error:
            checkpoint.read(path)
        assert str(error.value).isprintable()
    assert time.process_time() - started < 100  # a few; torch.load needs hours, or crashes


def test_what_is_read_is_as_the_checksums_say(tmp_path):
    """Also of an archive with something behind it or before it."""
    values, path = torch.linspace(1, 2, 64), tmp_path / "a.pth"
    torch.save({"w": values}, path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(values.numpy().tobytes()) + 7] ^= 1  # torch.load does not see it
    for before, after in ((b"", b""), (b"", b"x"), (_as_torch(b"}."), b"")):
        path.write_bytes(before + whole + after)
        assert torch.equal(checkpoint.read(path)["w"], values)
        path.write_bytes(before + bytes(damaged) + after)
        with pytest.raises(InputError, match="checksum of its part a/data/0 is wrong"):
            checkpoint.read(path)


def test_wrong_paths(tmp_path):
    (tmp_path / "weights.onnx").write_bytes(b"x")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    for name, message in {
        "absent.pth": "expected a file, got nothing there",
        "": "expected a file, got a folder",
        "weights.onnx": r"expected one of \.pth .* got \.onnx",
        "list.pth": "expected a dictionary, got list",
    }.items():
        with pytest.raises(InputError, match=message):
            checkpoint.read(tmp_path / name)
    content = {"model": {"w": torch.ones(1)}}
    for name, more, message in (
        ("a.pkl", {}, r"expected \.pth or \.safetensors, got \.pkl"),
        ("absent/a.pth", {}, r"folder of .*mkdir -p .*absent"),
        ("a.safetensors", {"optimizer": {}}, r"Write it to a \.pth file"),
    ):
        with pytest.raises(InputError, match=message):
            checkpoint.write(tmp_path / name, content | more)
    assert len(list(tmp_path.iterdir())) == 2


def _pickled(path, content):
    arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
    path.write_bytes(pickle.dumps({"model": arrays}, protocol=2))


WRITERS = {
    "a.pth": checkpoint.write,
    "a.safetensors": checkpoint.write,
    "a.pkl": _pickled,
}


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, name):
    path, choose, refused = tmp_path / name, random.Random(0), 0
    WRITERS[name](path, {"model": {"w": torch.arange(64.0), "v": torch.ones(3)}})
    whole = path.read_bytes()
    for length in sorted({*range(0, len(whole), 29), len(whole) - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"checkpoint .*{name}: it cannot be read"):
            checkpoint.read(path)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        try:
            assert isinstance(checkpoint.read(path), dict)
        except InputError:
            refused += 1
    assert refused > 10


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_written_content_comes_back(tmp_path, suffix):
    base = torch.arange(12.0).view(3, 4)
    model = {"whole": base, "view": base[1:], "turned": base.t(), "half": base.half()}
    about = {"format": 1, "source_format": "mae", "initialised": ["a.b", "c"]}
    path = tmp_path / f"weights{suffix}"
    checkpoint.write(path, {"model": model, "vitdet": about})
    read = checkpoint.read(path)
    assert set(read) == {"model", "vitdet"}
    assert read["vitdet"] == about
    for name, tensor in model.items():
        assert torch.equal(read["model"][name], tensor)
        assert read["model"][name].dtype == tensor.dtype
    assert checkpoint.weights_of(read, source="x")[1] == ["a.b", "c"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("size", [10_000, 3_000_000])  # within torch's buffer and beyond it
def test_a_file_that_grows_too_large_is_one_line(tmp_path, suffix, size):
    path = tmp_path / f"weights{suffix}"
    checkpoint.write(path, {"model": {"w": torch.ones(1)}})
    before = path.read_bytes()
    text = r"^output .*: it cannot be written \(.*too large"
    with (
        largest_file(2 * size),
        pytest.raises(InputError, match=text),
    ):  # half of the tensor's bytes
        checkpoint.write(path, {"model": {"w": torch.zeros(size)}})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- loading -----------------------------------------------------------------------------------


class _Heads(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.box_predictor = nn.ModuleDict({"cls_score": nn.Linear(4, classes + 1)})


def test_load_weights_copies_every_value_but_what_it_was_told_to_leave():
    source, model = tiny(), tiny()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    weights = source.state_dict()
    checkpoint.load_weights(model, weights, source="x.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    left = [name for name in weights if "rel_pos" in name]
    fewer = {name: value + 1 for name, value in weights.items() if name not in left}
    with pytest.raises(InputError, match=r"4 missing \(blocks.0.attn.rel_pos_h"):
        checkpoint.load_weights(model, fewer, source="x.pth")
    rows = "blocks.0.attn.qkv.bias"
    checkpoint.load_weights(model, fewer, source="x.pth", initialised=[*left, f"{rows}[0,3-4]"])
    for name, value in model.state_dict().items():
        expected = weights[name] + (name not in left)
        if name == rows:
            expected[[0, 3, 4]] -= 1
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="initialised: expected rows of a tensor in the file"):
        checkpoint.load_weights(model, fewer, source="x", initialised=[*left, f"{rows}[99]"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 32}, r"file has 32 channels \(embed_dim\), model 16"),
        ({"depth": 3}, "file has 3 blocks, model 2"),
        (
            {"pretrain_img_size": 128},
            r"shape of pos_embed: expected \(1, 17, 16\) \(model\), got \(1, 65, 16\) \(file\)"
            r".*vitdet convert --source-model x\.pth",
        ),
        ({"mlp_ratio": 2}, r"shape of blocks\.0\.mlp\.fc1\.weight"),
        ({"layer_scale": True}, r"4 unexpected \(blocks\.0\.ls1\.gamma"),
    ],
)
def test_load_weights_names_the_cause(changes, message):
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as error:
        checkpoint.load_weights(model, tiny(**changes).state_dict(), source="x.pth")
    assert str(error.value).startswith("x.pth: ")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_load_weights_names_class_counts_and_other_formats():
    with pytest.raises(InputError, match=r"x\.pth: file has 80 classes, model 1203\. "):
        checkpoint.load_weights(_Heads(1203), _Heads(80).state_dict(), source="x.pth")
    with pytest.raises(InputError, match="Convert it first: vitdet convert"):
        checkpoint.load_weights(tiny(), {"encoder.w": torch.ones(1)}, source="x.pth")


def test_weights_of_finds_the_state_dict():
    weights = {"w": torch.ones(1)}
    assert checkpoint.weights_of(weights, source="x") == (weights, [])
    assert checkpoint.weights_of({"model": weights, "epoch": 3}, source="x") == (weights, [])
    with pytest.raises(InputError, match=r"got the keys state_dict, epoch\. Convert it first"):
        checkpoint.weights_of({"state_dict": weights, "epoch": 3}, source="x.pth")


# --- values ------------------------------------------------------------------------------------

ODD_VALUES = {
    "not a number": (lambda t: t * float("nan"), "expected finite weights, got 16 values that"),
    "int8": (lambda t: t.to(torch.int8), "floating point numbers as the model's, got int8"),
    "complex": (lambda t: t.to(torch.complex64), "expected .*, got complex64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "expected .*, got float8_e4m3fn"),
}


@pytest.mark.parametrize("name", ODD_VALUES)
def test_weights_are_finite_numbers_or_refused(name):
    change, message = ODD_VALUES[name]
    model, key = tiny(), "blocks.0.norm1.weight"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for half in (False, True):
        state = model.state_dict()
        state[key] = change(state[key].half() if half else state[key])
        with pytest.raises(InputError, match=rf"x\.pth: .*blocks\.0\.norm1\.weight.*{message}"):
            checkpoint.load_weights(model, state, source="x.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_precisions_and_counters_load():
    model = nn.BatchNorm2d(3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {k: v.to(dtype) if v.ndim else v + 4 for k, v in model.state_dict().items()}
        checkpoint.load_weights(model, state, source="x.pth")
        assert model.num_batches_tracked == state["num_batches_tracked"]
    state["num_batches_tracked"] = torch.tensor(1.5)
    message = r"num_batches_tracked: expected int64 as the model's, got float32"
    with pytest.raises(InputError, match=message):
        checkpoint.load_weights(model, state, source="x.pth")


@pytest.mark.parametrize("number", [99, 0, "1", None, [1]])
def test_a_file_of_another_format_is_named(number):
    content = {"model": {"w": torch.ones(1)}, "vitdet": {"format": number}}
    with pytest.raises(InputError, match=r"x\.pth: expected format 1, got format"):
        checkpoint.weights_of(content, source="x.pth")
