"""Weights by name: the hub, timm, addresses, the table. A server on loopback answers."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitdet import checkpoint, published, weights
from vitdet.app import cli, inspect, train
from vitdet.data.shapes import CLASSES
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import InputError

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
ROOT = Path(__file__).resolve().parents[1]
SMALL = {"layer.weight": torch.arange(6.0).reshape(2, 3)}


class Server(SimpleNamespace):
    """Files by their path, what was asked for, and an address to begin with."""

    files: dict[str, bytes]
    asked: list[str]
    url: str


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    there = Server(files={}, asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            there.asked.append(self.path)
            data = there.files.get(self.path)
            self.send_response(404 if data is None else 302 if self.path == "/moved.pth" else 200)
            if self.path == "/moved.pth":
                self.send_header("Location", there.url.replace("127.0.0.1", "localhost") + "a.pth")
            more = 7 if self.path == "/short.pth" else 0
            self.send_header("Content-Length", str(len(data or b"") + more))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        there.url = f"http://127.0.0.1:{running.server_port}/"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield there
        running.shutdown()
        thread.join()


@pytest.fixture
def data(tmp_path):
    checkpoint.write(tmp_path / "small.pth", SMALL)
    return (tmp_path / "small.pth").read_bytes()


def test_an_address_is_fetched_once(server, data, tmp_path, capsys):
    server.files["/a%20b/small.pth"] = data
    url = f"{server.url}a%20b/small.pth?download=true"
    server.files["/a%20b/small.pth?download=true"] = data
    found = weights.read(url)
    assert torch.equal(found.content["layer.weight"], SMALL["layer.weight"])
    file = tmp_path / "torch/hub/checkpoints/small.pth"
    assert file.read_bytes() == data
    assert "small.pth: 100%" in capsys.readouterr().err
    assert weights.locate(Path(url)) == file  # a command line's Path joins two slashes
    assert server.asked == ["/a%20b/small.pth?download=true"]
    text = rf"{file} is already there, from {server.url}a.*true\. Move or rename it\."
    with pytest.raises(InputError, match=text):
        weights.locate(f"{server.url}other/small.pth")
    assert inspect.run(cli.parse(["inspect", url, "--json", "--no-recipes"])) == 1
    assert json.loads(capsys.readouterr().out)["file_bytes"] == len(data)


def test_a_checksum_in_the_name_holds(server, data, tmp_path):
    right = f"b-16-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    server.files = {f"/{right}": data, "/a-00000000.pth": data, "/b-16.pth": data}
    assert weights.locate(server.url + right).read_bytes() == data
    assert weights.locate(server.url + "b-16.pth").read_bytes() == data  # too short to be one
    with pytest.raises(InputError, match=r"expected sha256 00000000\.\.\., got [0-9a-f]{64}\. The"):
        weights.locate(server.url + "a-00000000.pth")
    names = sorted(path.name for path in (tmp_path / "torch/hub/checkpoints").iterdir())
    assert names == sorted([right, f"{right}.from", "b-16.pth", "b-16.pth.from"])


def test_what_cannot_be_fetched_is_one_line(server, data, tmp_path):
    server.files = {"/short.pth": data, "/moved.pth": b"", "/a.pth": data}
    place = tmp_path / "torch/hub/checkpoints"
    short = rf"fetched \(only {len(data)} of {len(data) + 7} bytes came\)\. Download {server.url}s"
    for name, text in {
        f"{server.url}short.pth": rf"{short}hort.pth elsewhere and put it at {place}/short.pth\.$",
        f"{server.url}absent.pth": r"it cannot be fetched \(HTTP Error 404: Not Found\)",
        f"{server.url}moved.pth": "expected https://, got http:// of localhost",
        f"{server.url}": r"expected a file of \.pth .*, got none\. Give the address of the file",
        "http://127.0.0.1:1/a.pth": "fetched .*Connection refused",
        "http://example.org/a.pth": "expected https://, got http:// of example.org. On its way",
        "detectron2:mask_rcnn_vitdet_x": r"no such name\. Did you mean detectron2:mask_rcnn_vitdet",
        "sam:9": r"weights sam:9: no such name\. `vitdet weights` lists them",
        "timm:vit_small_patch14_dinov2.none": "has no weights of this name. Did you mean timm:v",
        "hf:alone": r"expected hf:OWNER/NAME\[/FILE\]\[@REVISION\]",
    }.items():
        with pytest.raises(InputError, match=text):
            weights.locate(name)
    assert list(place.iterdir()) == []


def test_what_is_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = next(iter(published.ROWS))
    for name in ("hf:a", row):
        checkpoint.write(tmp_path / "small.pth", SMALL)
        (tmp_path / "small.pth").rename(name)
        assert weights.locate(name) == Path(name)
    for name in ("c:\\small.pth", "a/b:c.pth", "nothing.pth", "x" * 300):
        assert weights.locate(name) == Path(name)
    (tmp_path / row).unlink()
    (tmp_path / row).mkdir()
    checkpoint.write(tmp_path / row / "small.pth", SMALL)
    assert weights.read(row).row is None


# --- the hub ----------------------------------------------------------------------------------


@pytest.fixture
def snapshots(tmp_path, monkeypatch):
    """A hub with one repository, of shards and a config; what was asked of it."""
    calls = []
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 3}')

    def snapshot(repository, *, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        if "pytorch_model-*-of-*" in allow_patterns and repository != "o/none":
            places = {"weight_map": {"layer.weight": "pytorch_model-1-of-1.bin"}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(places))
            checkpoint.write(folder / "small.pth", SMALL)
            (folder / "small.pth").rename(folder / "pytorch_model-1-of-1.bin")
        if allow_patterns == ["sub/one.pth"]:
            (folder / "sub").mkdir()
            checkpoint.write(folder / "sub/one.pth", SMALL)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return calls


def test_a_repository_gives_its_best_weights_alone(snapshots):
    with pytest.raises(
        InputError, match=r"expected one of model\.s.* none\. Name .*: hf:o/none/FILE"
    ):
        weights.locate("hf:o/none@v1")
    snapshots.clear()
    found = weights.read("hf:o/n@v2")
    assert torch.equal(found.content["layer.weight"], SMALL["layer.weight"])
    assert found.config == {"hidden_size": 3}
    told = ["config.json", "preprocessor_config.json"]
    assert snapshots == [
        ("o/n", "v2", [*told, "model.safetensors"]),
        ("o/n", "v2", [*told, "model.safetensors.index.json", "model-*-of-*"]),
        ("o/n", "v2", [*told, "pytorch_model.bin"]),
        ("o/n", "v2", [*told, "pytorch_model.bin.index.json", "pytorch_model-*-of-*"]),
    ]
    snapshots.clear()
    assert weights.read("hf:o/n/sub/one.pth").content.keys() == SMALL.keys()
    assert snapshots == [("o/n", None, ["sub/one.pth"])]
    with pytest.raises(InputError, match=r"expected two\.pth in the repository, got none"):
        weights.locate("hf:o/n/two.pth")


def test_timm_names_are_those_of_timm(snapshots, monkeypatch):
    assert weights.read("timm:vit_small_patch14_dinov2").config == {"hidden_size": 3}
    assert snapshots[0][0] == "timm/vit_small_patch14_dinov2.lvd142m"
    asked = []
    monkeypatch.setattr(weights, "_download", lambda url, *_: asked.append(url))
    with pytest.raises(InputError, match=r"got \S*\.tar"):  # timm has these from an address alone
        weights.locate("timm:vit_huge_patch14_gap_224.in1k_ijepa")
    assert asked == []


def test_offline_a_name_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    page = "https://huggingface.co/o/n"
    for name, text in {
        "hf:o/n": rf"fetched \(.*HF_HUB_OFFLINE.*\)\. Download config\.json, .* {page}/tree/main i",
        "hf:o/n/a.pth@v1": rf"fetched .*Download {page}/resolve/v1/a\.pth and name that file\.$",
        "timm:vit_base_patch16_224": "of https://huggingface.co/timm/vit_base_patch16_224.augreg2_i",
        "eva02:eva02_B_coco_bsl": r"EVA-02/resolve/main/eva02/det/eva02_B_coco_bsl\.pth and name "
        r"that file with --config-file configs/COCO/cascade_mask_rcnn_eva02_b_bsl\.py\.$",
    }.items():
        with pytest.raises(InputError, match=text):
            weights.locate(name)
    kept = tmp_path / "models--o--n/snapshots/0123"
    kept.mkdir(parents=True)
    (tmp_path / "models--o--n/refs").mkdir()
    (tmp_path / "models--o--n/refs/main").write_text("0123")
    checkpoint.write(kept / "model.safetensors", {"model": SMALL})
    assert weights.read("hf:o/n").content.keys() == SMALL.keys()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"needs huggingface_hub \(.*pip install huggingface_hub"):
        weights.locate("hf:o/n")


# --- the table --------------------------------------------------------------------------------


def test_the_table_is_that_of_the_page_of_recipes():
    page = (ROOT / "docs/recipes.md").read_text()
    for row in published.ROWS.values():
        assert row.address.startswith(("https://", "hf:"))
        assert Path(row.address).suffix in checkpoint.SUFFIXES
        assert row.kind == "detector" or not (row.recipe or row.box_ap)
        if row.recipe:  # a file, or a row of a table
            file = ROOT / row.recipe
            table = file.parent.with_suffix(".py").read_text()
            assert f'"{file.stem}": ' in table or file.is_file()
        if row.name.startswith("detectron2:"):
            recipe = row.recipe.removeprefix("configs/").removesuffix(".py")
            line = next(each for each in page.splitlines() if f"({row.address})" in each)
            assert recipe.split("/")[1] in line
            assert f"| {row.box_ap} | {row.mask_ap} | " in line
            assert round(float(line.split("|")[4])) == int(row.millions)
        elif row.name.startswith("eva02:") and row.box_ap:
            line = next(each for each in page.splitlines() if row.name[6:] in each)
            assert f"| {row.box_ap}" in line
            assert f"| {row.mask_ap}" in line
    assert len(published.ROWS) > 45


def test_the_command_lists_the_names(capsys):
    assert cli.main(["weights", "CASCADE", "vitdet_h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["name", "kind", "box", "AP"]
    wanted = ["detectron2:cascade_mask_rcnn_vitdet_h", "detector", "58.7", "51.0", "691"]
    assert lines[1].split()[:5] == wanted
    assert len(lines) == 5
    assert cli.main(["weights"]) == 0
    assert "mae:mae_pretrain_vit_base" in capsys.readouterr().out


def test_recipe_and_names_come_with_a_name(server, drawn_run, tmp_path, monkeypatch, capsys):
    """A detector in detectron2's names finds what the run of the same weights finds."""
    state = checkpoint.read(drawn_run.weights)["model"]
    checkpoint.write(tmp_path / "tiny.pth", {"model": state, "iteration": 3})
    data = (tmp_path / "tiny.pth").read_bytes()
    server.files["/tiny.pth"] = data
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()[:6]
    recipe = str(drawn_run.weights.parent / "config.yaml")
    told = ("detector", recipe, "1", "1", "3", f"{server.url}tiny.pth", "MIT", "here")
    name = "sam:tiny"
    rows = {name: published.Published(name, *told, "000000")}
    monkeypatch.setattr(weights, "ROWS", rows)
    with pytest.raises(InputError, match=rf"weights {name}: expected md5 000000\.\.\., got {md5}"):
        Predictor.from_checkpoint(name)
    rows[name] = published.Published(name, *told, md5)
    exact = {"precision": "fp32", "threshold": 0.0, "device": "cpu"}
    found = Predictor.from_checkpoint(name, **exact)
    assert found.class_names == CLASSES
    mine = Predictor.from_checkpoint(drawn_run.weights, **exact)
    first, second = (each.detector.state_dict() for each in (found, mine))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    words = ["strip", name, str(tmp_path / "slim.safetensors")]
    assert cli.main(words) == 0
    assert f"({name}: " in capsys.readouterr().out
    checkpoint.write(tmp_path / "half.pth", {k: v for k, v in state.items() if "backbone" in k})
    server.files["/half.pth"] = (tmp_path / "half.pth").read_bytes()
    told = ("detector", recipe, "1", "1", "3", f"{server.url}half.pth", "MIT", "here")
    rows[name] = published.Published(name, *told)
    with pytest.raises(InputError, match=r"sam:tiny .* got: 14 of its weights are not in the"):
        Predictor.from_checkpoint(name)


