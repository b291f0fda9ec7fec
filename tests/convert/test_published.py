"""Every published file by the command of docs/conversion.md, with its exact account."""

import hashlib
import json
import re
import runpy
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import converter
import vitdet.config
from vitdet import checkpoint
from vitdet.convert import FORMATS, convert, detect, transformers
from vitdet.convert.names import shapes_of
from vitdet.convert.recipes import COMMANDS, WITHOUT_REL_POS
from vitdet.utils.checks import InputError

from .manifests import find, needs_manifests, published

pytestmark = needs_manifests
ROOT = Path(__file__).resolve().parents[2]
ACCOUNTS = json.loads((Path(__file__).parent / "accounts.json").read_text())
FILES = [(command, name) for command in COMMANDS for name in command.files]
_BACKBONE = re.compile(r"(backbone\.)?(net|bottom_up)\.")
# what a backbone may keep from its initialisation, for files of any format
_OPEN = {"vitae_pretrain": r"norm\.|rel_pos", "vitae_classifier": r"norm\.|rel_pos"}
_OPEN |= {"vil": r"num_redraws$", "vil_det": r"num_redraws$"}
_OPEN = dict.fromkeys(WITHOUT_REL_POS, r"rel_pos_[hw]$") | _OPEN
_load, _build = vitdet.config.load_config, vitdet.config.build_model


@cache
def _loaded(path, overrides):
    return _load(path, overrides)


_MODELS = {}


def _built(node, device):
    if id(node) not in _MODELS:  # the node stays alive in the cache of recipes
        _MODELS[id(node)] = _build(node, device)
    return _MODELS[id(node)]


def _recipe(name, overrides=()):
    """Return the shapes of a recipe's model and the settings that no shape tells."""
    cfg = _loaded(Path(f"configs/{name}.py"), overrides)
    model = _built(cfg.model, "meta")
    return shapes_of(model.state_dict()), vitdet.config.model_settings(cfg.model, model)


