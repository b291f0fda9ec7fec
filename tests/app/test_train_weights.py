"""`vitdet train --weights`: the recipe follows the weights of a foundation model."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from test_train import loaded

import train_net
from tests.convert.manifests import find, needs_manifests
from vitdet import checkpoint
from vitdet.app import cli, follow, train
from vitdet.app.options import ARGUMENTS
from vitdet.app.start import from_weights
from vitdet.backbones.vit import ViT
from vitdet.config import backbone_settings, config_text, load_config
from vitdet.convert import convert
from vitdet.utils.checks import InputError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.logging.disable_progress_bar()
DATA = SimpleNamespace(class_names=("cell",), train=("train.json", "images"))


@pytest.fixture(autouse=True)
def _recipes_once(monkeypatch):
    monkeypatch.setattr(train, "load_config", lambda recipe, words=(): loaded(recipe, tuple(words)))


def arguments(*words):
    parser = argparse.ArgumentParser()
    ARGUMENTS["train"](parser)
    return parser.parse_args(["--data", "data", *words])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A DINOv2 at toy size as the hub and as its own repository have it."""
    folder = tmp_path_factory.mktemp("weights")
    sizes = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 2}
    config = transformers.Dinov2Config(**sizes, image_size=70, patch_size=14, mlp_ratio=2)
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config)
    model.save_pretrained(folder / "hub")
    net = ViT(
        **{"embed_dim": 128, "depth": 8, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 14},
        **{"pretrain_img_size": 70, "layer_scale": True, "use_cls_token": True, "final_norm": True},
    )
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    state, _ = convert(model.state_dict(), shapes)
    state["mask_token"] = torch.zeros(1, 128)
    checkpoint.write(folder / "own.pth", state)
    return {"hub": folder / "hub", "own": folder / "own.pth"}


def start(path, out):
    """The changes to the recipe, and the weights that the training begins with."""
    args = arguments("--weights", str(path), "--size", "small", "--out", str(out))
    changes = train._following(args, out)
    args.overrides[:0] = changes
    recipe = train.recipe_of(args.size, masks=False)
    return changes, checkpoint.read(train._start(args, out, recipe, DATA))["model"]


