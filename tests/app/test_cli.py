"""The command line: help, exit statuses, one line for an error."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

import train_net
from vitdet import export
from vitdet.app import cli, options, train
from vitdet.app.words import ALIASES, TEXTS
from vitdet.data.files import SPLITS
from vitdet.data.formats import FORMATS
from vitdet.data.labels import Boxes
from vitdet.data.presets import PRESETS
from vitdet.engine.tune import TUNE
from vitdet.export import graph
from vitdet.utils.precision import PRECISIONS

# What is imported after the help of everything, a check of data, and a look into a file.
IMPORTED = """
import contextlib, io, json, sys
import converter, train_net
from vitdet.app import cli

def said(main, *words):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main(list(words))
    found.append([text.getvalue(), sorted({name.split(".")[0] for name in sys.modules})])

data, weights = sys.argv[1:]
found = []
for main in (cli.main, converter.main, train_net.run):
    said(main, "--help")
for name in cli.COMMANDS:
    said(cli.main, name, "--help")
said(cli.main, "data", "check", data)
said(cli.main, "inspect", weights)
print(json.dumps([found, "torch._dynamo" in sys.modules]))
"""


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


def test_what_is_slow_to_import_is_imported_where_it_is_used(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = {"images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}]}
    content |= {"categories": [{"id": 1, "name": "x"}]}
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}]
    (tmp_path / "train.json").write_text(json.dumps(content))
    torch.save({"layer.weight": torch.zeros(2, 3)}, tmp_path / "w.pth")
    words = ["-c", IMPORTED, str(tmp_path), str(tmp_path / "w.pth")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, check=True)
    (*helps, check, looked), compiler = json.loads(done.stdout)
    assert all(text.startswith("usage: ") for text, _ in helps)
    assert not {"torch", "numpy", "PIL", "yaml"} & {*helps[-1][1]}
    assert "no faults" in check[0]
    assert not {"torch", "cv2", "matplotlib"} & {*check[1]}
    assert "format       unknown" in looked[0]
    slow = {"detectron2", "fvcore", "matplotlib", "pkg_resources", "torchvision"}
    assert not {*slow, "cv2", "sympy"} & {*looked[1]}
    assert not compiler


def test_words_of_options_are_those_of_their_tables():
    assert get_args(Boxes) == options.BOXES
    assert tuple(FORMATS) == options.DATA_FORMATS
    assert tuple(PRESETS) == options.PRESETS
    assert tuple(train.SIZES) == options.SIZES
    assert (SPLITS, TUNE, PRECISIONS) == (options.SPLITS, options.TUNE, options.PRECISIONS)
    assert (graph.MASKS, graph.PARTS, export.OPSETS) == (
        options.MASKS,
        options.PARTS,
        options.OPSETS,
    )


def test_absent_paths_are_told_before_anything_is_imported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", pytest.fail)
    absent = str(tmp_path / "absent.pth")
    weights, data = "expected a file, got nothing there", "got nothing at this path"
    for words, text in {
        f"predict a.jpg --weights {absent}": weights,
        f"inspect {absent}": weights,
        f"strip {absent} slim.pth": weights,
        f"train --data {tmp_path} --weights {absent}": weights,
        f"train --data {absent}": data,
        f"data check {absent}": data,
    }.items():
        assert cli.main(words.split()) == 2
        assert text in capsys.readouterr().err


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
    assert options.parse_convert(words).output_model == Path("b.pth")


def test_a_tilde_is_the_users_folder_wherever_a_path_begins(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/x")
    words = ["~/D", "--out=~/run", "--images", "~", "train.init_checkpoint=~/w.pth", "train.a=~b"]
    args = cli.parse(["train", "--data", *words])
    assert [str(each) for each in (args.data, args.out, args.images)] == [
        *("/home/of/x/D", "/home/of/x/run", "/home/of/x")
    ]
    assert args.overrides == ["train.init_checkpoint=/home/of/x/w.pth", "train.a=~b"]
