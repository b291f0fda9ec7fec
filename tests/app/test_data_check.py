"""`vitdet data check`: text, JSON, page, repaired copy and exit statuses."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from vitdet.app import cli


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images with an object each; in two parts."""
    folder = tmp_path / "data"
    for split, first in (("train", 1), ("val", 3)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for number in (first, first + 1):
            name = f"{number}.png"
            Image.effect_noise((40 + number, 30), 90).convert("RGB").save(folder / split / name)
            images.append({"id": number, "file_name": name, "width": 40 + number, "height": 30})
            annotations.append(_object(number, number))
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 1, "name": "cat <1>"}, {"id": 2, "name": "$dog$"}]
        (folder / "annotations").mkdir(exist_ok=True)
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return folder


def _object(number: int, image: int) -> dict:
    box = [5, 5, 10, 8]
    return {"id": number, "image_id": image, "category_id": 1, "bbox": box, "area": 80}


def _change(data: Path, **values: object) -> None:
    path = data / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0].update(values)
    path.write_text(json.dumps(content))


def _state(folder: Path) -> dict[str, object]:
    """Names, bytes, times and numbers of links of all that is in a folder."""
    return {
        str(path): (path.is_file() and path.read_bytes(), *_status(path))
        for path in sorted(folder.rglob("*"))
    }


