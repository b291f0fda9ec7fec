"""Every path that a command opens for writing, and every address that it asks, by Python's audit.

What a command was given (a data folder, a run, a weights file) is read and never written; what it
writes lies under the folder or file that it was told; no command reaches the network.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import converter
import train_net
from vitdet.app import cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# event: places of the paths among its arguments that it changes
_CHANGES = {
    **dict.fromkeys(("os.rename", "shutil.move"), (0, 1)),
    **dict.fromkeys(("os.link", "os.symlink"), (1,)),
    **dict.fromkeys(("shutil.copyfile", "shutil.copymode", "shutil.copystat"), (1,)),
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"), (0,)),
    **dict.fromkeys(("os.utime", "os.chown", "os.setxattr", "shutil.rmtree"), (0,)),
}
_ADDRESSES = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")


class Seen:
    """What happens within the block: paths that were changed, addresses that were asked."""

    now: Seen | None = None

    def __enter__(self):
        self.written = set()
        self.asked = []
        Seen.now = self
        return self

    def __exit__(self, *_):
        Seen.now = None

    def note(self, event, given):
        paths = [given[place] for place in _CHANGES.get(event, ())]
        if event == "open":
            path, mode, flags = given
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITES:
                paths.append(path)
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                self.written.add(Path(os.path.abspath(os.fsdecode(path))))  # noqa: PTH100
        if event in _ADDRESSES:
            address = given[1] if event == "socket.connect" else given[0]
            host = address[0] if isinstance(address, tuple) else address
            file = event == "socket.connect" and not isinstance(address, tuple)
            if not file and host not in ("127.0.0.1", "::1", "localhost"):
                self.asked.append(f"{event} {address}")


@pytest.fixture(scope="module", autouse=True)
def _audited():
    sys.addaudithook(lambda *event: Seen.now and Seen.now.note(*event))  # for good


@pytest.fixture(scope="module")
def given(drawn_run, tmp_path_factory):
    """A folder of all that commands are given: data with a fault in it, images, weights, a run."""
    folder = tmp_path_factory.mktemp("given")
    draw = np.random.default_rng(0)
    for part in ("train", "valid"):
        content = {"images": [], "annotations": []}
        (folder / "data" / part).mkdir(parents=True)
        for number in range(1, 5):
            pixels = draw.integers(0, 255, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / part / f"{number}.png")
            image = {"id": number, "file_name": f"{number}.png", "width": 80, "height": 64}
            box = [10, 10, 30, 20] if number > 1 else [70, 10, 30, 20]  # over the edge
            made = {"id": number, "image_id": number, "category_id": number % 2, "iscrowd": 0}
            made |= {"bbox": box, "segmentation": [[10, 10, 40, 10, 40, 30]], "area": 600}
            content["images"].append(image)
            content["annotations"].append(made)
        content["categories"] = [{"id": number, "name": f"class {number}"} for number in range(2)]
        (folder / "data" / part / "_annotations.coco.json").write_text(json.dumps(content))
    drawn = drawn_run.annotations.parent
    shutil.copytree(drawn, folder / "shapes" / drawn.name)
    shutil.copytree(drawn_run.images[0].parent, folder / "images")
    shutil.copy(drawn_run.annotations, folder / "instances.json")
    (folder / "run").mkdir()
    for name in (drawn_run.weights.name, "config.yaml"):
        shutil.copy(drawn_run.weights.parent / name, folder / "run")
    results = {"checkpoint": "model_final.pth", "results": {"bbox": {"AP": 1.0, "per_class": {}}}}
    (folder / "run/results.json").write_text(json.dumps(results))
    (folder / "predictions.json").write_text("[]")
    return folder


def _bytes(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def _train_net(words):
    train_net.main(train_net.parse(words))
    return 0


_SMALL = "train.device=cpu dataloader.train.num_workers=0 dataloader.test.num_workers=0"
_SHAPES = CONFIGS / "mini" / "mask_rcnn_eva02_shapes.py"
_RUN = "--weights GIVEN/run/model_final.pth --device cpu --out OUT"
COMMANDS = [
    (cli.main, "data check GIVEN/data --out OUT/page.html"),
    (cli.main, "data check GIVEN/data --fix OUT/fixed"),
    (cli.main, f"predict GIVEN/images {_RUN} --save-json"),
    (cli.main, f"val {_RUN} --data GIVEN/instances.json --images GIVEN/images"),
    (cli.main, f"val {_RUN}"),
    (cli.main, "strip GIVEN/run/model_final.pth OUT/slim.safetensors"),
    (cli.main, "inspect GIVEN/run/model_final.pth --no-recipes"),
    (
        converter.main,
        "--source-model GIVEN/run/model_final.pth --output-model OUT/a.pth "
        f"--config-file {_SHAPES}",
    ),
    (
        cli.main,
        "report GIVEN/run --out OUT/report.html --predictions GIVEN/predictions.json",
    ),
    (
        _train_net,
        f"--eval-only --config-file {_SHAPES} train.init_checkpoint=GIVEN/run/model_final.pth "
        "train.output_dir=OUT dataloader.test.dataset.root=GIVEN/shapes "
        f"dataloader.test.dataset.num_images=6 {_SMALL}",
    ),
    (
        cli.main,
        f"train --data GIVEN/data --out OUT/run --size tiny --batch 2 --epochs 1 {_SMALL}",
    ),
    (
        cli.main,
        "export --weights GIVEN/run/model_final.pth --out OUT/a.onnx --part backbone "
        "--images GIVEN/images --num-images 1",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "line"), COMMANDS, ids=[line[:20] for _, line in COMMANDS])
def test_a_command_writes_where_it_is_told_and_asks_nobody(given, tmp_path, monkeypatch, run, line):
    out, cwd = tmp_path / "out", tmp_path / "cwd"
    out.mkdir()
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    words = [word.replace("GIVEN", str(given)).replace("OUT", str(out)) for word in line.split()]
    before = _bytes(given)
    with Seen() as seen:
        status = run(words)
    assert status in (0, 1)
    assert _bytes(given) == before
    assert seen.asked == []
    assert not [path for path in seen.written if path.is_relative_to(given)]
    assert [path for path in out.rglob("*") if path.is_file()] or words[0] == "inspect"
    assert [path for path in seen.written if path.is_relative_to(out)] or words[0] == "inspect"
    assert not [p for p in seen.written if not p.is_relative_to(out) and not _is_private(p)]
    assert list(cwd.iterdir()) == []


def _is_private(path):
    """Whether it is a cache of Python or of a library, or a temporary file outside of pytest's."""
    if path == Path(os.devnull) or {"__pycache__", ".cache", ".config"} & set(path.parts):
        return True
    temporary = Path(tempfile.gettempdir())
    return path.is_relative_to(temporary) and not path.parts[len(temporary.parts)].startswith(
        "pytest-"
    )
