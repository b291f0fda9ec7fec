"""The tables of docs/conversion.md are up to date, and every command in them does what they say."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import converter
import vitdet.config
from vitdet import checkpoint
from vitdet.app.inspect import CONFIGS, Candidate, known
from vitdet.convert import FORMATS, TARGETS
from vitdet.convert.inspect import describe
from vitdet.convert.recipes import COMMANDS, WITHOUT_REL_POS, Command
from vitdet.utils.checks import InputError

from .manifests import CHECKPOINTS, find, published

ROOT = Path(__file__).resolve().parents[2]
needs_manifests = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)
_spec = importlib.util.spec_from_file_location(
    "conversion_tables", ROOT / "docs/conversion_tables.py"
)
assert _spec is not None
assert _spec.loader is not None
TABLES = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(TABLES)
ACCOUNTS = json.loads((Path(__file__).parent / "accounts.json").read_text())
FILES = [(command, name) for command in COMMANDS for name in command.files]
_BACKBONE = re.compile(r"(backbone\.)?(net|bottom_up)\.")
# what a backbone may keep from its initialisation, for files of any format
_OPEN = {"vitae_pretrain": r"norm\.|rel_pos", "vitae_classifier": r"norm\.|rel_pos"}
_OPEN |= {"vil": r"num_redraws$", "vil_det": r"num_redraws$"}
_load, _build = vitdet.config.load_config, vitdet.config.build_model


@cache
def _loaded(path: Path, overrides: tuple[str, ...]) -> Any:
    return _load(path, overrides)


_MODELS: dict[int, Any] = {}


def _built(node: Any, device: str) -> Any:
    if id(node) not in _MODELS:  # the node stays alive in the cache of recipes
        _MODELS[id(node)] = _build(node, device)
    return _MODELS[id(node)]


class Run:
    """converter.py on a published file without data."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.written: dict[str, Any] = {}
        self.output = folder / "out.pth"
        patch = monkeypatch.setattr
        patch(vitdet.config, "load_config", lambda p, changes, **_: _loaded(p, tuple(changes)))
        patch(vitdet.config, "build_model", _built)
        patch(checkpoint, "read", lambda path, **_: find(path.name).content())
        patch(checkpoint, "write", lambda _, content: self.written.update(content))
        monkeypatch.chdir(TABLES.ROOT)

    def __call__(self, name: str, *words: str) -> int:
        self.written.clear()
        return converter.main(["--source-model", name, "--output-model", str(self.output), *words])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return a function that runs a command; what it would write is in `written`."""
    return Run(monkeypatch, tmp_path)


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    page = TABLES.PAGE.read_text()
    assert TABLES.with_tables(page) == page


def test_a_page_without_the_part_is_refused() -> None:
    with pytest.raises(InputError, match=r"page: expected <!-- begin: .* <!-- end -->, got no"):
        TABLES.with_tables("# Converting\n")


def test_every_format_has_a_command() -> None:
    # a file of ours goes into its own recipe; no published names of EVA-01's pretraining are here
    without = set(FORMATS) - {command.format for command in COMMANDS}
    assert without == {"vitdet", "eva01_pretrain"}


@needs_manifests
def test_every_published_file_has_one_command() -> None:
    names = sorted(name for _, name in FILES)
    assert names == sorted(item.name for item in published())


def _account(path: Path) -> dict[str, Any]:
    """Sum a report up: counts, rules, and a hash of all of it."""
    report = json.loads(path.read_text())
    for key in ("source_model", "output_model", "config_file", "overrides"):
        del report[key]
    found = {"format": report["source_format"], "used": len(report["used"])}
    found |= {key: len(report[key]) for key in ("made", "resized", "initialised") if report[key]}
    for key in ("dropped", "inexact"):
        if report[key]:
            found[key] = dict(Counter(report[key].values()))
    ordered = {k: sorted(v.items()) if isinstance(v, dict) else v for k, v in report.items()}
    text = json.dumps(ordered, sort_keys=True).encode()
    return found | {"sha256": hashlib.sha256(text).hexdigest()[:16]}


@needs_manifests
@pytest.mark.parametrize(("command", "name"), FILES, ids=[name for _, name in FILES])
def test_commands(command: Command, name: str, run: Run, capsys: Any, tmp_path: Path) -> None:
    """The one account of every published file is kept in accounts.json."""
    report = tmp_path / "report.json"
    assert run(name, *command.words(), "--report", str(report)) == 0
    assert f"format       {command.format}" in capsys.readouterr().out
    assert _account(report) == ACCOUNTS[name]
    cfg = _loaded(Path(f"configs/{command.recipe}.py"), command.overrides)
    model = _built(cfg.model, "meta")
    target = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights, about = run.written["model"], run.written["vitdet"]
    assert about["source_format"] == command.format
    assert set(weights) | set(about["initialised"]) == set(target)
    assert {key: tuple(value.shape) for key, value in weights.items()} == {
        key: target[key] for key in weights
    }
    rel_pos = r"rel_pos_[hw]$" if command.format in WITHOUT_REL_POS else "-"
    open_ = re.compile(_OPEN.get(command.format, rel_pos))
    left = [key for key in about["initialised"] if _BACKBONE.match(key)]
    assert all(open_.search(key) for key in left), left
    # and `vitdet inspect` tries that recipe
    found = describe(find(name).content())
    overrides = () if command.format == "detectron2" else command.overrides
    assert Candidate(CONFIGS / f"{command.recipe}.py", overrides) in known(found)


@needs_manifests
@pytest.mark.parametrize(
    "command",
    # of the averaged weights the names are published without those beside them
    [c for c in COMMANDS if c.options and "--weights" not in c.options],
    ids=lambda command: command.files[0],
)
def test_no_option_is_there_for_nothing(command: Command, run: Run, capsys: Any) -> None:
    bare = [word for word in command.words() if word not in command.options]
    assert run(command.files[0], *bare) in (1, 2)
    assert command.options[0] in capsys.readouterr().err


@cache
def _groups() -> list[Command]:
    seen: dict[Any, Command] = {}
    for command in COMMANDS:
        seen.setdefault((command.format, TABLES.cells(command)), command)
    return list(seen.values())


@pytest.mark.slow
@needs_manifests
@pytest.mark.parametrize("target", TARGETS)
def test_what_targets_hold(target: str, run: Run, capsys: Any) -> None:
    assert len(_groups()) > 20
    for command in _groups():
        cell = TABLES.cells(command)[list(TARGETS).index(target)]
        words = ["--target-format", target, "--backbone-only", *command.words()]
        status = run(command.files[0], *words)
        error = capsys.readouterr().err
        exact = cell == "yes" or ("--allow-inexact" in words and cell != "no")
        assert (status == 0) == exact, (command, cell, error)
        if cell == "no":
            assert "backbone: expected" in error or "no place" in error or "a place for" in error
        elif not exact:
            assert run(command.files[0], *words, "--allow-inexact") == 0, (command, cell)
        if status == 0:
            content = run.written.get("model", run.written)
            assert all(isinstance(value, torch.Tensor) for value in content.values())
        capsys.readouterr()


@needs_manifests
def test_objects365_starts_coco(run: Run, tmp_path: Path, capsys: Any) -> None:
    lists = {"old": [f"Class {i}" for i in range(365)], "new": [f"class_{i}" for i in range(80)]}
    for name, names in lists.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(names))
    (tmp_path / "table.json").write_text("{}")
    words = ["--config-file", "configs/COCO/cascade_mask_rcnn_eva02_l_sys_o365.py"]
    words += ["--source-classes", f"{tmp_path}/old.json", "--class-table", f"{tmp_path}/table.json"]
    words += ["--target-classes", f"{tmp_path}/new.json"]
    assert run("eva02_L_m38m_to_o365", *words) == 0
    weights, about = run.written["model"], run.written["vitdet"]
    assert weights["roi_heads.box_predictor.2.cls_score.weight"].shape == (81, 1024)
    assert about["initialised"]
    assert all(name.startswith("roi_heads.mask_head.") for name in about["initialised"])
    assert "classes      80 carried over" in capsys.readouterr().out


@needs_manifests
@pytest.mark.parametrize(
    "name",
    [fmt.name for fmt in FORMATS.values() if not fmt.makes and fmt.name != "vitdet"],
)
def test_formats_that_need_no_recipe(name: str, run: Run, capsys: Any) -> None:
    command = next(each for each in COMMANDS if each.format == name)
    assert run(command.files[0], "--target-format", "detectron2", "--allow-inexact") == 0
    assert run.written["model"]
    capsys.readouterr()
