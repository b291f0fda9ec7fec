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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    **dict.fromkeys(("os.rename", "os.link", "os.symlink", "shutil.move"), (0, 1)),
    **dict.fromkeys(("shutil.copyfile", "shutil.copymode", "shutil.copystat"), (1,)),
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"), (0,)),
    **dict.fromkeys(("os.utime", "os.chown", "os.setxattr", "shutil.rmtree"), (0,)),
}
_CHANGES["os.link"] = _CHANGES["os.symlink"] = (1,)
_ADDRESSES = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")


@dataclass
class Seen:
    """What a command did.

    Attributes:
        written: absolute paths that were opened for writing, made, renamed or removed.
        asked: addresses, those of this machine left out.
    """

    written: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def note(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[0], str | bytes):
            path, mode, flags = given
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITES:
                self.written.add(_absolute(path))
        elif event in _CHANGES:
            for place in _CHANGES[event]:
                if isinstance(given[place], str | bytes | os.PathLike):
                    self.written.add(_absolute(given[place]))
        elif event in _ADDRESSES:
            address = given[1] if event == "socket.connect" else given[0]
            host = address[0] if isinstance(address, tuple) else address
            file = event == "socket.connect" and not isinstance(address, tuple)
            if not file and host not in ("127.0.0.1", "::1", "localhost"):
                self.asked.append(f"{event} {address}")


def _absolute(path: str | bytes | os.PathLike[str]) -> str:
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (a link stays one)


_now: list[Seen] = []


def _hook(event: str, given: tuple[Any, ...]) -> None:
    if _now:
        _now[-1].note(event, given)


@pytest.fixture(scope="module", autouse=True)
def _audited() -> None:
    sys.addaudithook(_hook)  # for good: it does nothing outside of `watched`


@contextmanager
def watched() -> Iterator[Seen]:
    _now.append(Seen())
    try:
        yield _now[-1]
    finally:
        _now.pop()


def test_the_watch_sees_what_is_done(tmp_path: Path) -> None:
    with watched() as seen:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").rename(tmp_path / "b")
        os.close(os.open(tmp_path / "c", os.O_CREAT | os.O_WRONLY))
        os.link(tmp_path / "b", tmp_path / "d")
        shutil.copyfile(tmp_path / "b", tmp_path / "e")
        (tmp_path / "b").read_text()
        (tmp_path / "f").mkdir()
        (tmp_path / "d").unlink()
        for host in ("127.0.0.1", "192.0.2.7"):
            sys.audit("socket.connect", None, (host, 80))
    assert seen.written == {str(tmp_path / name) for name in "abcdef"}
    assert seen.asked == ["socket.connect ('192.0.2.7', 80)"]


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(drawn_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all that commands are given: data with a fault in it, images, weights, a run."""
    folder = tmp_path_factory.mktemp("given")
    draw = np.random.default_rng(0)
    for part in ("train", "valid"):
        images, annotations = [], []
        (folder / "data" / part).mkdir(parents=True)
        for number in range(1, 5):
            pixels = draw.integers(0, 255, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / part / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 64})
            box = [10, 10, 30, 20] if number > 1 else [70, 10, 30, 20]  # over the edge
            corners = [10, 10, 40, 10, 40, 30]
            annotations.append({"id": number, "image_id": number, "category_id": number % 2})
            annotations[-1] |= {"bbox": box, "segmentation": [corners], "area": 600, "iscrowd": 0}
        categories = [{"id": number, "name": f"class {number}"} for number in range(2)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "data" / part / "_annotations.coco.json").write_text(json.dumps(content))
    drawn = drawn_run.annotations.parent
    shutil.copytree(drawn, folder / "shapes" / drawn.name)
    shutil.copytree(drawn_run.images[0].parent, folder / "images")
    shutil.copy(drawn_run.annotations, folder / "instances.json")
    run = folder / "run"
    run.mkdir()
    shutil.copy(drawn_run.weights, run)
    shutil.copy(drawn_run.weights.parent / "config.yaml", run)
    results = {"checkpoint": "model_final.pth", "results": {"bbox": {"AP": 1.0, "per_class": {}}}}
    (run / "results.json").write_text(json.dumps(results))
    (folder / "predictions.json").write_text("[]")
    return folder


def _bytes(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _train_net(words: list[str]) -> int:
    train_net.main(train_net.parse(words))
    return 0


_SMALL = "train.device=cpu dataloader.train.num_workers=0 dataloader.test.num_workers=0"
_SHAPES = CONFIGS / "mini" / "mask_rcnn_eva02_shapes.py"
_RUN = "--weights GIVEN/run/model_final.pth --device cpu --out OUT"
COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "data check": (cli.main, "data check GIVEN/data --out OUT/page.html"),
    "data check --fix": (cli.main, "data check GIVEN/data --fix OUT/fixed"),
    "predict": (cli.main, f"predict GIVEN/images {_RUN} --save-json"),
    "val": (cli.main, f"val {_RUN} --data GIVEN/instances.json --images GIVEN/images"),
    "val of its own data": (cli.main, f"val {_RUN}"),
    "strip": (cli.main, "strip GIVEN/run/model_final.pth OUT/slim.safetensors"),
    "inspect": (cli.main, "inspect GIVEN/run/model_final.pth --no-recipes"),
    "convert": (
        converter.main,
        "--source-model GIVEN/run/model_final.pth --output-model OUT/a.pth "
        f"--config-file {_SHAPES}",
    ),
    "report": (
        cli.main,
        "report GIVEN/run --out OUT/report.html --predictions GIVEN/predictions.json",
    ),
    "evaluate": (
        _train_net,
        f"--eval-only --config-file {_SHAPES} train.init_checkpoint=GIVEN/run/model_final.pth "
        "train.output_dir=OUT dataloader.test.dataset.root=GIVEN/shapes "
        f"dataloader.test.dataset.num_images=6 {_SMALL}",
    ),
    "train": (
        cli.main,
        f"train --data GIVEN/data --out OUT/run --size tiny --batch 2 --epochs 1 {_SMALL}",
    ),
    "export": (
        cli.main,
        "export --weights GIVEN/run/model_final.pth --out OUT/a.onnx --part backbone "
        "--images GIVEN/images --num-images 1",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_where_it_is_told_and_asks_nobody(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run, line = COMMANDS[name]
    out, cwd = tmp_path / "out", tmp_path / "cwd"
    out.mkdir()
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    words = [word.replace("GIVEN", str(given)).replace("OUT", str(out)) for word in line.split()]
    before = _bytes(given)
    with watched() as seen:
        status = run(words)
    assert status in (0, 1)
    assert _bytes(given) == before
    assert seen.asked == []
    written = {Path(path) for path in seen.written}
    assert not [path for path in written if path.is_relative_to(given)]
    if name != "inspect":
        assert [path for path in out.rglob("*") if path.is_file()]
    elsewhere = [path for path in written if not path.is_relative_to(out) and not _is_private(path)]
    assert elsewhere == []
    assert list(cwd.iterdir()) == []


def _is_private(path: Path) -> bool:
    """Whether it is a cache of Python or of a library, or a temporary file outside of pytest's."""
    if path == Path(os.devnull) or {"__pycache__", ".cache", ".config"} & set(path.parts):
        return True
    temporary = Path(tempfile.gettempdir())
    return path.is_relative_to(temporary) and not path.parts[len(temporary.parts)].startswith(
        "pytest-"
    )
