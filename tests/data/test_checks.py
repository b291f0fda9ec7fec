"""`vitdet data check`: faults of files and between parts are found, and mended in a copy alone."""

import base64
import errno
import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from folders import COCO_MINI
from PIL import Image

from vitdet.app import cli
from vitdet.data import images
from vitdet.data.clean import check_data, write_repaired
from vitdet.data.formats import find_data
from vitdet.utils.checks import InputError

_SEED = iter(range(10**6))


class Data:
    """Data of one class in two parts; every image has an object, and pixels of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.contents = {}
        for split in ("train", "val"):
            categories = [{"id": 1, "name": "cat"}]
            self.contents[split] = {"images": [], "annotations": [], "categories": categories}
            self.add(f"{split}.png", split=split)

    def add(self, name, data=None, *, split="train", size=(30, 40)):
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

    def write(self):
        (self.folder / "annotations").mkdir(exist_ok=True)
        for split, content in self.contents.items():
            path = self.folder / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(content))

    def check(self, **options):
        self.write()
        return check_data(find_data(self.folder), **options)

    def command(self, *words):
        self.write()
        return cli.main(["data", "check", str(self.folder), *map(str, words)])


def _noise(size=(30, 40), kind="PNG", mode="RGB", turn=1):
    pixels = np.random.default_rng(next(_SEED)).integers(0, 255, (*size, 3), dtype=np.uint8)
    deep = mode == "I;16"
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200 if deep else pixels)
    image = image if deep else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    image.save(buffer, format=kind, progressive=True, **({"exif": exif} if turn > 1 else {}))
    return buffer.getvalue()


def _scans():
    data = _noise(kind="JPEG")
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * images.MAX_SCANS + data[-2:]


def _kinds(checked):
    return [each.kind for each in checked.findings]


def _labels(copy):
    return json.loads((copy / "annotations/instances_train.json").read_text())


def _state(folder):
    """Everything that a change of a folder would show."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else None
        found[str(path)] = (data, status.st_mtime_ns, status.st_nlink, status.st_ino)
    return found


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path / "data")


# name of the file, what is in its place, kind, its name in the copy
FILES = [
    ("a.png", lambda _: None, "missing image", ""),
    ("a.png", lambda path: path.symlink_to("a.png"), "unreadable file", ""),
    ("a.png", lambda path: path.symlink_to("/dev/zero"), "not a file", ""),
    ("a.png", Path.mkdir, "not a file", ""),
    ("a.png", os.mkfifo, "not a file", ""),
    ("a.jpg", b"%!PS-Adobe-3.0\n", "unknown format", ""),
    ("a.jpg", _noise(kind="JPEG")[:-200], "damaged image", ""),
    ("a.png", _noise()[:400], "damaged image", ""),
    ("a.jpg", _scans(), "too many scans", ""),
    ("a.jpg", _noise(), "", "a.jpg"),  # a PNG is sound, whatever its name
    ("a.png", _noise(mode="I;16"), "more than 8 bits", "a.png"),
    ("a.jpg", _noise(kind="JPEG", turn=6), "EXIF rotation", "a.png"),
    ("a.png", _noise(turn=8), "EXIF rotation", "a.png"),
    ("a.tif", _noise(kind="TIFF", turn=6), "EXIF rotation", "a.png"),
    ("a.jpg", _noise((40, 30), "JPEG", turn=6), "turned by EXIF", "a.jpg"),
    ("a.png", _noise((31, 41)), "wrong size", "a.png"),
]


@pytest.mark.parametrize(("name", "what", "kind", "expected"), FILES)
def test_files_of_every_kind(data, tmp_path, name, what, kind, expected):
    path, copy = data.add(name), tmp_path / "copy"
    path.unlink()
    path.write_bytes(what) if isinstance(what, bytes) else what(path)
    checked = data.check()
    assert _kinds(checked) == [kind] * bool(kind)
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


def test_large_images_are_sound(data, tmp_path, monkeypatch):
    limits = (None, images.FORMATS, 1000)
    monkeypatch.setattr(images.opened.__wrapped__, "__defaults__", limits)
    checked = data.check()
    assert _kinds(checked) == ["too many pixels"] * 2
    assert write_repaired(checked, tmp_path / "copy") == {}
    written = tmp_path / "copy/train/train.png"
    assert written.read_bytes() == (data.folder / "train/train.png").read_bytes()


def test_one_image_twice_is_joined_with_its_objects(data, tmp_path):
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
    assert checked.findings[-1].got == "the bytes of val.png of val"
    assert write_repaired(checked, copy) == {"image in two parts": 1}  # it leaves training
    content = _labels(copy)
    boxes = [each["bbox"] for each in content["annotations"] if each["image_id"] == 1]
    assert boxes == [[10, 7, 20, 15], [1, 1, 10, 15]]
    names = ["a.png", "strip.png", "train.png"]
    assert sorted(each["file_name"] for each in content["images"]) == names
    assert sorted(each.name for each in (copy / "train").iterdir()) == names


def test_names_that_meet_in_the_copy(data, tmp_path):
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


