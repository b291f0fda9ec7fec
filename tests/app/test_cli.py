"""The command line: help, exit statuses, one line for an error."""

from __future__ import annotations

import json
import subprocess
import sys
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


@pytest.mark.parametrize("words", [["--help"], ["inspect", "--help"]])
def test_help_names_the_commands_and_the_exit_statuses(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "say what a weights file holds, and which recipes it fits" in text.lower()
    assert "Exit status: 0 done" in text
    if len(words) == 2:
        assert "1 the file can be read, and its format is none that is known" in text
        for option in ("--json", "--weights", "--trust", "--no-recipes"):
            assert option in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["inspects"], "invalid choice: 'inspects'"),
        (["inspect"], "the following arguments are required: file\n"),
        (["inspect", "x.pth", "--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_a_wrong_command_line_is_status_2(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_changes_to_a_recipe_may_stand_anywhere() -> None:
    args = cli.parse(["train", "a=1", "--data", "D", "b=2", "--num-gpus", "2", "c=3"])
    assert (str(args.data), args.num_gpus, args.overrides) == ("D", 2, ["a=1", "b=2", "c=3"])
    assert cli.parse(["train", "--data", "D"]).overrides == []


def test_an_unknown_format_is_status_1(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(weights)]) == 1
    found = capsys.readouterr()
    assert found.err == ""
    assert "format       unknown" in found.out
    assert "tensors      1 (float32 1), 0.00 M numbers, 24 bytes" in found.out
    assert "recipe       none of docs/conversion.md takes it as it is" in found.out


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
        (lambda path: path.with_name("absent.pth"), "expected a file, got nothing there"),
        (_truncated, "it cannot be read"),
        (_no_tensors, "expected tensors, got"),
        (_code, "got the class posix.system"),
        (lambda path: path.parent, "expected"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_wrong_files_are_status_2_and_one_line(
    make, text: str, options: list[str], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(weights)
    assert cli.main(["inspect", str(path), *options]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert text in found.err


def test_wrong_options_are_status_2(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(weights), "--weights", "ema"]) == 2
    assert "--weights: expected a key of the file that holds weights" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_program(weights: Path) -> None:
    command = [sys.executable, "-m", "vitdet.app.cli", "inspect", str(weights), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["tensors"] == 1
