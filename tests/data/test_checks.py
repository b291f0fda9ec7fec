"""Faults of image files and between parts are found, and mended in a copy alone."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import COCO_MINI
from PIL import Image

from vitdet.data import images
from vitdet.data.clean import Checked, check_data, write_repaired
from vitdet.data.formats import find_data
from vitdet.utils.checks import InputError

_SEED = iter(range(10**6))


class Data:
    """Data of one class in two parts; every image has an object, and pixels of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: dict[str, Any] = {}
        for split in ("train", "val"):
            categories = [{"id": 1, "name": "cat"}]
            self.contents[split] = {"images": [], "annotations": [], "categories": categories}
            self.add(f"{split}.png", split=split)

    def add(
        self,
        name: str,
        data: bytes | None = None,
        *,
        split: str = "train",
        size: tuple[int, int] = (30, 40),
    ) -> Path:
        """Add an image file and its entry, numbered from 0; without data a PNG of noise."""
        content = self.contents[split]
        key, (height, width) = len(content["images"]), size
        image = {"id": key, "file_name": name, "height": height, "width": width}
        content["images"].append(image)
        box = [width // 4, height // 4, width // 2, height // 2]
        label = {"id": key + 1, "image_id": key, "category_id": 1, "bbox": box}
        content["annotations"].append({**label, "area": box[2] * box[3]})
        path = self.folder / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_noise(size) if data is None else data)
        return path

    def check(self, **options: Any) -> Checked:
        (self.folder / "annotations").mkdir(exist_ok=True)
        for split, content in self.contents.items():
            path = self.folder / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(content))
        return check_data(find_data(self.folder), **options)


def _noise(
    size: tuple[int, int] = (30, 40), kind: str = "PNG", mode: str = "RGB", turn: int = 1
) -> bytes:
    pixels = np.random.default_rng(next(_SEED)).integers(0, 255, (*size, 3), dtype=np.uint8)
    deep = mode == "I;16"
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200 if deep else pixels)
    image = image if deep else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    image.save(buffer, format=kind, progressive=True, **({"exif": exif} if turn > 1 else {}))
    return buffer.getvalue()


def _scans() -> bytes:
    data = _noise(kind="JPEG")
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * images.MAX_SCANS + data[-2:]


def _kinds(checked: Checked) -> list[str]:
    return [each.kind for _, each in checked.findings]


def _labels(copy: Path) -> Any:
    return json.loads((copy / "annotations/instances_train.json").read_text())


