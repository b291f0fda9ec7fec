"""`vitdet predict` and `vitdet strip`: what they write, say and return."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from vitdet import Predictor, checkpoint
from vitdet.app import cli
from vitdet.utils.run_lengths import decode


@pytest.fixture
def photos(drawn_run, tmp_path) -> Path:
    """A folder of four images in three formats."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, path in enumerate(drawn_run.images[:3]):
        shutil.copy(path, folder / f"{number}.jpg")
    Image.open(drawn_run.images[3]).save(folder / "3.png")
    Image.open(drawn_run.images[3]).save(folder / "4.bmp")
    return folder


def predict(drawn_run, *words: object) -> int:
    weights = ["--weights", str(drawn_run.weights), "--device", "cpu", "--precision", "fp32"]
    return cli.main(["predict", *map(str, words), *weights])


def test_a_folder_gives_pictures_json_and_a_line_each(drawn_run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in photos.iterdir()}
    words = [photos, "--out", out, "--save-json", "--batch-size", "2", "--threshold", "0"]
    assert predict(drawn_run, *words) == 0
    assert {path: path.read_bytes() for path in photos.iterdir()} == before
    names = {"0.jpg", "1.jpg", "2.jpg", "3.png", "4.jpg"}
    assert {path.name for path in out.iterdir()} == names | {f"{i}.json" for i in range(5)}
    with Image.open(out / "0.jpg") as drawn:
        assert drawn.size == (480, 480)
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == sorted(map(str, photos.iterdir()))
    assert lines[-1] == f"pictures in {out}"

    options = {"threshold": 0.0, "device": "cpu", "precision": "fp32", "batch_size": 2}
    wanted = Predictor.from_checkpoint(drawn_run.weights, **options)(photos)
    for number, (line, result) in enumerate(zip(lines, wanted, strict=False)):
        found = ", ".join(f"{count} {name}" for name, count in result.counts().items())
        assert f"128 x 128  {found}  (" in line
        content = json.loads((out / f"{number}.json").read_text())
        assert content == json.loads(result.to_json())
        assert decode(content["detections"][0]["mask"]).shape == (128, 128)


def test_a_bad_image_does_not_stop_the_others(drawn_run, photos, tmp_path, capsys):
    (photos / "1.jpg").write_text("no image")
    out = tmp_path / "out"
    words = [photos, tmp_path / "nothing.jpg", "--out", out, "--batch-size", "3"]
    assert predict(drawn_run, *words) == 1
    assert {path.name for path in out.iterdir()} == {"0.jpg", "2.jpg", "3.png", "4.jpg"}
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(f"error: input {tmp_path}/nothing.jpg: expected a file or folder")
    assert errors[1].startswith(f"error: image {photos}/1.jpg: expected an image that can be dec")
    assert errors[2:] == ["2 of 6 inputs could not be read"]


def test_nothing_but_bad_images_is_a_wrong_input(drawn_run, tmp_path, capsys):
    assert predict(drawn_run, tmp_path / "nothing.jpg", "--out", tmp_path / "out") == 2
    assert "1 of 1 inputs could not be read" in capsys.readouterr().err


def test_inputs_are_never_written_over(drawn_run, photos, capsys):
    before = {path: path.read_bytes() for path in photos.iterdir()}
    assert predict(drawn_run, photos, "--out", photos) == 2
    assert "0.jpg: expected a file of its own, got an input. Choose" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_equal_names_and_repeated_inputs(drawn_run, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(photos / "0.jpg", other / "0.jpg")
    out = tmp_path / "out"
    pattern = str(photos / "[01].jpg")
    assert predict(drawn_run, pattern, photos / "0.jpg", other / "0.jpg", "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {"0.jpg", "1.jpg", "0-2.jpg"}


def test_options_reach_the_predictor(drawn_run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    words = [photos / "0.jpg", "--out", out, "--threshold", "0", "--no-pictures", "--save-json"]
    found = {}
    for name, options in {
        "plain": [],
        "classes": ["--classes", "star, ring"],
        "tta": ["--tta"],
        "scales": ["--tta-scales", "1,1.5"],
        "slices": ["--slices", "80", "--overlap", "0.1"],
        "ema": ["--use", "ema"],
    }.items():
        assert predict(drawn_run, *words, *options) == 0
        assert [path.name for path in out.iterdir()] == ["0.json"]
        content = json.loads((out / "0.json").read_text())
        found[name] = [(each["class"], each["score"]) for each in content["detections"]]
    assert len({tuple(each) for each in found.values()}) == 6  # all of them differ
    assert found["classes"] == [each for each in found["plain"] if each[0] in ("star", "ring")]
    assert "pictures in" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--classes", "stra"], "class: expected one of 6 classes"),
        (["--tta-scales", "1,big"], "--tta-scales: expected numbers such as 1,1.25, got 1,big"),
        (["--overlap", "0.2"], "--overlap: expected --slices beside it, got none"),
        (["--slices", "0"], "slices: expected a size of at least 1 pixel"),
        (["--threshold", "2"], "predictor: expected a threshold of 0 to 1"),
        (["--device", "gpu"], "device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        (["--class-names", "no.json"], "class list no.json"),
    ],
)
def test_wrong_options_are_one_line(drawn_run, photos, tmp_path, capsys, options, text):
    weights = ["--weights", str(drawn_run.weights), "--out", str(tmp_path / "out")]
    assert cli.main(["predict", str(photos), *weights, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {text}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_video_gives_a_video_and_a_line_a_frame(drawn_run, tmp_path, capsys):
    code = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), code, 5.0, (128, 128))
    for path in drawn_run.images[:4]:
        writer.write(np.asarray(Image.open(path))[..., ::-1].copy())
    writer.release()
    (tmp_path / "bad.mp4").write_text("no video")
    out = tmp_path / "out"
    words = [tmp_path / "clip.avi", tmp_path / "bad.mp4", "--out", out, "--save-json"]
    assert predict(drawn_run, *words, "--threshold", "0", "--batch-size", "3") == 1
    assert {path.name for path in out.iterdir()} == {"clip.mp4", "clip.jsonl"}
    lines = [json.loads(line) for line in (out / "clip.jsonl").read_text().splitlines()]
    assert [line["image"].rpartition(" ")[2] for line in lines] == ["0", "1", "2", "3"]
    video = cv2.VideoCapture(str(out / "clip.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 5
    frames = 0
    while video.read()[0]:
        frames += 1
    video.release()
    assert frames == 4
    said = capsys.readouterr()
    total = sum(len(line["detections"]) for line in lines)
    assert f"{tmp_path}/clip.avi  128 x 128  " in said.out
    assert "(4 frames, " in said.out
    counts = said.out.split("128 x 128  ")[1].split("  (")[0].split(", ")
    assert sum(int(count.split()[0]) for count in counts) == total
    assert "bad.mp4: expected frames that OpenCV reads" in said.err


def test_strip_writes_a_file_that_predicts(drawn_run, photos, tmp_path, capsys):
    slim = tmp_path / "slim.safetensors"
    assert cli.main(["strip", str(drawn_run.weights), str(slim)]) == 0
    assert f"wrote {slim}: " in capsys.readouterr().out
    assert set(checkpoint.read(slim)) == {"model", "vitdet"}
    words = ["--out", str(tmp_path / "out"), "--weights", str(slim), "--device", "cpu"]
    assert cli.main(["predict", str(photos / "0.jpg"), *words]) == 0
    assert (tmp_path / "out" / "0.jpg").is_file()
    assert cli.main(["strip", str(slim), str(slim)]) == 2
    assert "expected a file of its own, got the input" in capsys.readouterr().err
