"""The recipe follows a foundation model's file: converter.py, and train_net.py --weights."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from test_train_net import said
from tiny_recipe import write_recipe

import converter
import train_net
from vitdet import checkpoint
from vitdet.app import follow
from vitdet.app.start import from_weights
from vitdet.backbones.vit import ViT
from vitdet.config import backbone_settings, build_model, load_config
from vitdet.utils.checks import InputError
from vitdet.weights import Weights

NET = "model.backbone.net."
# of the file below, where the recipe (32 channels, 2 blocks, positions of 64 pixels) has others
FOLLOWED = [
    *("global_block_indexes=[3]", "embed_dim=128", "depth=4", "mlp_ratio=2.0"),
    *("layer_scale=True", "pretrain_img_size=80"),
]


@pytest.fixture
def dinov2(tmp_path):
    """A DINOv2 of 4 blocks and patches of 14 pixels, in its own repository's names."""
    torch.manual_seed(0)
    net = ViT(
        **{"embed_dim": 128, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 14},
        **{"pretrain_img_size": 70, "layer_scale": True, "use_cls_token": True, "final_norm": True},
    )
    state = net.state_dict() | {"mask_token": torch.zeros(1, 128)}
    checkpoint.write(path := tmp_path / "dinov2.pth", state)
    return path


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", tmp_path / "out", eval_every=4)


def convert(source, recipe, *words):
    out = recipe.with_name("converted.pth")
    given = ("--source-model", source, "--output-model", out, "--config-file", recipe)
    return converter.main([*map(str, given), *words]), out


def test_converter_follows_remembers_and_says_what_trains(dinov2, recipe, capsys):
    report = recipe.with_name("report.json")
    status, out = convert(dinov2, recipe, "train.seed=1", "--report", str(report))
    shown = capsys.readouterr()
    assert (status, shown.err) == (0, "")
    lines = [NET + each for each in FOLLOWED]
    written = checkpoint.read(out)
    assert written["vitdet"]["recipe_overrides"] == lines
    assert json.loads(report.read_text())["overrides"] == str([*lines, "train.seed=1"])
    gamma = "blocks.3.ls2.gamma"
    assert torch.equal(written["model"][f"backbone.net.{gamma}"], checkpoint.read(dinov2)[gamma])
    assert "note         patch_embed resampled from 14 to 16 pixels\n" in shown.out
    assert shown.out.count("follows      ") == len(lines)
    train = f"train        vitdet recipe --config-file {recipe} train.init_checkpoint={out} "
    assert shown.out.splitlines()[-1].startswith(train)
    (printed,) = [line for line in shown.out.splitlines() if line.startswith("train")]
    args = train_net.parse(shlex.split(printed)[3:])
    model = build_model(load_config(args.config_file, args.overrides).model)
    state, initialised = checkpoint.weights_of(written, source="out")
    checkpoint.load_weights(model, state, source="out", initialised=initialised)
    assert state["backbone.net.patch_embed.proj.weight"].shape == (128, 3, 16, 16)


@pytest.mark.parametrize(
    ("typed", "follows"),
    [
        ((), FOLLOWED),
        (("layer_scale=false",), [each for each in FOLLOWED if "layer_scale" not in each]),
        (("patch_size=14",), [*FOLLOWED[:-1], "pretrain_img_size=70"]),
        (("depth=3",), [each for each in FOLLOWED if "global" not in each and "depth" not in each]),
        (("global_block_indexes=[0,3]",), FOLLOWED[1:]),
        (("parallel_branch=true", "use_rel_pos=false"), None),  # a ViTAE
    ],
)
def test_what_a_person_types_wins(dinov2, recipe, typed, follows):
    words = [NET + each for each in typed]
    found = follow.changes(load_config(recipe, words), Weights(checkpoint.read(dinov2)), words)
    assert found == (None if follows is None else [NET + each for each in follows])


