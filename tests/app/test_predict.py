"""`vitdet predict` and `vitdet strip`: what they write, say and return."""

import json
import os
import shutil
import unicodedata

import cv2
import numpy as np
import pytest
from PIL import Image

from vitdet import Predictor, checkpoint
from vitdet.app import cli
from vitdet.app.predict import note_names, output_names, predict_batch
from vitdet.predict.results import Picture
from vitdet.utils.checks import InputError
from vitdet.utils.files import RESULT_MARKER


@pytest.fixture
def photos(drawn_run, tmp_path):
    """A folder of four images in three formats."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, path in enumerate(drawn_run.images[:3]):
        shutil.copy(path, folder / f"{number}.jpg")
    Image.open(drawn_run.images[3]).save(folder / "3.png")
    Image.open(drawn_run.images[3]).save(folder / "4.bmp")
    return folder


def written(folder):
    """The names of results in a folder, which is marked."""
    assert (folder / RESULT_MARKER).is_file()
    return {path.name for path in folder.iterdir()} - {RESULT_MARKER}


def predict(drawn_run, *words):
    weights = ["--weights", str(drawn_run.weights), "--device", "cpu", "--precision", "fp32"]
    return cli.main(["predict", *map(str, words), *weights])


def test_a_folder_gives_pictures_json_and_a_line_each(drawn_run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in photos.iterdir()}
    words = [photos, "--out", out, "--save-json", "--batch-size", "2", "--threshold", "0"]
    assert predict(drawn_run, *words) == 0
    assert {path: path.read_bytes() for path in photos.iterdir()} == before
    names = {"0.jpg", "1.jpg", "2.jpg", "3.png", "4.jpg"}
    assert written(out) == names | {f"{i}.json" for i in range(5)}
    assert cv2.imread(str(out / "0.jpg")).shape == (480, 480, 3)
    said = capsys.readouterr()
    assert said.err == ""
    first, *lines = said.out.splitlines()
    assert first == "threshold 0"
    assert [line.split("  ")[0] for line in lines[:-1]] == sorted(map(str, photos.iterdir()))
    assert lines[-1] == f"pictures in {out}"
    options = {"threshold": 0.0, "device": "cpu", "precision": "fp32", "batch_size": 2}
    wanted = Predictor.from_checkpoint(drawn_run.weights, **options)(photos)
    for number, (line, result) in enumerate(zip(lines, wanted, strict=False)):
        found = ", ".join(f"{count} {name}" for name, count in result.counts().items())
        assert f"128 x 128  {found}  (" in line
        assert (out / f"{number}.json").read_text() == result.to_json() + "\n"


def test_a_bad_image_does_not_stop_the_others(drawn_run, photos, tmp_path, capsys):
    """Whether it cannot be found, read, drawn or written; what is no image is counted."""
    (photos / "1.jpg").write_text("no image")
    (photos / "cut.jpg").write_bytes((photos / "0.jpg").read_bytes()[:900])
    Image.new("RGB", (66_000, 2)).save(photos / "long.png")  # more than a JPEG holds
    Image.new("RGB", (6000, 20)).save(photos / "strip.jpg")
    os.mkfifo(photos / "pipe.jpg")
    (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
    (photos / "folder.jpg").mkdir()
    shutil.copy(photos / "0.jpg", photos / ("é" * 125 + ".jpg"))  # the name's 254 bytes are all
    for name in ("._0.jpg", "a.heic", "b.heic", "notes"):
        (photos / name).write_bytes(b"\0\5\x16\7")
    out = tmp_path / "out"
    words = [photos, tmp_path / "nothing.jpg", "--out", out, "--batch-size", "3", "--save-json"]
    assert predict(drawn_run, *words) == 1
    pictures = {name for name in written(out) if not name.endswith(".json")}
    long = next(name for name in pictures if name.startswith("é"))
    assert pictures == {"0.jpg", "2.jpg", "3.png", "4.jpg", "strip.jpg", long}
    assert "long.json" in written(out)
    said = capsys.readouterr()
    assert "2 x .heic (convert HEIC to JPEG" in said.out
    for kind in ("1 x hidden file", "1 x folder", "1 x file without suffix"):
        assert kind in said.out
    errors = said.err.splitlines()
    assert errors[0].startswith(f"error: input {tmp_path}/nothing.jpg: nothing is at this path")
    assert errors[-1] == "6 of 12 inputs failed"
    texts = (
        "1.jpg: not an image in a format that is read",
        "cut.jpg: damaged or not complete",
        "loop.jpg: cannot be read",
        "pipe.jpg: a pipe, and not an image",
        "sides of up to 65500 pixels, got uint8 (2, 66000, 3)",
    )
    for line, text in zip(errors[1:-1], texts, strict=True):
        assert text in line


def test_nothing_but_bad_inputs_is_a_wrong_input(drawn_run, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.jpg").touch()
    assert predict(drawn_run, tmp_path / "a.jpg", tmp_path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: image {tmp_path}/a.jpg: an empty file. ")
    assert error.count("\n") == 1  # it is one input, and was told
    monkeypatch.setattr(Predictor, "from_checkpoint", None)  # no weights are read for nothing
    assert predict(drawn_run, tmp_path / "no.jpg", "0", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith("2 of 2 inputs failed\n")


def test_an_image_on_which_a_batch_fails_is_left_out_alone():
    def predictor(batch):
        if any(picture.name == "large" for picture in batch):
            raise MemoryError
        return [picture.name for picture in batch]

    bad = []
    batch = [Picture(name) for name in ("a", "large", "b")]
    assert predict_batch(predictor, batch, bad) == ["a", "b"]
    assert bad == ["large"]


def test_an_interrupt_leaves_what_is_done_and_says_so(
    drawn_run, photos, tmp_path, capsys, monkeypatch
):
    plain = Predictor.__call__

    def interrupted(self, pictures):
        if "2.jpg" in pictures[0].name:
            raise KeyboardInterrupt
        return plain(self, pictures)

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    assert predict(drawn_run, photos, "--out", tmp_path / "out") == 130
    assert written(tmp_path / "out") == {"0.jpg", "1.jpg"}
    assert f"2 of 5 inputs are done, see {tmp_path / 'out'}\n" in capsys.readouterr().err


# --- names of results ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["x/a-2.jpg", "x/a.jpg", "y/a.jpg"],
        ["x/a.jpg", "y/a.jpg", "z/a-2.jpg", "z/a-2-2.png"],
        ["a.jpg", "a.png", "a.mp4", "A.JPG", "a.jpg.png", "a.json.jpg"],
        ["x/é.jpg", unicodedata.normalize("NFD", "y/é.jpg")],
        [f"{'x' * 240}{i}.jpg" for i in range(12)],
        ["x/ .jpg", "y/ .jpg", ".jpg", "x/STRASSE.jpg", "x/straße.jpg"],
    ],
)
def test_every_input_has_results_of_its_own(tmp_path, names):
    out = tmp_path / "out"
    found = output_names([tmp_path / name for name in names], out)
    assert len({p.name.casefold() for p in found.values()}) == len(names)
    assert all(len(os.fsencode(p.name)) < 220 and p.parent == out for p in found.values())


def test_what_is_in_the_folder_is_written_over_by_the_same_input_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "Photo.JPG").touch()  # somebody's
    (out / "photo.png").touch()
    inputs = [tmp_path / name for name in ("x/photo.jpg", "x/b.jpg")]
    first = output_names(inputs, out)
    assert [path.name for path in first.values()] == ["photo-2", "b"]
    note_names(out, first)
    (out / "b.jpg").touch()
    others = [tmp_path / "y" / "b.jpg", *inputs[::-1]]
    assert [path.name for path in output_names(others, out).values()] == ["b-2", "b", "photo-2"]
    note_names(out, output_names(others, out))
    assert output_names(inputs, out) == first
    (out / RESULT_MARKER).write_text("[1]")
    with pytest.raises(InputError, match=r"not a list of results\. Remove it, or choose another"):
        output_names(inputs, out)


def test_repeated_inputs_are_one_and_none_is_written_over(drawn_run, photos, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    shutil.copy(photos / "0.jpg", other / "0.jpg")
    pattern, again = str(photos / "[01].jpg"), photos / ".." / "photos" / "0.jpg"
    assert predict(drawn_run, pattern, again, other / "0.jpg", "--out", out) == 0
    assert written(out) == {"0.jpg", "1.jpg", "0-2.jpg"}
    before = {path: path.read_bytes() for path in photos.iterdir()}
    (tmp_path / "link").symlink_to(photos)
    for out in (photos, tmp_path / "link"):
        assert predict(drawn_run, photos, "--out", out) == 2
        assert "inputs are in this folder. Choose another one." in capsys.readouterr().err
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_options_reach_the_predictor(drawn_run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    words = [photos / "0.jpg", "--out", out, "--threshold", "0", "--no-pictures", "--save-json"]
    found = {}
    for name, options in {
        "plain": [],
        "classes": ["--classes", "star, ring"],
        "again": ["--classes", "ring", "--classes", "star"],
        "boxes": ["--boxes-only"],
        "tta": ["--tta"],
        "scales": ["--tta-scales", "1,1.5"],
        "slices": ["--slices", "80", "--overlap", "0.1"],
        "ema": ["--use", "ema"],
    }.items():
        assert predict(drawn_run, *words, *options) == 0
        assert written(out) == {"0.json"}
        content = json.loads((out / "0.json").read_text())
        found[name] = [(each["class"], each["score"]) for each in content["detections"]]
        assert all(("mask" in each) == (name != "boxes") for each in content["detections"])
    assert found.pop("boxes") == found["plain"]
    assert found["again"] == found["classes"]
    assert len({tuple(each) for each in found.values()}) == 6  # all others differ
    assert found["classes"] == [each for each in found["plain"] if each[0] in ("star", "ring")]
    said = capsys.readouterr().out
    assert "pictures in" not in said
    left_out = len(found["plain"]) - len(found["classes"])
    assert said.count(f"left out: {left_out} detections of other classes (--classes)\n") == 2
    assert said.count("left out") == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--classes", "stra"], "class 'stra': none of the 6 classes"),
        (["--tta-scales", "1,big"], "--tta-scales: expected numbers such as 1,1.25, got 1,big"),
        (["--overlap", "0.2"], "--overlap: expected --slices beside it, got none"),
        (["--slices", "0"], "slices: expected a size of at least 1 pixel"),
        (["--threshold", "2"], "threshold: expected a score of 0 to 1, got 2"),
        (["--device", "gpu"], "device gpu: torch cannot use it ("),
        (["--class-names", "no.json"], "no.json: No such file"),
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
    assert written(out) == {"clip.mp4", "clip.jsonl"}
    lines = [json.loads(line) for line in (out / "clip.jsonl").read_text().splitlines()]
    assert [line["image"].rpartition(" ")[2] for line in lines] == ["0", "1", "2", "3"]
    video = cv2.VideoCapture(str(out / "clip.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 5
    assert [video.read()[0] for _ in range(5)] == [True] * 4 + [False]
    video.release()
    said = capsys.readouterr()
    assert f"{tmp_path}/clip.avi  128 x 128  " in said.out
    assert "(4 frames, " in said.out
    counts = said.out.split("128 x 128  ")[1].split("  (")[0].split(", ")
    total = sum(len(line["detections"]) for line in lines)
    assert sum(int(count.split()[0]) for count in counts) == total
    assert "bad.mp4: expected frames that OpenCV reads" in said.err
    words += ["--classes", lines[0]["detections"][0]["class"], "--boxes-only", "--threshold", "0"]
    assert predict(drawn_run, *words) == 1
    kept = [json.loads(x)["detections"] for x in (out / "clip.jsonl").read_text().splitlines()]
    assert not any("mask" in each for frame in kept for each in frame)
    left_out = total - sum(map(len, kept))
    said = capsys.readouterr().out
    assert said.count(f"left out: {left_out} detections of other classes (--classes)\n") == 1


def test_strip_writes_a_file_that_predicts(drawn_run, photos, tmp_path, capsys):
    slim = tmp_path / "slim.safetensors"
    assert cli.main(["strip", str(drawn_run.weights), str(slim)]) == 0
    assert f"wrote {slim}: " in capsys.readouterr().out
    assert set(checkpoint.read(slim)) == {"model", "vitdet"}
    words = ["--out", str(tmp_path / "out"), "--weights", str(slim), "--device", "cpu"]
    assert cli.main(["predict", str(photos / "0.jpg"), *words]) == 0
    assert (tmp_path / "out" / "0.jpg").is_file()
    assert cli.main(["strip", str(slim), str(slim)]) == 2
    assert "this is the input. Choose another name" in capsys.readouterr().err