def test_commands_take_names(server, data, tmp_path, monkeypatch):
    server.files["/small.pth"] = data
    seen = []
    monkeypatch.setattr(train, "_run", lambda args, _: seen.append(args.weights))
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["train", "--data", ".", "--weights", f"{server.url}small.pth", *out]) == 0
    assert seen == [tmp_path / "torch/hub/checkpoints/small.pth"]
    words = ["convert", "--source-model", "mae:mae_pretrain_vit_bas", "--output-model"]
    words += [str(tmp_path / "o.pth"), "--config-file", "configs/mini/mask_rcnn_eva02_shapes.py"]
    assert cli.main(words) == 2


def test_images_are_fetched_anew_by_their_addresses(server, drawn_run, tmp_path, capsys):
    first, second = (path.read_bytes() for path in drawn_run.images[:2])
    server.files |= {"/a/x.jpg": first, "/b/x.jpg": second}
    options = {"precision": "fp32", "threshold": 0.0, "device": "cpu"}
    predictor = Predictor.from_checkpoint(drawn_run.weights, **options)
    addresses = [f"{server.url}a/x.jpg?size=1", Path(f"{server.url}b/x.jpg")]
    server.files["/a/x.jpg?size=1"] = first
    found, wanted = predictor(addresses), predictor(drawn_run.images[:2])
    assert [each.boxes.tolist() for each in found] == [each.boxes.tolist() for each in wanted]
    server.files["/a/x.jpg"] = second
    out = ["--out", str(tmp_path / "out"), "--weights", str(drawn_run.weights), "--device", "cpu"]
    assert cli.main(["predict", f"{server.url}a/x.jpg", f"{server.url}none.jpg", *out]) == 1
    assert (tmp_path / "out/x.jpg").is_file()
    said = f"error: input {server.url}none.jpg: it cannot be fetched (HTTP Error 404: Not Found)."
    assert said in capsys.readouterr().err