@pytest.mark.slow
def test_both_layouts_of_the_same_weights_start_alike(weights, tmp_path):
    """At patch size 16, resampled from 14, with the file's depth, width, heads and positions."""
    changes, state = start(weights["hub"], tmp_path / "hub")
    net = backbone_settings(load_config(train.recipe_of("small", masks=False), changes).model)
    told = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "pretrain_img_size")
    assert [net[name] for name in told] == [128, 8, 2, 2.0, 16, 80]
    assert (net["layer_scale"], list(net["global_block_indexes"])) == (True, [1, 3, 5, 7])
    more, other = start(weights["own"], tmp_path / "own")
    assert more == changes
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.slow
def test_what_a_model_has_no_place_for_comes_with_the_command_that_goes_on(tmp_path):
    """BEiT's bias table; the command is run, and --weights takes what it writes."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 256, "image_size": 64, "use_relative_position_bias": True}
    transformers.BeitModel(transformers.BeitConfig(**sizes)).save_pretrained(tmp_path / "beit")
    with pytest.raises(InputError, match=r"a place for full bias table of relative pos") as error:
        start(tmp_path / "beit", tmp_path)
    (command,) = re.findall(r"`vitdet (.*)`", str(error.value))
    assert command.endswith(" --allow-inexact")
    out = tmp_path / "out.pth"
    assert cli.main([str(out) if word == "OUT.pth" else word for word in shlex.split(command)]) == 0
    changes, state = start(out, tmp_path)
    assert f"{follow.NET}.embed_dim=128" in changes
    assert state["backbone.net.blocks.3.ls1.gamma"].shape == (128,)


def test_a_run_that_is_resumed_has_the_same_backbone(weights, tmp_path):
    changes = train._following(arguments("--weights", str(weights["hub"])), tmp_path)
    args = arguments("--out", str(tmp_path), "--resume")
    (tmp_path / "last_checkpoint").write_text("checkpoint_8.pth")
    assert train._following(args, tmp_path) == changes
    assert args.size == ("small" if torch.cuda.is_available() else "light")
    (tmp_path / "start.json").write_text('{"size": "small"}')
    with pytest.raises(InputError, match=r"start\.json: it cannot be read \(KeyError"):
        train._following(args, tmp_path)


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_leaves_nothing_that_counts(weights, tmp_path):
    """Resumed it begins with its weights again, or with others; a new run begins as ever."""
    record, hub, own = tmp_path / "start.json", weights["hub"], weights["own"]
    for words, named in (((), hub), (("--weights", str(own)), own)):
        train._following(arguments("--weights", str(hub)), tmp_path)
        args = arguments("--out", str(tmp_path), "--resume", *words)
        assert follow.begun(args, tmp_path) is None
        assert args.weights == named
        assert not train._goes_on(args)
    train._following(arguments("--out", str(tmp_path)), tmp_path)
    assert not record.exists()

    recipe = f"{train.OWN}/faster_rcnn_vitdet_s.py"
    words = ["--config-file", recipe, f"train.output_dir={tmp_path}"]
    with from_weights(train_net.parse([*words, "--weights", str(hub)])) as first:
        assert f"train.init_checkpoint={tmp_path / 'start.pth'}" in first
    with from_weights(train_net.parse([*words, "--resume"])) as again:
        assert again == first
    assert json.loads(record.read_text())["weights"] == str(hub)
    with from_weights(train_net.parse([*words, "--weights", str(own), "--resume"])):
        assert json.loads(record.read_text())["weights"] == str(own)
    with from_weights(train_net.parse(words)) as plain:
        assert plain == words[-1:]
    assert not record.exists()


def test_sizes(weights, tmp_path):
    args = arguments()
    assert train._following(args, tmp_path) == []
    assert args.size == ("base" if torch.cuda.is_available() else "tiny")
    args = arguments("--weights", str(weights["hub"]), "--size", "tiny")
    with pytest.raises(InputError, match=r"--size: expected light, small, .*: (light|small) is th"):
        train._following(args, tmp_path)
    args = arguments("--weights", str(weights["hub"]), "--size", "base")
    train._following(args, tmp_path)
    assert args.size == "base"


@needs_manifests
def test_a_detector_of_another_project_tells_its_size(tmp_path, monkeypatch):
    """Its backbone is taken: windows, global blocks and position tables as in the file."""
    monkeypatch.setattr(
        checkpoint, "read", lambda *_, **__: find("mask_rcnn_vitdet_b.coco").content()
    )
    path = tmp_path / "model_final_61ccd1.pkl"
    path.touch()
    args = arguments("--weights", str(path))
    told = train._following(args, tmp_path)
    assert args.size == "base"
    net = backbone_settings(load_config(train.recipe_of("base", masks=False), told).model)
    assert (net["window_size"], net["pretrain_img_size"], net["use_rel_pos"]) == (14, 224, True)
    assert "rel_pos" not in str(told)  # as the recipe has it
    args = arguments("--weights", str(path), "--size", "light")
    told = train._following(args, tmp_path)
    net = backbone_settings(load_config(train.recipe_of("light", masks=False), told).model)
    assert (net["embed_dim"], net["window_size"], net["use_rel_pos"]) == (768, 14, True)
    assert list(net["global_block_indexes"]) == [2, 5, 8, 11]


def test_a_run_of_ours_tells_its_recipe(tmp_path):
    """A detector that began with a foundation model is trained on without another word."""
    keys = ("layer_scale=true", "pretrain_img_size=592", "drop_path_rate=0.3")
    open_ = [f"dataloader.{x}.dataset.{y}=a" for x in ("train", "test") for y in ("json", "images")]
    changes = [*(f"{follow.NET}.{key}" for key in keys), "model.pixel_mean=[1,2,3]"]
    cfg = load_config(train.recipe_of("light", masks=False), [*changes, *open_])
    note = {"format": 1, "class_names": ["cell"], "config": config_text(cfg)}
    net = {"backbone.net.patch_embed.proj.weight": torch.zeros(384, 3, 16, 16)}
    checkpoint.write(tmp_path / "run.pth", {"model": net, "vitdet": note})
    args = arguments("--weights", str(tmp_path / "run.pth"))
    told = train._following(args, tmp_path)
    assert args.size == "light"
    assert set(told) == {
        *(f"{follow.NET}.layer_scale=True", f"{follow.NET}.pretrain_img_size=592"),
        "model.pixel_mean=[1, 2, 3]",
    }
    typed = arguments("--weights", str(tmp_path / "run.pth"), f"{follow.NET}.layer_scale=false")
    assert f"{follow.NET}.layer_scale=True" not in train._following(typed, tmp_path)


def test_what_is_tuned_goes_into_the_recipe_and_stays(weights, tmp_path):
    """Adapters: ten times the rate, but not of one that is typed; a resumed run has them again."""
    words = ("--weights", str(weights["hub"]), "--size", "small")
    told = train._following(arguments(*words, "--tune", "lora"), tmp_path)
    cfg = load_config(train.recipe_of("small", masks=False), told)
    assert (cfg.train.tune, cfg.optimizer.layer_decay_rate) == ("lora", None)
    assert (cfg.optimizer.lr, cfg.optimizer.backbone_lr_multiplier) == (1e-4, 10)
    assert (cfg.optimizer.no_decay[-1], cfg.model.backbone.net.drop_path_rate) == ("lora_", 0)
    light = train._following(arguments(*words[:3], "light", "--tune", "lora"), tmp_path / "light")
    cfg = load_config(train.recipe_of("light", masks=False), light)
    assert cfg.optimizer.backbone_lr_multiplier == 1  # ten times the tenth of this recipe
    (tmp_path / "last_checkpoint").write_text("checkpoint_8.pth")
    assert train._following(arguments("--out", str(tmp_path), "--resume"), tmp_path) == told
    told = train._following(arguments(*words, "--tune", "lora", "optimizer.lr=3e-4"), tmp_path)
    assert not [word for word in told if "backbone_lr_multiplier" in word]
    told = train._following(arguments(*words, "--tune", "head"), tmp_path)
    assert [word for word in told if word.startswith(("train.", "optimizer."))] == [
        "train.tune=head"
    ]
