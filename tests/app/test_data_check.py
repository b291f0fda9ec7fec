"""`vitdet data check`: text, JSON, page, repaired copy and exit statuses."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitdet.app import cli


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images with an object each; in two parts."""
    folder = tmp_path / "data"
    (folder / "annotations").mkdir(parents=True)
    for split, first in (("train", 1), ("val", 3)):
        (folder / split).mkdir()
        images, annotations = [], []
        for number in (first, first + 1):
            name = f"{number}.png"
            Image.effect_noise((40 + number, 30), 90).convert("RGB").save(folder / split / name)
            images.append({"id": number, "file_name": name, "width": 40 + number, "height": 30})
            label = {"id": number, "image_id": number, "category_id": 1}
            annotations.append({**label, "bbox": [5, 5, 10, 8], "area": 80})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 1, "name": "cat <1>"}, {"id": 2, "name": "$dog$"}]
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return folder


def _change(data: Path, **values: Any) -> None:
    path = data / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0].update(values)
    path.write_text(json.dumps(content))


def _check(data: Path, *words: object) -> int:
    return cli.main(["data", "check", str(data), *map(str, words)])


def test_text_and_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _check(data) == 0
    assert capsys.readouterr().out.splitlines() == [
        "data         COCO json: train 2 images, 2 objects; val 2 images, 2 objects",
        "data         1 class without any object: $dog$",
        "result       no faults",
    ]
    json_file = data / "annotations" / "instances_val.json"
    assert _check(json_file, "--images", data / "val") == 0
    assert "COCO json: val 2 images, 2 objects" in capsys.readouterr().out
    _change(data, bbox=[30, 5, 100, 8])
    (data / "train" / "2.png").unlink()
    assert _check(data) == 1
    out = capsys.readouterr().out
    assert "fault        1 x box over the edge: sticks out of the image" in out
    assert (
        "train, annotation 1 of image 1 (1.png): [30, 5, 100, 8] in an image of 41 x 30; "
        "--fix: clipped"
    ) in out
    assert "fault        1 x missing image: no such file" in out
    assert out.splitlines()[-1] == "result       2 faults in 2 images"
    assert _check(data, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["faults"] == 2
    assert found["parts"]["val"] == {"images": 2, "annotations": 2}
    assert found["classes"]["train"] == {"cat <1>": 1, "$dog$": 0}
    over = found["findings"]["box over the edge"]
    assert (over["severity"], over["count"]) == ("fault", 1)
    assert (over["examples"][0]["image_id"], over["examples"][0]["split"]) == (1, "train")
    assert found["notes"] == ["1 class without any object: $dog$"]


def test_the_page_has_pictures_and_no_addresses(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(data, bbox=[30, 5, 100, 8], area=88)
    page = tmp_path / "page.html"
    assert _check(data, "--out", page) == 1
    text = page.read_text()
    assert f"page         {page}" in capsys.readouterr().out
    assert not re.search(r"https?://|<script|<link rel=\"[^i]|@import|url\(", text)
    assert "<h1>1 faults: " in text
    plain = re.sub(r"<[^>]+>\s*", "|", text)
    assert "|cat &lt;1&gt;||2||2||" in plain  # objects of train and val
    assert "|train||2||41 x 30||42 x 30||2||2||0||" in plain
    (example,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    picture = Image.open(io.BytesIO(base64.b64decode(example))).convert("RGB")
    assert picture.size == (240 + 32, round(30 * 240 / 41) + 32)
    # the box reaches from 30 of 41 pixels to the edge of the picture
    row: list[Any] = [picture.getpixel((x, 16 + round(5 * 240 / 41))) for x in range(272)]
    red = [x for x, pixel in enumerate(row) if pixel[0] > 150 and max(pixel[1:]) < 90]
    assert min(red) == pytest.approx(16 + 30 * 240 / 41, abs=4)
    assert max(red) >= picture.width - 6


def test_names_may_hold_anything(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        path = data / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = "\x1b[31m<b>red\ud800\n"
        if split == "train":
            content["images"][0]["file_name"] = "\x1b[2J\ud800.png"
        path.write_text(json.dumps(content))
    page = tmp_path / "page.html"
    assert _check(data, "--out", page, "--fix", tmp_path / "copy") == 1
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert "lost         1 objects (1 x unreadable file)" in out
    assert not {"\x1b", "<b>"} & set(re.findall("\x1b|<b>", page.read_text(encoding="utf-8")))


def test_a_repaired_copy_and_what_it_loses(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _change(data, bbox=[30, 5, 100, 8])
    copy = tmp_path / "copy"
    assert _check(data, "--fix", copy) == 0
    out = capsys.readouterr().out
    assert f"repaired     all changes are listed in {copy / 'repairs.json'}" in out
    assert "lost" not in out
    content = json.loads((copy / "annotations/instances_train.json").read_text())
    assert content["annotations"][0]["bbox"] == [30, 5, 11, 8]
    assert content["annotations"][0]["area"] == 80  # near enough to the 88 of the box
    assert json.loads((copy / "repairs.json").read_text())[0]["done"] == "clipped"
    assert _check(copy) == 0
    _change(data, bbox=[5, 5, 0, 8])
    (data / "val" / "3.png").unlink()
    assert _check(data, "--fix", tmp_path / "second") == 1
    out = capsys.readouterr().out
    assert "lost         2 objects (1 x empty box, 1 x missing image)" in out
    assert "lost         1 images (1 x missing image)" in out


def test_no_command_changes_the_data(data: Path, tmp_path: Path) -> None:
    def state() -> dict[Path, Any]:
        found = {path: path.lstat() for path in data.rglob("*")}
        return {path: (stat.st_mtime_ns, stat.st_nlink) for path, stat in found.items()}

    Image.open(data / "train/1.png").save(data / "train/2.png", format="JPEG")  # has to be renamed
    before = state()
    for words in ([], ["--json"], ["--out", tmp_path / "page.html"], ["--fix", tmp_path / "copy"]):
        assert _check(data, *words) in (0, 1)
    (tmp_path / "notes.txt").write_text("mine")
    labels = data / "annotations" / "instances_train.json"
    for target in (data / "page.html", data / "train/1.png", labels, tmp_path / "notes.txt"):
        assert _check(data, "--out", target) == 2
    assert state() == before
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_wrong_input_is_status_2(data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for words, text in (
        ([tmp_path / "none"], "none"),
        ([data, "--fix", data / "copy"], "expected a folder apart from the data"),
        ([data, "--fix", tmp_path / "file/copy"], "file"),
        ([data, "--out", tmp_path / "no/page.html"], "no"),
    ):
        assert _check(*words) == 2
        found = capsys.readouterr()
        assert text in found.err
        assert found.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]
