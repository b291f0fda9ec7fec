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
from other_formats import COCO_MINI, Source, write_voc, write_yolo
from PIL import Image

from vitdet.data.checking import Checked, check_data
from vitdet.data.datasets import coco_dataset
from vitdet.data.formats import find_data
from vitdet.data.images import MAX_SCANS, open_image
from vitdet.data.repair import write_repaired
from vitdet.utils.checks import InputError


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

    def write(self) -> Path:
        (self.folder / "annotations").mkdir(exist_ok=True)
        for split, content in self.contents.items():
            path = self.folder / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(content))
        return self.folder


_SEED = iter(range(10**6))


def _pixels(size: tuple[int, int] = (30, 40), channels: int = 3) -> np.ndarray:
    draw = np.random.default_rng(next(_SEED))
    return draw.integers(0, 255, (*size, channels), dtype=np.uint8)


def _noise(size: tuple[int, int] = (30, 40), kind: str = "PNG", **options: Any) -> bytes:
    return _saved(Image.fromarray(_pixels(size)), kind, **options)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if "turn" in options:
        exif = options["exif"] = Image.Exif()
        exif[0x0112] = options.pop("turn")
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _scans() -> bytes:
    data = _noise(kind="JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * MAX_SCANS + data[-2:]


def _kinds(checked: Checked) -> list[str]:
    return [each.kind for _, each in checked.findings]


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


def _replace(how: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        how(path)

    return change


def _write(data: Callable[[], bytes]) -> Callable[[Path], None]:
    return _replace(lambda each: each.write_bytes(data()))


# name of the file, change, kind, whether the image is in the copy
FILES: dict[str, tuple[str, Callable[[Path], None], str, bool]] = {
    "missing": ("a.png", Path.unlink, "missing image", False),
    "dead link": ("a.png", _replace(lambda each: each.symlink_to("b")), "missing image", False),
    "circle": ("a.png", _replace(lambda each: each.symlink_to("a.png")), "unreadable file", False),
    "device": ("a.png", _replace(lambda each: each.symlink_to("/dev/zero")), "not a file", False),
    "folder": ("a.png", _replace(Path.mkdir), "not a file", False),
    "pipe": ("a.png", _replace(os.mkfifo), "not a file", False),
    "text": ("a.png", _write(lambda: b"no image at all"), "unknown format", False),
    "postscript": ("a.jpg", _write(lambda: b"%!PS-Adobe-3.0\n"), "unknown format", False),
    "cut": ("a.jpg", _write(lambda: _noise(kind="JPEG")[:-200]), "damaged image", False),
    "cut png": ("a.png", _write(lambda: _noise()[:400]), "damaged image", False),
    "scans": ("a.jpg", _write(_scans), "too many scans", False),
    "png as jpg": ("a.jpg", _write(_noise), "wrong extension", True),
    "16 bits": (
        "a.png",
        _write(lambda: _saved(Image.fromarray(_pixels()[..., 0].astype(np.uint16) * 200), "PNG")),
        "more than 8 bits",
        True,
    ),
    "turned jpeg": (
        "a.jpg",
        _write(lambda: _noise(kind="JPEG", turn=6)),
        "EXIF rotation",
        True,
    ),
    "turned png": ("a.png", _write(lambda: _noise(turn=8)), "EXIF rotation", True),
    "turned tiff": ("a.tif", _write(lambda: _noise(kind="TIFF", turn=6)), "EXIF rotation", True),
    "shown upright": (
        "a.jpg",
        _write(lambda: _noise((40, 30), "JPEG", turn=6)),
        "turned by EXIF",
        True,
    ),
    "another size": ("a.png", _write(lambda: _noise((31, 41))), "wrong size", True),
    "print": (
        "a.jpg",
        _write(lambda: _saved(Image.fromarray(_pixels()).convert("CMYK"), "JPEG")),
        "CMYK image",
        True,
    ),
    "alpha": (
        "a.png",
        _write(lambda: _saved(Image.fromarray(_pixels()).convert("RGBA"), "PNG")),
        "transparent image",
        True,
    ),
    "grey": (
        "a.png",
        _write(lambda: _saved(Image.fromarray(_pixels()[..., 0]), "PNG")),
        "grey image",
        True,
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_every_kind(data: Data, tmp_path: Path, case: str) -> None:
    name, change, kind, stays = FILES[case]
    path = data.add(name)
    change(path)
    checked = check_data(find_data(data.write()))
    assert _kinds(checked) == [kind]
    lost = write_repaired(checked, tmp_path / "copy")
    assert lost == ({} if stays else {kind: 1})
    again = check_data(find_data(tmp_path / "copy"))
    assert again.faults == []
    (entry,) = (
        (
            each
            for each in json.loads(
                (tmp_path / "copy/annotations/instances_train.json").read_text()
            )["images"]
            if each["file_name"] != "train.png"
        )
        if stays
        else ({},)
    )
    if not stays:
        return
    written = open_image(tmp_path / "copy/train" / entry["file_name"])
    assert (written.height, written.width) == (entry["height"], entry["width"])
    if kind == "EXIF rotation":  # the pixels as they are stored
        with Image.open(path) as stored:
            shown = np.asarray(open_image(path))
            turned = np.rot90(shown, 1 if stored.getexif().get(0x0112) == 6 else -1)
        assert np.array_equal(np.asarray(written), turned)
    elif kind == "more than 8 bits":
        assert np.asarray(written).max() == 255
    elif kind == "wrong extension":
        assert entry["file_name"] == "a.png"
    else:
        copied = tmp_path / "copy/train" / entry["file_name"]
        assert copied.read_bytes() == path.read_bytes()
        assert copied.stat().st_nlink == path.stat().st_nlink == 1


def test_an_image_above_pillows_limit_is_sound(data: Data, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    checked = check_data(find_data(data.write()))
    assert checked.findings == []
    assert write_repaired(checked, tmp_path / "copy") == {}


def test_an_image_above_the_limit_of_what_is_read_is_kept(
    data: Data, tmp_path: Path, monkeypatch
) -> None:
    from vitdet.data import images

    monkeypatch.setattr(images.opened.__wrapped__, "__defaults__", (None, images.FORMATS, 1000))
    checked = check_data(find_data(data.write()))
    assert _kinds(checked) == ["too many pixels"] * 2
    assert write_repaired(checked, tmp_path / "copy") == {}
    assert (tmp_path / "copy/train/train.png").read_bytes() == (
        data.folder / "train/train.png"
    ).read_bytes()


def test_long_images_are_named(data: Data) -> None:
    data.add("strip.png", size=(2, 120))
    assert _kinds(check_data(find_data(data.write()))) == ["tiny object", "elongated image"]


def test_one_image_twice_is_joined_with_its_objects(data: Data, tmp_path: Path) -> None:
    first = data.add("a.png", number=1)
    data.add("a.png", first.read_bytes(), number=2)
    data.add("b.png", first.read_bytes(), number=3)
    data.contents["train"]["annotations"][-1]["bbox"] = [1, 1, 10, 15]  # only b.png has it
    data.contents["train"]["annotations"][-1]["area"] = 150
    checked = check_data(find_data(data.write()))
    assert sorted(_kinds(checked)) == ["repeated file", "same image twice"]
    assert write_repaired(checked, tmp_path / "copy") == {}
    content = json.loads((tmp_path / "copy/annotations/instances_train.json").read_text())
    assert {each["file_name"] for each in content["images"]} == {"a.png", "train.png"}
    boxes = [each["bbox"] for each in content["annotations"] if each["image_id"] == 1]
    assert boxes == [[10, 7, 20, 15], [1, 1, 10, 15]]
    assert sorted(each.name for each in (tmp_path / "copy/train").iterdir()) == [
        "a.png",
        "train.png",
    ]


def test_an_image_of_two_parts_leaves_training(data: Data, tmp_path: Path) -> None:
    data.add("of_val.png", (data.folder / "val/val.png").read_bytes())
    checked = check_data(find_data(data.write()))
    assert _kinds(checked) == ["image in two parts"]
    assert checked.findings[0][1].got == "the bytes of val.png of val"
    assert write_repaired(checked, tmp_path / "copy") == {"image in two parts": 1}
    content = json.loads((tmp_path / "copy/annotations/instances_train.json").read_text())
    assert [each["file_name"] for each in content["images"]] == ["train.png"]


# --- the copy -------------------------------------------------------------------------------------


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
    deep = _saved(Image.fromarray(_pixels()[..., 0].astype(np.uint16) * 200), "TIFF")
    (data.folder / "elsewhere").symlink_to(outside)
    for number, name in names.items():
        data.add(name, deep if name == "deep.tif" else None, number=number)
    before = _state(tmp_path)
    checked = check_data(find_data(data.write(), images=None))
    before = _state(tmp_path)
    assert write_repaired(checked, tmp_path / "copy") == {}
    shutil.move(tmp_path / "copy", tmp_path.parent / f"{tmp_path.name}_copy")
    copy = tmp_path.parent / f"{tmp_path.name}_copy"
    assert _state(tmp_path) == before
    content = json.loads((copy / "annotations/instances_train.json").read_text())
    found = {each["id"]: each["file_name"] for each in content["images"]}
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


def test_places_that_are_refused(data: Data, tmp_path: Path) -> None:
    checked = check_data(find_data(data.write()))
    write_repaired(checked, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    before = _state(tmp_path)
    for output in (data.folder, data.folder / "copy", tmp_path, data.folder / "train/x"):
        with pytest.raises(InputError, match=r"expected a folder apart from the data, got one"):
            write_repaired(checked, output)
    for output in (tmp_path / "copy", tmp_path / "link", data.folder.parent / "data2"):
        (tmp_path / "data2").write_text("a file") if output.name == "data2" else None
        with pytest.raises(InputError, match="expected a new folder, got one with content"):
            write_repaired(checked, output)
    (tmp_path / "data2").unlink()
    assert {key: value[0] for key, value in _state(tmp_path).items()} == {
        key: value[0] for key, value in before.items()
    }


def test_a_full_disk_leaves_nothing(data: Data, tmp_path: Path, monkeypatch) -> None:
    checked = check_data(find_data(data.write()))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(InputError, match=r"--fix .*copy: could not be written \(No space left"):
        write_repaired(checked, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--fix .*file/copy: the folder cannot be made \(Not a d"):
        write_repaired(checked, tmp_path / "file/copy")


def test_corner_boxes_are_asked_about(data: Data, tmp_path: Path) -> None:
    for number in range(1, 6):
        data.add(f"{number}.png", number=number)
    for content in data.contents.values():
        for each in content["annotations"]:
            each["bbox"] = [20, 15, 39, 29]
            del each["area"]
    checked = check_data(find_data(data.write()))
    with pytest.raises(InputError, match=r"--boxes corners, or --boxes xywh if they are x, y"):
        write_repaired(checked, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    answered = check_data(find_data(data.folder), boxes="corners")
    assert write_repaired(answered, tmp_path / "copy") == {}
    content = json.loads((tmp_path / "copy/annotations/instances_train.json").read_text())
    assert {str(each["bbox"]) for each in content["annotations"]} == {"[20, 15, 19, 14]"}


# --- real data ------------------------------------------------------------------------------------

real = pytest.mark.skipif(
    not COCO_MINI.is_dir(), reason=f"no photographs in {COCO_MINI} (set VITDET_COCO_MINI)"
)


@real
def test_clean_data_have_notes_only() -> None:
    found = check_data(find_data(COCO_MINI))
    assert found.faults == []
    assert Counter(_kinds(found)) == {
        "crowd region": 14,
        "tiny object": 2,
        "image without annotations": 2,
        "grey image": 1,
    }
    grey = next(each for each in found.findings if each[1].kind == "grey image")
    assert (grey[0], grey[1].image_id) == ("train", 86)


@real
@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_other_formats_are_checked_and_repaired_too(form: str, tmp_path: Path) -> None:
    source = Source(4)
    if form == "yolo":
        write_yolo(source, tmp_path / "data", polygons=False)
        labels = next((tmp_path / "data/train/labels").glob("*.txt"))
        labels.write_text(labels.read_text() + "3 0.99 0.5 0.5 0.1\n")
    else:
        write_voc(source, tmp_path / "data", masks=False)
        xml = next(
            path
            for path in sorted((tmp_path / "data/Annotations").glob("*.xml"))
            if "<xmax>" in path.read_text()
        )
        xml.write_text(xml.read_text().replace("<xmax>", "<xmax>9", 1))
    found = check_data(find_data(tmp_path / "data"))
    assert {each.kind for _, each in found.faults} <= {"box over the edge", "wrong area"}
    assert "box over the edge" in _kinds(found)
    assert write_repaired(found, tmp_path / "copy") == {}
    assert check_data(find_data(tmp_path / "copy")).faults == []
    for split in ("train", "val"):
        path = tmp_path / f"copy/annotations/instances_{split}.json"
        if path.exists():
            coco_dataset(path, tmp_path / "copy" / split)