def test_places_that_are_refused(data, tmp_path, monkeypatch, capsys):
    assert data.command("--fix", tmp_path / "copy") == 0
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    (tmp_path / "file").write_text("a file")
    before = _state(tmp_path)
    apart, new = "expected a folder apart from the data", "expected a new folder, got one with"
    page = "expected a new file apart from the data, got"
    table = (
        *(("--fix", data.folder / inside, apart) for inside in (".", "copy", "..", "train/x")),
        *(("--fix", tmp_path / name, new) for name in ("copy", "link", "file")),
        ("--fix", tmp_path / "file/copy", "could not be written (Not a directory)"),
        ("--out", data.folder / "page.html", page),
        ("--out", data.folder / "train/train.png", page),
        ("--out", tmp_path / "file", page),
        ("--out", tmp_path / "none/page.html", "none"),
        ("--images", tmp_path / "none", "none"),
    )
    capsys.readouterr()
    for option, path, text in table:
        assert data.command(option, path) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(InputError, match=r"--fix .*third: could not be written \(No space left"):
        write_repaired(data.check(), tmp_path / "third")
    assert {**_state(tmp_path), **_state(data.folder / "annotations")}.keys() == before.keys()
    assert _state(data.folder / "train").items() <= before.items()


def test_corner_boxes_are_asked_about(data, tmp_path):
    for content in data.contents.values():
        content["annotations"][0].update(bbox=[20, 15, 39, 29], area=266)
    with pytest.raises(InputError, match=r"--boxes corners, or --boxes xywh if they are in pix"):
        write_repaired(data.check(), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert write_repaired(data.check(boxes="corners"), tmp_path / "copy") == {}
    assert _labels(tmp_path / "copy")["annotations"][0]["bbox"] == [20, 15, 19, 14]


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"no photographs in {COCO_MINI}")
def test_clean_data_have_notes_only():
    found = check_data(find_data(COCO_MINI))
    assert found.faults == []
    counts = {"crowd region": 14, "tiny object": 2, "image without annotations": 2}
    assert Counter(_kinds(found)) == counts


# --- the command's words and page -----------------------------------------------------------------


def test_text_and_what_a_copy_loses(data, tmp_path, capsys):
    assert data.command() == 0
    assert capsys.readouterr().out.splitlines() == [
        "data         COCO json: train 1 images, 1 objects; val 1 images, 1 objects",
        "result       no faults",
    ]
    data.add("gone.png").unlink()
    data.add("empty.png")
    objects = data.contents["train"]["annotations"]
    objects[0]["bbox"], objects[2]["bbox"] = [30, 5, 100, 8], [5, 5, 0, 8]
    assert data.command("--fix", tmp_path / "copy") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "data         COCO json: train 3 images, 3 objects; val 1 images, 1 objects",
        "fault        1 x missing image: no such file",
    ]
    assert (
        f"{'':15}train, annotation 1 of image 0 (train.png): [30, 5, 100, 8] in an image of 40 x "
        "30; --fix: clipped"
    ) in lines
    assert lines[-4:] == [
        "result       4 faults in 3 images",
        f"repaired     all changes are listed in {tmp_path / 'copy/repairs.json'}",
        "lost         1 images (1 x missing image)",
        "lost         2 objects (1 x missing image, 1 x empty box)",
    ]
    assert [each["bbox"] for each in _labels(tmp_path / "copy")["annotations"]] == [[30, 5, 10, 8]]
    repairs = json.loads((tmp_path / "copy/repairs.json").read_text())
    assert (repairs[1]["kind"], repairs[1]["done"]) == ("box over the edge", "clipped")


def test_the_page_has_pictures_and_no_addresses(data, tmp_path, capsys):
    data.contents["train"]["annotations"][0].update(bbox=[30, 5, 100, 8], area=80)
    Image.new("RGB", (40, 30), (128, 128, 128)).save(data.folder / "train/train.png")  # no red
    for content in data.contents.values():
        content["categories"][0]["name"] = "\x1b[31m<b>cat\ud800\n"
    assert data.command("--out", tmp_path / "page.html") == 1
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert f"page         {tmp_path / 'page.html'}" in out
    assert all(line.isprintable() for line in out.splitlines())
    assert not re.search(r"https?://|<script|<link rel=\"[^i]|@import|url\(|\x1b|<b>", text)
    assert "<h1>1 faults: " in text
    plain = re.sub(r"<[^>]+>\s*", "|", text)
    assert r"&lt;b&gt;cat\ud800" in plain
    assert "||1||1||" in plain  # objects of train and val
    assert "|train||1||40 x 30||40 x 30||1||1||0||" in plain
    assert "2 objects of 1 classes in 2 images; 1 classes have fewer than 30: " in text
    # the fault, a sheet of what can be trained with, a crop of the smallest object of each image
    example, *others = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    shown = [Image.open(io.BytesIO(base64.b64decode(each))).size for each in others]
    assert shown == [(512, 384), (240, 240), (240, 240)]
    picture = Image.open(io.BytesIO(base64.b64decode(example))).convert("RGB")
    assert picture.size == (240 + 32, 180 + 32)
    # the box reaches from 30 of 40 pixels to the edge of the picture
    row = [picture.getpixel((x, 16 + 5 * 6)) for x in range(272)]
    red = [x for x, pixel in enumerate(row) if pixel[0] > 150 and max(pixel[1:]) < 90]
    assert min(red) == pytest.approx(16 + 30 * 6, abs=4)
    assert max(red) >= picture.width - 6