class Run:
    """converter.py on a published file without data."""

    def __init__(self, monkeypatch, folder):
        self.written = {}
        self.output = folder / "out.pth"
        patch = monkeypatch.setattr
        patch(vitdet.config, "load_config", lambda p, changes, **_: _loaded(p, tuple(changes)))
        patch(vitdet.config, "build_model", _built)
        patch(checkpoint, "read", lambda path, **_: find(path.name).content())
        patch(checkpoint, "write", lambda _, content: self.written.update(content))

    def __call__(self, name, *words):
        self.written.clear()
        return converter.main(["--source-model", name, "--output-model", str(self.output), *words])


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs a command; what it would write is in `written`."""
    return Run(monkeypatch, tmp_path)


def _account(report):
    """Sum a report up: counts, rules, and a hash of all of it."""
    of_run = ("source_model", "output_model", "config_file", "overrides")
    report = {key: value for key, value in report.items() if key not in of_run}
    found = {"format": report["source_format"], "used": len(report["used"])}
    found |= {key: len(report[key]) for key in ("made", "resized", "initialised") if report[key]}
    for key in ("dropped", "inexact"):
        if report[key]:
            found[key] = dict(Counter(report[key].values()))
    ordered = {k: sorted(v.items()) if isinstance(v, dict) else v for k, v in report.items()}
    text = json.dumps(ordered, sort_keys=True).encode()
    return found | {"sha256": hashlib.sha256(text).hexdigest()[:16]}


def test_every_published_file_and_format_has_one_command():
    assert sorted(name for _, name in FILES) == sorted(published())
    # a file of ours goes into its own recipe; no published names of EVA-01's pretraining and of
    # timm's Perception Encoder are here
    without = set(FORMATS) - {command.format for command in COMMANDS}
    # and of transformers' files, which are as many as its classes, the recipe follows
    theirs = {fmt.name for fmt in transformers.ROWS}
    assert without == {"vitdet", "eva01_pretrain", "timm_pe", "timm_pe_core"} | theirs


FIRST = {command.format: command.files[0] for command in reversed(COMMANDS)}.values()
RUNS = [
    pytest.param(command, name, id=name, marks=() if name in FIRST else pytest.mark.slow)
    for command, name in FILES
]


@pytest.mark.parametrize(("command", "name"), RUNS)
def test_commands(command, name, run, tmp_path):
    """The one account of every published file is kept in accounts.json."""
    report = tmp_path / "report.json"
    assert run(name, *command.words(), "--report", str(report)) == 0
    record = json.loads(report.read_text())
    assert _account(record) == ACCOUNTS[name]
    weights, about = run.written["model"], run.written["vitdet"]
    target, _ = _recipe(command.recipe, tuple(about["recipe_overrides"]))
    assert set(weights) | set(about["initialised"]) == set(target)
    assert shapes_of(weights) == {key: target[key] for key in weights}
    # every key is used once or left out by a rule
    parts = [record["used"], record["dropped"], record["inexact"]]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(find(name).tensors)
    # a weight of the backbone is never left to initialisation
    open_ = re.compile(_OPEN.get(command.format, "-"))
    left = [key for key in about["initialised"] if _BACKBONE.match(key)]
    assert all(open_.search(key) for key in left), left


@pytest.mark.parametrize(
    "name", [fmt.name for fmt in FORMATS.values() if not fmt.makes and fmt.name != "vitdet"]
)
def test_formats_that_need_no_recipe(name, run):
    command = next(each for each in COMMANDS if each.format == name)
    assert run(command.files[0], "--target-format", "detectron2", "--allow-inexact") == 0
    assert run.written["model"]


@pytest.mark.slow
def test_the_page_is_up_to_date():
    tables = runpy.run_path(str(ROOT / "docs/conversion_tables.py"))
    page = tables["PAGE"].read_text()
    assert tables["with_tables"](page) == page


def test_objects365_starts_coco(run, tmp_path, capsys):
    lists = {"old": [f"Class {i}" for i in range(365)], "new": [f"class_{i}" for i in range(80)]}
    for name, content in (lists | {"table": {}}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    words = ["--config-file", "configs/COCO/cascade_mask_rcnn_eva02_l_sys_o365.py"]
    for option, name in (("source", "old"), ("target", "new")):
        words += [f"--{option}-classes", f"{tmp_path}/{name}.json"]
    assert run("eva02_L_m38m_to_o365", *words, "--class-table", f"{tmp_path}/table.json") == 0
    weights, about = run.written["model"], run.written["vitdet"]
    assert weights["roi_heads.box_predictor.2.cls_score.weight"].shape == (81, 1024)
    assert about["initialised"]
    assert all(name.startswith("roi_heads.mask_head.") for name in about["initialised"])
    assert "classes      80 carried over" in capsys.readouterr().out


# --- a model that is another one -----------------------------------------------------------------

REFUSED = {
    "mae_pretrain_vit_base COCO/mask_rcnn_vitdet_l_100ep": "768 channels (embed_dim), model 1024.",
    "mask_rcnn_vitdet_b.lvis COCO/mask_rcnn_vitdet_b_100ep": "file has 1203 classes, model 80.",
    "cascade_mask_rcnn_vitdet_b.coco COCO/mask_rcnn_vitdet_b_100ep": (
        "54 keys have no place in the model (roi_heads.box_head.0."
    ),
    "mae_pretrain_vit_huge COCO/mask_rcnn_vitdet_h_75ep": (
        "expected patch size 16 (model), got patch size 14 (file)"
    ),
    "easycv_vitdet_mask_rcnn COCO/mask_rcnn_vitdet_b_100ep": (
        "pyramid.norm='GN1', not 'LN'; box_head.norm='GN1', not 'LN'"
    ),
    "mmdet3_vitdet_mask_rcnn_vit_b COCO/mask_rcnn_vitdet_b_100ep": "norm_eps=1e-05, not 1e-06",
    "mask_rcnn_vitdet_b.coco easycv/mask_rcnn_vitdet_b_100ep": "pyramid.norm=other than 'GN1', not",
    "easycv_vitdet_mask_rcnn_old_attn vitae/mask_rcnn_vit_b_100ep": "pyramid.norm='GN1+LN', not",
    "eva02_B_coco_bsl COCO/mask_rcnn_vitdet_b_100ep": "expected an EVA-02, got a plain ViT",
    "eva_coco_det COCO/cascade_mask_rcnn_eva02_b_bsl": "expected a plain ViT, got an EVA-02",
    "dinov3_vitb16 COCO/mask_rcnn_vitdet_b_100ep": "set its layer_scale (or --fold-layer-scale).",
    "openai.ViT-B-16 COCO/mask_rcnn_vitdet_b_100ep": "norm before the first block (set pre_norm)",
    "global_partial_small_mask_rcnn vil/mask_rcnn_global_partial_small_1x": (
        "fpn_lateral5.weight (and of 18 more): expected (256, 768, 1, 1) (model), got (256, 384"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_another_recipe_is_refused_in_one_line(case):
    name, recipe = case.split()
    target, settings = _recipe(recipe)
    with pytest.raises(InputError) as error:
        convert(find(name).content(), target, settings=settings, source="FILE")
    assert str(error.value).startswith("FILE")
    assert REFUSED[case] in str(error.value)


def test_buffer_of_the_federated_loss():
    name = "roi_heads.box_predictor.fed_loss_cls_weights"
    lvis = find("mask_rcnn_vitdet_b.lvis")
    plain = {key: shape for key, shape in lvis.shapes().items() if key != name}
    _, report = convert(lvis.content(), plain)
    assert report.dropped == {name: "buffer of the federated loss: the model has no such loss"}
    without = {key: value for key, value in lvis.tensors.items() if key != name}
    _, report = convert({"model": without}, lvis.shapes())
    assert report.initialised == [name]


@pytest.mark.parametrize("fmt", ["timm", "dinov2", "dinov3", "clip", "mae", "beit"])
def test_where_in_the_file_the_weights_lie_makes_no_difference(fmt):
    # MAE's encoders alone have timm's names: that they lie under "model" is what tells them
    for name in (name for command, name in FILES if command.format == fmt):
        tensors = find(name).tensors
        formats = {detect({nest: tensors, "epoch": 0}) for nest in ("model", "net", "teacher")}
        formats |= {detect(tensors), detect({f"module.{n}": value for n, value in tensors.items()})}
        assert formats <= ({"timm", "mae"} if fmt in ("timm", "mae") else {fmt}), name
