"""The command line: help, exit statuses, one line for an error."""

from pathlib import Path

import pytest
import torch

from vitdet.app import cli
from vitdet.app.words import TEXTS


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_the_commands_and_the_exit_statuses(command, capsys):
    what, *no = cli.COMMANDS[command]
    for words in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert what[1:] in text
        assert "Exit status: 0 done" in text
    assert "".join(no) in text


def test_changes_to_a_recipe_may_stand_anywhere():
    args = cli.parse(["train", "a=1", "--data", "D", "b=2", "--num-gpus", "2", "c=3"])
    assert (str(args.data), args.num_gpus, args.overrides) == ("D", 2, ["a=1", "b=2", "c=3"])
    assert cli.parse(["train", "--data", "D"]).overrides == []


def test_an_unknown_format_is_status_1_and_wrong_files_are_status_2(tmp_path, capsys):
    good, empty = tmp_path / "weights.pth", tmp_path / "empty.pth"
    torch.save({"layer.weight": torch.zeros(2, 3)}, good)
    torch.save({"epoch": 3}, empty)
    assert cli.main(["inspect", str(good)]) == 1
    found = capsys.readouterr()
    assert found.err == ""
    assert "format       unknown" in found.out
    (tmp_path / "short.pth").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "code.pkl").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    wrong = {"absent.pth": "absent.pth", "short.pth": "it cannot be read", "": "expected"}
    wrong |= {"empty.pth": "expected tensors, got", "code.pkl": "posix.system"}
    for name, text in wrong.items():
        assert cli.main(["inspect", str(tmp_path / name), "--json"]) == 2
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err.startswith("error: ")
        assert found.err.count("\n") == 1
        assert text in found.err


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("predict a.jpg --weights w.pth --conf 0.3", "threshold", 0.3),
        ("serve --model=w.pth", "weights", Path("w.pth")),
        ("predict a.jpg --weights w.pth --batch 4", "batch_size", 4),
        ("train --data D --batch-size 4", "batch", 4),
        (
            "train --data D --lr 1e-4 --device cuda:0",
            "overrides",
            ["optimizer.lr=1e-4", "train.device=cuda:0"],
        ),
    ],
)
def test_words_of_other_projects_are_read(words, name, value):
    assert getattr(cli.parse(words.split()), name) == value


@pytest.mark.parametrize("word", [*TEXTS, "--thresh"])
def test_other_words_are_told_what_does_it_and_nothing_is_abbreviated(word, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse(["predict", "a.jpg", "--weights", "w.pth", word, "1"])
    text = TEXTS.get(word, "did you mean --threshold?")
    assert f"unrecognized arguments: {word} ({text})" in capsys.readouterr().err
