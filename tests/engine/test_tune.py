"""What of the backbone learns: its last blocks, adapters, nothing; the rest stays to the bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from detectron2.utils.events import EventStorage
from pair import in_pair
from ranks import tuned
from test_run import assert_same
from test_variants import VARIANTS
from tiny_recipe import draw, recipe, tiny_detector
from torch import nn

from vitdet import checkpoint
from vitdet.backbones.eva02 import EVA02ViT
from vitdet.config import Train
from vitdet.engine.losses import DetectorLoss
from vitdet.engine.parameters import compile_blocks
from vitdet.engine.run import evaluate, train
from vitdet.engine.tune import adapted, merged, merging, set_up
from vitdet.utils.checks import InputError
from vitdet.utils.env import seed_all

NET = "backbone.net."
FIRST = (f"{NET}pos_embed", f"{NET}patch_embed.", f"{NET}blocks.0.")


def freeze(detector, blocks=0, tune="all", **options):
    return set_up(detector, Train(freeze_blocks=blocks, tune=tune, **options))


def gradients(detector):
    seed_all(1)
    detector.zero_grad()
    with EventStorage(0):
        losses = DetectorLoss(detector, seed=5)([draw(0), draw(1)])
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


def in_net(detector):
    return {name for name, _ in detector.named_parameters() if name.startswith(NET)}


# --- frozen blocks --------------------------------------------------------------------------------


def test_embeddings_and_first_blocks_do_not_learn_and_the_rest_is_as_before():
    whole, detector = tiny_detector(drop_path_rate=0.5), tiny_detector(drop_path_rate=0.5)
    checkpointed = tiny_detector(drop_path_rate=0.5, checkpoint_blocks=(0, 1))
    assert freeze(detector, 0) == []
    names = freeze(detector, 1)
    assert set(names) == {n for n, _ in whole.named_parameters() if n.startswith(FIRST)}
    expected, found = gradients(whole), gradients(detector)
    assert found.keys() == expected.keys() - set(names)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    assert detector.state_dict().keys() == whole.state_dict().keys()
    freeze(checkpointed, 1)
    assert_same(gradients(checkpointed), found)


@pytest.mark.parametrize("tune", ["all", "head"])
def test_batchnorm_of_what_is_frozen_keeps_its_statistics(tune):
    detector = tiny_detector(VARIANTS["vitae_b"])
    names = freeze(detector, tune=tune, blocks=tune == "all")
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.eval()
    gradients(detector.train())
    moved = {n for n, value in detector.state_dict().items() if not torch.equal(value, before[n])}
    frozen = tuple({name.rpartition(".")[0] + "." for name in names} - {NET})
    statistics = {name for name in before if name.endswith("num_batches_tracked")}
    assert {name for name in statistics if name.startswith(frozen)} != set()
    assert {name for name in moved if name.startswith(frozen)} == set()
    assert {name for name in statistics if not name.startswith(frozen)} <= moved


def test_propagation_blocks_learn_on_but_with_head():
    detector = tiny_detector(VARIANTS["basic"])
    names = freeze(detector, 2)
    assert not [name for name in names if ".residual." in name]
    found = gradients(detector)
    assert f"{NET}blocks.0.residual.conv1.weight" in found
    assert f"{NET}blocks.1.attn.qkv.weight" not in found
    assert set(freeze(detector, tune="head")) == in_net(detector)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"freeze_blocks": 3}, r"freeze_blocks: expected 0 to 2 blocks, got 3"),
        ({"freeze_blocks": 1}, r"freeze_blocks: Conv2d has no layer_id\(\). Set it to 0"),
        ({"tune": "lora"}, r"tune: Conv2d has no layer_id\(\). Set it to all"),
    ],
)
def test_blocks_that_cannot_be_frozen(options, text):
    detector = tiny_detector()
    if "Conv2d" in text:
        detector.backbone = nn.Conv2d(3, 4, 1)
    with pytest.raises(InputError, match=rf"train\.{text}"):
        set_up(detector, Train(**options))


# --- heads alone ----------------------------------------------------------------------------------


def test_head_leaves_the_network_in_evaluation_mode_and_without_a_graph():
    detector, whole = tiny_detector(drop_path_rate=0.9), tiny_detector()
    assert set(freeze(detector, tune="head")) == in_net(detector)
    detector.train()
    assert detector.backbone.training
    assert not any(module.training for module in detector.backbone.net.modules())
    features = detector.backbone.net(torch.zeros(1, 3, 64, 64))["last_feat"]
    assert not features.requires_grad
    expected, found = gradients(whole), gradients(detector)
    assert found.keys() == expected.keys() - in_net(whole)
    assert all(torch.equal(found[name], expected[name]) for name in found)  # and no branch dropped


# --- adapters -------------------------------------------------------------------------------------

KINDS = {
    "": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"},
    "eva02": {f"attn.{each}_proj" for each in "qkv"} | {"attn.proj", *(f"mlp.w{i}" for i in "123")},
}


def moved(detector):
    """The same with adapters that are not zero."""
    with torch.no_grad():
        for layer in adapted(detector).values():
            nn.init.normal_(layer.lora_b.weight, std=0.1)
    return detector


def eva02(node):
    sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 2}
    node.backbone.net = EVA02ViT(**sizes, pretrain_img_size=64, rope_pretrain_grid=4)


def build(kind):
    return tiny_detector(eva02 if kind else None)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_begin_with_the_function_of_the_weights_and_end_in_them(kind):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    detector, plain = build(kind), build(kind)
    plain.load_state_dict(detector.state_dict())
    names = freeze(detector, tune="lora", lora_rank=3, lora_alpha=4.5)
    assert set(adapted(detector)) == {f"{NET}blocks.{i}.{n}" for i in (0, 1) for n in KINDS[kind]}
    assert torch.equal(detector.backbone(x)["p4"], plain.backbone(x)["p4"])
    assert_same(merged(detector, detector.state_dict()), plain.state_dict())
    found = gradients(moved(detector))
    adapters = {name for name in found if name.startswith(NET)}
    assert adapters == {f"{n}.lora_{each}.weight" for n in adapted(detector) for each in "ab"}
    assert not found.keys() & set(names)
    layer, name = detector.backbone.net.blocks[1].attn.proj, f"{NET}blocks.1.attn.proj.weight"
    state = merged(detector, detector.state_dict())
    whole = layer.weight + 1.5 * layer.lora_b.weight @ layer.lora_a.weight
    torch.testing.assert_close(state[name], whole)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    plain.load_state_dict(state)
    expected = plain.backbone(x)["p4"]
    torch.testing.assert_close(detector.backbone(x)["p4"], expected, rtol=1e-4, atol=1e-5)
    with merging(detector):
        assert torch.equal(detector.backbone(x)["p4"], expected)
    assert_same(dict(detector.state_dict()), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_adapters_in_compiled_blocks():
    torch._dynamo.reset()
    plain, compiled = build(""), build("")
    for each in (plain, compiled):
        freeze(each, tune="lora")
        moved(each)
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled, backend="eager")
    expected = gradients(plain)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    train(recipe(folder / "run", num_images=4))
    return str(folder / "run" / "model_final.pth")


def run(folder, start, *, resume=False, **options):
    cfg = recipe(folder, **{"num_images": 12, "ema_decay": 0.5, "init_checkpoint": start} | options)
    cfg.schedule.update(num_images=12, milestones=[])
    return train(cfg, resume=resume)


HOW = {"blocks": {"freeze_blocks": 1}, "head": {"tune": "head"}, "lora": {"tune": "lora"}}


@pytest.mark.parametrize("how", HOW)
def test_a_run_leaves_what_is_frozen_alone_and_goes_on_to_the_bit(start, tmp_path, how):
    before = checkpoint.read(start)["model"]
    results = run(tmp_path / "whole", start, **HOW[how])
    whole = checkpoint.read(tmp_path / "whole" / "model_final.pth")
    assert list(whole["model"]) == list(whole["ema_state"]) == list(before)
    same = {name for name, value in whole["model"].items() if torch.equal(value, before[name])}
    learns = (f"{NET}blocks.1.attn.qkv.weight", f"{NET}blocks.0.attn.qkv.weight")
    assert [name not in same for name in learns] == [how != "head", how == "lora"]
    frozen = {n for n in before if n.startswith(FIRST if how == "blocks" else NET)}
    if how == "lora":
        assert "optimizer" in whole
        frozen = {n for n in frozen if not n.endswith((".weight",)) or "norm" in n}
        assert all(torch.equal(whole["lora"]["model"][n], before[n]) for n in before if NET in n)
    assert frozen <= same
    assert all(torch.equal(whole["ema_state"][name], before[name]) for name in frozen)
    run(tmp_path / "parts", start, num_images=8, **HOW[how])
    run(tmp_path / "parts", start, resume=True, **HOW[how])
    parts = checkpoint.read(tmp_path / "parts" / "model_final.pth")
    for key in whole.keys() - {"vitdet"}:
        assert_same(parts[key], whole[key], key)
    # the file alone gives the scores of the run's end, and is a start like any other
    for which, prefix in (("model", ""), ("ema", "ema/")):
        cfg = recipe(tmp_path / which, eval_weights=which)
        cfg.train.init_checkpoint = str(tmp_path / "whole" / "model_final.pth")
        assert evaluate(cfg)[f"{prefix}bbox"]["AP50"] == results[f"{prefix}bbox"]["AP50"]
    with pytest.raises(InputError, match=r"optimizer|train\.tune for resuming .* got another"):
        run(tmp_path / "parts", start, resume=True, num_images=16)
    again = {"num_images": 4, "init_checkpoint": str(tmp_path / "whole" / "model_final.pth")}
    run(tmp_path / "again", start, **again, **HOW[how])
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tune": "lora", "freeze_blocks": 1}, "tune=lora freezes every block, got train.freeze_b"),
        ({"tune": "none"}, "tune: expected all or lora or head, got none"),
        ({"tune": "lora", "lora_rank": 0}, "lora_rank: expected 1 or more, got 0"),
        ({"tune": "lora", "lora_alpha": 0}, "lora_alpha: expected a number above 0, got 0"),
        ({"tune": "head", "init_checkpoint": ""}, "tune=head: expected weights to start from"),
    ],
)
def test_what_does_not_go_together_is_a_line(start, tmp_path, options, text):
    with pytest.raises(InputError, match=rf"train\.{text}"):
        run(tmp_path / "run", start, **options)


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(start, tmp_path):
    """As copies and sharded; files are the same."""
    tuned(str(tmp_path / "one"), start, "ddp")
    for kind in ("ddp", "fsdp"):
        in_pair(tuned, str(tmp_path / kind), start, kind)
    one = checkpoint.read(tmp_path / "one" / "model_final.pth")
    for kind in ("ddp", "fsdp"):
        two = checkpoint.read(tmp_path / kind / "model_final.pth")
        for part in ("model", "ema_state"):
            assert list(two[part]) == list(one[part])
            for name, value in one[part].items():
                torch.testing.assert_close(two[part][name], value, rtol=0, atol=1e-6, msg=name)
