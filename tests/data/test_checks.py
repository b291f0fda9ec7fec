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
from vitdet.data.checking import Checked, check_data
from vitdet.data.formats import find_data
from vitdet.data.repair import write_repaired
from vitdet.utils.checks import InputError

_SEED = iter(range(10**6))


class Data:
    """Data of one class in two parts; every image has an object, and pixels of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: dict[str, Any] = {}
        for split in ("train", "val"):
            (folder / split).mkdir(parents=True)
            categories = [{"id": 1, "name": "cat"}]
            self.contents[split] = {"images": [], "annotations": [], "categories": categories}
            self.add(f"{split}.png", split=split)

    def add(
        self,
        name: str,
        data: bytes | None = None,
        *,
        split: str = "train",
        number: int | None = None,
        size: tuple[int, int] = (30, 40),
    ) -> Path:
        """Add an image file and its entry; without data a PNG of noise."""
        content = self.contents[split]
        key = number or 100 * len(self.contents) + len(content["images"])
        height, width = size
        image = {"id": key, "file_name": name, "height": height, "width": width}
        content["images"].append(image)
        label = {"id": len(content["annotations"]) + 1, "image_id": key, "category_id": 1}
        box = [width // 4, height // 4, width // 2, height // 2]
        content["annotations"].append({**label, "bbox": box, "area": box[2] * box[3]})
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
    size: tuple[int, int] = (30, 40), kind: str = "PNG", mode: str = "RGB", **options: Any
) -> bytes:
    draw = np.random.default_rng(next(_SEED))
    pixels = draw.integers(0, 255, (*size, 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    else:
        image = Image.fromarray(pixels).convert(mode)
    if "turn" in options:
        exif = options["exif"] = Image.Exif()
        exif[0x0112] = options.pop("turn")
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _scans() -> bytes:
    data = _noise(kind="JPEG", progressive=True)
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


# name of the file, what is in its place, kind, whether the image is in the copy
FILES: list[tuple[str, Callable[[Path], Any] | bytes, str, bool]] = [
    ("a.png", lambda _: None, "missing image", False),
    ("a.png", lambda path: path.symlink_to("b"), "missing image", False),
    ("a.png", lambda path: path.symlink_to("a.png"), "unreadable file", False),
    ("a.png", lambda path: path.symlink_to("/dev/zero"), "not a file", False),
    ("a.png", Path.mkdir, "not a file", False),
    ("a.png", os.mkfifo, "not a file", False),
    ("a.png", b"no image at all", "unknown format", False),
    ("a.jpg", b"%!PS-Adobe-3.0\n", "unknown format", False),
    ("a.jpg", _noise(kind="JPEG")[:-200], "damaged image", False),
    ("a.png", _noise()[:400], "damaged image", False),
    ("a.jpg", _scans(), "too many scans", False),
    ("a.jpg", _noise(), "wrong extension", True),
    ("a.png", _noise(mode="I;16"), "more than 8 bits", True),
    ("a.jpg", _noise(kind="JPEG", turn=6), "EXIF rotation", True),
    ("a.png", _noise(turn=8), "EXIF rotation", True),
    ("a.tif", _noise(kind="TIFF", turn=6), "EXIF rotation", True),
    ("a.jpg", _noise((40, 30), "JPEG", turn=6), "turned by EXIF", True),
    ("a.png", _noise((31, 41)), "wrong size", True),
    ("a.jpg", _noise(kind="JPEG", mode="CMYK"), "CMYK image", True),
    ("a.png", _noise(mode="RGBA"), "transparent image", True),
    ("a.png", _noise(mode="L"), "grey image", True),
]


@pytest.mark.parametrize(("name", "what", "kind", "stays"), FILES)
def test_files_of_every_kind(data: Data, tmp_path: Path, name, what, kind, stays) -> None:
    path, copy = data.add(name), tmp_path / "copy"
    path.unlink()
    path.write_bytes(what) if isinstance(what, bytes) else what(path)
    checked = data.check()
    assert _kinds(checked) == [kind]
    assert write_repaired(checked, copy) == ({} if stays else {kind: 1})
    assert check_data(find_data(copy)).faults == []
    entries = [each for each in _labels(copy)["images"] if each["file_name"] != "train.png"]
    assert len(entries) == stays
    for entry in entries:
        written = copy / "train" / entry["file_name"]
        shown = images.open_image(written)
        assert (shown.height, shown.width) == (entry["height"], entry["width"])
        if kind == "EXIF rotation":  # the pixels as they are stored
            with Image.open(path) as stored:
                turn = 1 if stored.getexif().get(0x0112) == 6 else -1
            assert np.array_equal(shown, np.rot90(np.asarray(images.open_image(path)), turn))
        elif kind == "more than 8 bits":
            assert np.asarray(shown).max() == 255
        else:
            assert entry["file_name"] == ("a.png" if kind == "wrong extension" else name)
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


def test_long_images_are_named(data: Data) -> None:
    data.add("strip.png", size=(2, 120))
    assert _kinds(data.check()) == ["tiny object", "elongated image"]


def test_one_image_twice_is_joined_with_its_objects(data: Data, tmp_path: Path) -> None:
    first = data.add("a.png", number=1)
    data.add("a.png", first.read_bytes(), number=2)
    data.add("b.png", first.read_bytes(), number=3)
    # only b.png has it
    data.contents["train"]["annotations"][-1].update(bbox=[1, 1, 10, 15], area=150)
    data.add("of_val.png", (data.folder / "val/val.png").read_bytes())
    checked, copy = data.check(), tmp_path / "copy"
    assert sorted(_kinds(checked)) == ["image in two parts", "repeated file", "same image twice"]
    assert checked.findings[-1][1].got == "the bytes of val.png of val"
    assert write_repaired(checked, copy) == {"image in two parts": 1}  # it leaves training
    content = _labels(copy)
    assert {each["file_name"] for each in content["images"]} == {"a.png", "train.png"}
    boxes = [each["bbox"] for each in content["annotations"] if each["image_id"] == 1]
    assert boxes == [[10, 7, 20, 15], [1, 1, 10, 15]]
    assert sorted(each.name for each in (copy / "train").iterdir()) == ["a.png", "train.png"]


def test_names_that_meet_in_the_copy(data: Data, tmp_path: Path) -> None:
    """Files that get a new name, and others that have it: each is there, nothing else changes."""
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    names = {
        1: "photo.jpg",  # a PNG, which wants to be photo.png
        2: "photo.png",
        3: "photo_1.png",
        4: "Photo.PNG",  # equal where letters have no case
        5: "PHOTO.jpg",  # a PNG too
        6: "deep.tif",  # 16 bits, which become deep.png
        7: "deep.png",
        8: "../elsewhere/y.png",
        9: "8_y.png",
        10: str(outside / "z.png"),
        11: "10_z.png",
        12: "n" * 246 + ".png",
        13: "12_" + "n" * 40 + ".png",
        14: "a/b.png",
        15: "A.png/c.png",
        16: "e\u0301.png",  # one letter in two ways
        17: "\u00e9.png",
    }
    (data.folder / "elsewhere").symlink_to(outside)
    for number, name in names.items():
        deep = _noise(kind="TIFF", mode="I;16") if name == "deep.tif" else None
        data.add(name, deep, number=number)
    checked = data.check()
    before = _state(tmp_path)
    assert write_repaired(checked, tmp_path / "copy") == {}
    copy = tmp_path.parent / f"{tmp_path.name}_copy"
    shutil.move(tmp_path / "copy", copy)
    assert _state(tmp_path) == before
    found = {each["id"]: each["file_name"] for each in _labels(copy)["images"]}
    assert len({name.casefold() for name in found.values()}) == len(found) == len(names) + 1
    assert all(len(os.fsencode(name)) < 256 and ".." not in name for name in found.values())
    for number in (2, 3, 7, 9, 11, 13, 14):
        assert found[number] == names[number]  # those that may keep theirs do
    for number, name in names.items():
        if number != 6:
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
        data.add(f"{number}.png", number=number)
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
    assert Counter(_kinds(found)) == {**counts, "grey image": 1}
    grey = next(each for each in found.findings if each[1].kind == "grey image")
    assert (grey[0], grey[1].image_id) == ("train", 86)
