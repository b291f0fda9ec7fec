"""What a file says reaches neither terminal nor log raw: no escape code, no line of its own."""

import json

from vitdet import checkpoint
from vitdet.app import cli
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import InputError, one_line, printable

# clears the screen, sets its title, goes back over the line, draws from right to left, is no text
ODD = ["\x1b[2Jclear", "\x1b]0;title\x07", "back\r\b\b", "\u202eright", "\udc80half", "a\nerror: b"]


def _is_safe(text):
    return all(character.isprintable() or character == "\n" for character in text)


def test_one_line_and_printable():
    for text in ODD:
        assert one_line(text).isprintable()
        assert _is_safe(printable(text))
        assert str(InputError(text)).isprintable()
    assert one_line("a\nerror: b") == "a error: b"
    assert printable("\x1b[2J a\n  b") == "\\x1b[2J a\n  b"
    assert printable("ü 字") == "ü 字"


def test_names_of_classes_and_files(drawn_run, tmp_path, capsys):
    content = checkpoint.read(drawn_run.weights)
    weights = tmp_path / "a\x1b[31m\nerror: b.pth"
    note = {**content["vitdet"], "class_names": ODD, "class_ids": [1, 2, 3, 4, 5, 6]}
    checkpoint.write(weights, {"model": content["model"], "vitdet": note})
    image = tmp_path / "i\x1b[2J\nerror: b.jpg"
    image.write_bytes(drawn_run.images[0].read_bytes())
    words = ["--weights", str(weights), "--device", "cpu", "--threshold", "0"]
    assert cli.main(["predict", str(image), *words, "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["inspect", str(weights), "--no-recipes"]) in (0, 1)
    assert cli.main(["predict", str(tmp_path / "no\x1b[2J"), *words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "\\x1b[2J" in said.out
    assert _is_safe(said.out + said.err)
    assert not [line for line in said.out.splitlines() if line.startswith("error: b")]
    result = Predictor.from_checkpoint(weights, threshold=0.0, device="cpu")(drawn_run.images[0])
    assert repr(result).isprintable()
    # ... and a program gets them as they are
    assert {each["class"] for each in json.loads(result.to_json())["detections"]} <= set(ODD)
