"""The command line: help, exit statuses, one line for an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitdet.app import cli


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of no known format."""
    path = tmp_path / "weights.pth"
    torch.save({"layer.weight": torch.zeros(2, 3)}, path)
    return path


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_the_commands_and_the_exit_statuses(command: str, capsys) -> None:
    what, no = cli.COMMANDS[command]
    for words in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert what[1:] in text
        assert "Exit status: 0 done" in text
    assert no in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["inspects"], "invalid choice: 'inspects'"),
        (["inspect"], "the following arguments are required: file\n"),
        (["inspect", "x.pth", "--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_a_wrong_command_line_is_status_2(words: list[str], text: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_changes_to_a_recipe_may_stand_anywhere() -> None:
    args = cli.parse(["train", "a=1", "--data", "D", "b=2", "--num-gpus", "2", "c=3"])
    assert (str(args.data), args.num_gpus, args.overrides) == ("D", 2, ["a=1", "b=2", "c=3"])
    assert cli.parse(["train", "--data", "D"]).overrides == []


def test_an_unknown_format_is_status_1(weights: Path, capsys) -> None:
    assert cli.main(["inspect", str(weights)]) == 1
    found = capsys.readouterr()
    assert found.err == ""
    assert "format       unknown" in found.out


def _truncated(weights: Path) -> Path:
    weights.write_bytes(weights.read_bytes()[:-200])
    return weights


def _no_tensors(weights: Path) -> Path:
    torch.save({"epoch": 3}, weights)
    return weights


def _code(weights: Path) -> Path:
    path = weights.with_suffix(".pkl")
    path.write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    return path


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.with_name("absent.pth"), "absent.pth"),
        (_truncated, "it cannot be read"),
        (_no_tensors, "expected tensors, got"),
        (_code, "posix.system"),
        (lambda path: path.parent, "expected"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_wrong_files_are_status_2_and_one_line(
    make, text: str, options: list[str], weights: Path, capsys
) -> None:
    assert cli.main(["inspect", str(make(weights)), *options]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert text in found.err
