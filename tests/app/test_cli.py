"""The command line: help, exit statuses, one line for an error."""

import re
from pathlib import Path

import pytest
import torch

import train_net
from vitdet.app import cli, convert
from vitdet.app.words import ALIASES, TEXTS


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


REQUIRED = {
    "predict": "a.jpg --weights v.pth",
    "serve": "--weights v.pth",
    "val": "--weights v.pth",
    "train": "--data D",
    "convert": "--source-model v.pth --output-model o.pth",
    "recipe": "--config-file c.py",
    "report": "run",
}
FLAGS = Path(__file__).resolve().parents[2] / "docs/flags.md"
ROWS = re.findall(r"^\| `(.+?)` \| (.+?) \|$", FLAGS.read_text(), re.MULTILINE)


def read(words):
    command, *rest = words.split()
    return cli.parse([command, *REQUIRED[command].split(), *rest])


@pytest.mark.parametrize(("typed", "what"), ROWS)
def test_words_of_other_projects_are_read_or_told_as_the_page_has_it(typed, what, capsys):
    """The page's second column is another command, or the line that is said."""
    if what.startswith("`"):
        assert read(typed) == read(what.split("`")[1])
        return
    with pytest.raises(SystemExit, match="2"):
        read(typed)
    (said,) = re.findall(r"error: unrecognized arguments: (.*)", capsys.readouterr().err)
    assert said.startswith(f"{typed.split()[1]} (")
    assert what in said


def test_the_page_has_every_word():
    """Doors of their own, train_net.py and converter.py, read them too."""
    typed = {name.split("=")[0].replace("_", "-") for row, _ in ROWS for name in row.split()}
    typed |= {f"--{name}" for name in typed}
    assert {name for names in (*ALIASES, *TEXTS) for name in names.split()} <= typed
    assert train_net.parse(["-c", "r.py", "--lr", "1"]).overrides == ["optimizer.lr=1"]
    words = ["--model=a.pth", "-o", "b.pth", "--config_file", "r.py"]
    assert convert.parse(words).output_model == Path("b.pth")


def test_a_tilde_is_the_users_folder_wherever_a_path_begins(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/x")
    words = ["~/D", "--out=~/run", "--images", "~", "train.init_checkpoint=~/w.pth", "train.a=~b"]
    args = cli.parse(["train", "--data", *words])
    assert [str(each) for each in (args.data, args.out, args.images)] == [
        *("/home/of/x/D", "/home/of/x/run", "/home/of/x")
    ]
    assert args.overrides == ["train.init_checkpoint=/home/of/x/w.pth", "train.a=~b"]