@pytest.mark.parametrize(
    ("img_size", "window", "fits"),
    [(1024, 14, 16), (512, 16, 16), (1024, 24, 32), (640, 16, 20), (592, 16, 16), (224, 14, 7)],
)
def test_windows_divide_the_map_where_a_divisor_is_near(img_size, window, fits):
    assert follow._dividing(window, {"img_size": img_size, "patch_size": 16}) == fits


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((f"{NET}layer_scale=false",), "8 keys have no place in the model"),
        ((f"{NET}embed_dim=64",), "file has 128 channels (embed_dim), model 64"),
        ((f"{NET}depth=3",), "file has 4 blocks, model 3"),
        ((f"{NET}norm_eps=1e-5",), "norm_eps=1e-06, not 1e-05"),
        (("--source-format", "dino"), "--source-format: expected one of"),
    ],
)
def test_a_contradiction_is_one_line(dinov2, recipe, capsys, words, error):
    status, out = convert(dinov2, recipe, *words)
    shown = capsys.readouterr().err
    assert status in (1, 2)
    assert shown.count("\n") == 1
    assert error in shown
    assert not out.exists()


def test_layer_scale_that_is_folded_is_not_followed(dinov2, recipe):
    status, out = convert(dinov2, recipe, "--fold-layer-scale")
    assert status == 0
    assert not any(".ls1." in name for name in checkpoint.read(out)["model"])


def test_train_net_begins_with_any_file_and_goes_on(dinov2, recipe, tmp_path, capsys):
    words = ("--config-file", recipe, "--weights", dinov2)
    out = tmp_path / "out"
    status, text, error = said(capsys, *words, "--print-groups")
    assert (status, error, out.exists()) == (0, "", False)
    assert "backbone.net.blocks.3.ls2.gamma" in text
    status, text, error = said(capsys, *words, "train.num_images=4")
    assert (status, error) == (0, "")
    lines = [*(NET + each for each in FOLLOWED), f"train.init_checkpoint={out}/start.pth"]
    record = (out / "start.json").read_bytes()
    assert json.loads(record) == {"overrides": lines, "weights": str(dinov2)}
    assert f"loaded {out}/start.pth (0 images seen)" in text
    net = backbone_settings(load_config(out / "config.yaml", trust=True).model)
    assert (net["depth"], net["layer_scale"], net["pretrain_img_size"]) == (4, True, 80)
    # a folder with a run is left as it is
    status, _, error = said(capsys, *words, f"{NET}norm_eps=1e-5")
    assert (status, error.count("\n")) == (2, 1)
    assert "expected a folder without a run" in error
    assert (out / "start.json").read_bytes() == record
    status, text, error = said(capsys, *words[:2], "--resume", "train.num_images=8")
    assert (status, error) == (0, "")
    assert checkpoint.read(out / "model_final.pth")["images_seen"] == 8
    status, _, error = said(capsys, *words, f"{NET}depth=3", f"train.output_dir={tmp_path}/other")
    assert (status, error.count("\n")) == (2, 1)
    assert f"--weights {dinov2}: it does not fit recipe.py: file has 4 blocks" in error


def test_a_file_that_converter_wrote_is_loaded_as_it_is(dinov2, recipe, monkeypatch):
    _, out = convert(dinov2, recipe)

    def begun(path, *words):
        given = ("--config-file", recipe, "--weights", path, "--dry-run", *words)
        with from_weights(train_net.parse([str(each) for each in given])) as overrides:
            return overrides

    lines = [NET + each for each in FOLLOWED]
    ours = [*lines, f"train.init_checkpoint={out}", "train.seed=1"]
    assert begun(out, "train.seed=1") == ours
    with pytest.raises(InputError, match=r"expected one machine without torchrun .* Convert it"):
        begun(dinov2, "--num-machines", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert begun(out, "train.seed=1") == ours
    with pytest.raises(InputError, match=r"expected one machine without torchrun .* Convert it"):
        begun(dinov2)


@pytest.mark.parametrize(
    "word",
    [
        "model._target_=os.system",
        "model.backbone.net.act_layer={_target_: os.system, command: x}",
        "model.backbone.net.x=${oc.env:HOME}",
        "train.output_dir=elsewhere",
    ],
)
def test_a_file_asks_for_numbers_and_words_alone(word):
    assert follow.of_model([word]) == []
    with pytest.raises(InputError, match=r"FILE: recipe_overrides: expected model\.key=value of"):
        follow.remembered({"vitdet": {"recipe_overrides": [word]}}, source="FILE")