def _state(folder: Path) -> dict[str, Any]:
    """Everything that a change of a folder would show."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else None
        found[str(path)] = (data, status.st_mtime_ns, status.st_nlink, status.st_ino)
    return found


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path / "data")


# name of the file, what is in its place, kind, its name in the copy
FILES: list[tuple[str, Callable[[Path], Any] | bytes, str, str]] = [
    ("a.png", lambda _: None, "missing image", ""),
    ("a.png", lambda path: path.symlink_to("a.png"), "unreadable file", ""),
    ("a.png", lambda path: path.symlink_to("/dev/zero"), "not a file", ""),
    ("a.png", Path.mkdir, "not a file", ""),
    ("a.png", os.mkfifo, "not a file", ""),
    ("a.jpg", b"%!PS-Adobe-3.0\n", "unknown format", ""),
    ("a.jpg", _noise(kind="JPEG")[:-200], "damaged image", ""),
    ("a.png", _noise()[:400], "damaged image", ""),
    ("a.jpg", _scans(), "too many scans", ""),
    ("a.jpg", _noise(), "wrong extension", "a.png"),
    ("a.png", _noise(mode="I;16"), "more than 8 bits", "a.png"),
    ("a.jpg", _noise(kind="JPEG", turn=6), "EXIF rotation", "a.png"),
    ("a.png", _noise(turn=8), "EXIF rotation", "a.png"),
    ("a.tif", _noise(kind="TIFF", turn=6), "EXIF rotation", "a.png"),
    ("a.jpg", _noise((40, 30), "JPEG", turn=6), "turned by EXIF", "a.jpg"),
    ("a.png", _noise((31, 41)), "wrong size", "a.png"),
]


@pytest.mark.parametrize(("name", "what", "kind", "expected"), FILES)
def test_files_of_every_kind(data: Data, tmp_path: Path, name, what, kind, expected) -> None:
    path, copy = data.add(name), tmp_path / "copy"
    path.unlink()
    path.write_bytes(what) if isinstance(what, bytes) else what(path)
    checked = data.check()
    assert _kinds(checked) == [kind]
    assert write_repaired(checked, copy) == ({} if expected else {kind: 1})
    assert check_data(find_data(copy)).faults == []
    entries = [each for each in _labels(copy)["images"] if each["file_name"] != "train.png"]
    assert [each["file_name"] for each in entries] == [expected] * bool(expected)
    for entry in entries:
        written = copy / "train" / expected
        shown = images.open_image(written)
        assert (shown.height, shown.width) == (entry["height"], entry["width"])
        if kind == "EXIF rotation":  # the pixels as they are stored
            with Image.open(path) as stored:
                turn = 1 if stored.getexif().get(0x0112) == 6 else -1
            assert np.array_equal(shown, np.rot90(np.asarray(images.open_image(path)), turn))
        elif kind == "more than 8 bits":
            assert np.asarray(shown).max() == 255
        else:
            assert written.read_bytes() == path.read_bytes()
            assert written.stat().st_nlink == path.stat().st_nlink == 1


def test_large_images_are_sound(data: Data, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit is not asked
    checked = data.check()
    assert checked.findings == []
    assert write_repaired(checked, tmp_path / "copy") == {}
    limits = (None, images.FORMATS, 1000)
    monkeypatch.setattr(images.opened.__wrapped__, "__defaults__", limits)
    checked = data.check()
    assert _kinds(checked) == ["too many pixels"] * 2
    assert write_repaired(checked, tmp_path / "second") == {}
    written = tmp_path / "second/train/train.png"
    assert written.read_bytes() == (data.folder / "train/train.png").read_bytes()


def test_one_image_twice_is_joined_with_its_objects(data: Data, tmp_path: Path) -> None:
    first = data.add("a.png")
    data.add("a.png", first.read_bytes())
    data.add("b.png", first.read_bytes())
    # only b.png has it
    data.contents["train"]["annotations"][-1].update(bbox=[1, 1, 10, 15], area=150)
    data.add("of_val.png", (data.folder / "val/val.png").read_bytes())
    data.add("strip.png", size=(2, 120))
    checked, copy = data.check(), tmp_path / "copy"
    kinds = ["tiny object", *["same image twice"] * 2, "elongated image", "image in two parts"]
    assert _kinds(checked) == kinds
    assert checked.findings[-1][1].got == "the bytes of val.png of val"
    assert write_repaired(checked, copy) == {"image in two parts": 1}  # it leaves training
    content = _labels(copy)
    boxes = [each["bbox"] for each in content["annotations"] if each["image_id"] == 1]
    assert boxes == [[10, 7, 20, 15], [1, 1, 10, 15]]
    names = ["a.png", "strip.png", "train.png"]
    assert sorted(each["file_name"] for each in content["images"]) == names
    assert sorted(each.name for each in (copy / "train").iterdir()) == names


def test_names_that_meet_in_the_copy(data: Data, tmp_path: Path) -> None:
    """Files that get a new name, and others that have it: each is there, nothing else changes."""
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    names = [
        "photo.jpg",  # number 1; a PNG, which wants to be photo.png
        "photo.png",
        "1_photo.png",
        "Photo.PNG",  # equal where letters have no case
        "PHOTO.jpg",  # a PNG too
        "deep.tif",  # 16 bits, which become deep.png
        "deep.png",
        "../elsewhere/y.png",
        "8.png",
        str(outside / "z.png"),
        "n" * 246 + ".png",
        "a/b.png",
        "A/b.png",
        "e\u0301.png",  # one letter in two ways
        "\u00e9.png",
    ]
    (data.folder / "elsewhere").symlink_to(outside)
    for name in names:
        data.add(name, _noise(kind="TIFF", mode="I;16") if name == "deep.tif" else None)
    checked = data.check()
    before = _state(tmp_path)
    assert write_repaired(checked, tmp_path / "copy") == {}
    copy = tmp_path.parent / f"{tmp_path.name}_copy"
    shutil.move(tmp_path / "copy", copy)
    assert _state(tmp_path) == before
    found = {each["id"]: each["file_name"] for each in _labels(copy)["images"]}
    assert len({name.casefold() for name in found.values()}) == len(found) == len(names) + 1
    assert all(len(os.fsencode(name)) < 256 and ".." not in name for name in found.values())
    for number, name in enumerate(names, 1):
        if name in ("photo.png", "1_photo.png", "deep.png", "8.png", "a/b.png"):
            assert found[number] == name  # those that may keep theirs do
        if name != "deep.tif":
            original = (data.folder / "train" / name).read_bytes()
            assert (copy / "train" / found[number]).read_bytes() == original, name
    assert check_data(find_data(copy)).faults == []
    shutil.rmtree(copy)


def test_places_that_are_refused(data: Data, tmp_path: Path, monkeypatch) -> None:
    checked = data.check()
    write_repaired(checked, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    (tmp_path / "file").write_text("a file")
    before = _state(tmp_path)
    for output in (data.folder, data.folder / "copy", tmp_path, data.folder / "train/x"):
        with pytest.raises(InputError, match=r"expected a folder apart from the data, got one"):
            write_repaired(checked, output)
    for output in (tmp_path / "copy", tmp_path / "link", tmp_path / "file"):
        with pytest.raises(InputError, match="expected a new folder, got one with content"):
            write_repaired(checked, output)
    with pytest.raises(InputError, match=r"--fix .*file/copy: could not be written \(Not a d"):
        write_repaired(checked, tmp_path / "file/copy")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(InputError, match=r"--fix .*third: could not be written \(No space left"):
        write_repaired(checked, tmp_path / "third")
    assert _state(tmp_path) == before


def test_corner_boxes_are_asked_about(data: Data, tmp_path: Path) -> None:
    for number in range(1, 6):
        data.add(f"{number}.png")
    for content in data.contents.values():
        for each in content["annotations"]:
            each["bbox"] = [20, 15, 39, 29]
            del each["area"]
    with pytest.raises(InputError, match=r"--boxes corners, or --boxes xywh if they are x, y"):
        write_repaired(data.check(), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert write_repaired(data.check(boxes="corners"), tmp_path / "copy") == {}
    boxes = {str(each["bbox"]) for each in _labels(tmp_path / "copy")["annotations"]}
    assert boxes == {"[20, 15, 19, 14]"}


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"no photographs in {COCO_MINI}")
def test_clean_data_have_notes_only() -> None:
    found = check_data(find_data(COCO_MINI))
    assert found.faults == []
    counts = {"crowd region": 14, "tiny object": 2, "image without annotations": 2}
    assert Counter(_kinds(found)) == counts