def _status(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_mtime_ns, status.st_nlink if path.is_file() else 0


def test_clean_data_are_status_0(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(data)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "data         COCO json: train 2 images, 2 objects; val 2 images, 2 objects",
        "data         1 class without any object: $dog$",
        "result       no faults",
    ]


def test_faults_are_status_1_and_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(data, bbox=[30, 5, 100, 8])
    (data / "train" / "2.png").unlink()
    assert cli.main(["data", "check", str(data)]) == 1
    out = capsys.readouterr().out
    assert "fault        1 x box over the edge: sticks out of the image" in out
    assert (
        "train, annotation 1 of image 1 (1.png): [30, 5, 100, 8] in an image of 41 x 30; "
        "--fix: clipped"
    ) in out
    assert "fault        1 x missing image: no such file" in out
    assert out.splitlines()[-1] == "result       2 faults in 2 images"


def test_json_is_for_machines(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(data, bbox=[5, 5, 0, 8])
    assert cli.main(["data", "check", str(data), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["faults"] == 1
    assert found["parts"]["val"] == {"images": 2, "annotations": 2}
    assert found["classes"]["train"] == {"cat <1>": 1, "$dog$": 0}
    empty = found["findings"]["empty box"]
    assert (empty["severity"], empty["count"]) == ("fault", 1)
    assert (empty["examples"][0]["image_id"], empty["examples"][0]["split"]) == (1, "train")
    assert found["notes"] == ["1 class without any object: $dog$"]


def test_one_file_with_its_images(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file = data / "annotations" / "instances_val.json"
    words = ["data", "check", str(json_file), "--images", str(data / "val")]
    assert cli.main(words) == 0
    assert "COCO json: val 2 images, 2 objects" in capsys.readouterr().out


def test_the_page_has_pictures_and_no_addresses(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(data, bbox=[30, 5, 100, 8], area=88)
    page = tmp_path / "page.html"
    assert cli.main(["data", "check", str(data), "--out", str(page)]) == 1
    text = page.read_text()
    assert f"page         {page}" in capsys.readouterr().out
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert "<h1>1 faults: " in text
    assert "cat <1>" not in text
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(each)))
        for each in re.findall(r'src="data:image/\w+;base64,([^"]+)"', text)
    ]
    assert [each.format for each in pictures] == ["PNG", "PNG", "JPEG"]  # histograms, one example
    example = pictures[2].convert("RGB")
    assert example.size == (240 + 32, round(30 * 240 / 41) + 32)
    # the box reaches from 30 of 41 pixels to the edge of the picture
    red = [
        x
        for x in range(example.width)
        if (pixel := example.getpixel((x, 16 + round(5 * 240 / 41)))) is not None
        and pixel[0] > 150
        and max(pixel[1:]) < 90
    ]
    assert min(red) == pytest.approx(16 + 30 * 240 / 41, abs=4)
    assert max(red) >= example.width - 6


def test_names_may_hold_anything(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "\x1b[31mred\ud800\n"
    content["images"][0]["file_name"] = "\x1b[2J\ud800.png"
    path.write_text(json.dumps(content))
    val = data / "annotations" / "instances_val.json"
    other = json.loads(val.read_text())
    other["categories"] = content["categories"]
    val.write_text(json.dumps(other))
    page, copy = tmp_path / "page.html", tmp_path / "copy"
    words = ["data", "check", str(data), "--out", str(page), "--fix", str(copy)]
    assert cli.main(words) == 1
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert "lost         1 objects (1 x unreadable file)" in out
    assert "\x1b" not in page.read_text(encoding="utf-8")


def test_a_repaired_copy_is_clean(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(data, bbox=[30, 5, 100, 8])
    copy = tmp_path / "copy"
    assert cli.main(["data", "check", str(data), "--fix", str(copy)]) == 0
    out = capsys.readouterr().out
    assert f"repaired     all changes are listed in {copy / 'repairs.json'}" in out
    assert "lost" not in out
    content = json.loads((copy / "annotations/instances_train.json").read_text())
    assert content["annotations"][0]["bbox"] == [30, 5, 11, 8]
    assert content["annotations"][0]["area"] == 80  # near enough to the 88 of the box
    assert json.loads((copy / "repairs.json").read_text())[0]["done"] == "clipped"
    assert cli.main(["data", "check", str(copy)]) == 0


def test_what_a_repair_loses_is_said_and_status_1(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(data, bbox=[5, 5, 0, 8])
    (data / "val" / "3.png").unlink()
    assert cli.main(["data", "check", str(data), "--fix", str(tmp_path / "copy")]) == 1
    out = capsys.readouterr().out
    assert "lost         2 objects (1 x empty box, 1 x missing image)" in out
    assert "lost         1 images (1 x missing image)" in out


def test_no_command_changes_the_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open(data / "train/1.png").save(data / "train/1.jpg", format="PNG")
    path = data / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 9, "file_name": "1.jpg", "width": 41, "height": 30})
    content["annotations"].append(_object(9, 9))
    path.write_text(json.dumps(content))
    before = _state(data)
    for number, more in enumerate(
        ([], ["--json"], ["--out", "page.html"], ["--fix", "copy"], ["--boxes", "xywh"])
    ):
        words = [str(tmp_path / f"{number}{each}") if "." in each else each for each in more]
        words = [str(tmp_path / each) if each == "copy" else each for each in words]
        assert cli.main(["data", "check", str(data), *words]) in (0, 1)
        assert _state(data) == before, more
    for target in (data / "page.html", data / "train/1.png", path):
        assert cli.main(["data", "check", str(data), "--out", str(target)]) == 2
        assert _state(data) == before, target
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    assert cli.main(["data", "check", str(data), "--out", str(other)]) == 2
    assert other.read_text() == "mine"


def test_wrong_input_is_status_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for words, text in (
        ([str(tmp_path / "none")], "none"),
        ([str(data), "--fix", str(data / "copy")], "expected a folder apart from the data"),
        ([str(data), "--fix", str(data)], "got one that is"),
        ([str(data), "--fix", str(tmp_path / "file/copy")], "file"),
        ([str(data), "--out", str(tmp_path / "no/page.html")], "no"),
    ):
        assert cli.main(["data", "check", *words]) == 2
        found = capsys.readouterr()
        assert text in found.err
        assert found.err.count("\n") == 1
    assert sorted(path.name for path in data.iterdir()) == ["annotations", "train", "val"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]
