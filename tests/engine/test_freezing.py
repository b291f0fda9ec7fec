"""Frozen blocks: what learns, what the rest learns, and what is kept for the backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage
from test_run import assert_same
from test_variants import VARIANTS
from tiny_recipe import detector_node, draw, recipe
from torch import nn

from vitdet import checkpoint
from vitdet.config import build_model
from vitdet.engine.freezing import freeze_blocks
from vitdet.engine.groups import group_lines
from vitdet.engine.losses import DetectorLoss
from vitdet.engine.run import train
from vitdet.optim import adamw
from vitdet.utils.checks import InputError
from vitdet.utils.env import seed_all

NET = "backbone.net."
FIRST = (f"{NET}pos_embed", f"{NET}patch_embed.", f"{NET}blocks.0.")


def make_detector(variant: str = "", **options) -> nn.Module:
    seed_all(0)
    node = detector_node(**options)
    if variant:
        VARIANTS[variant](node)
    return build_model(node).train()


def gradients(detector: nn.Module) -> dict[str, torch.Tensor]:
    seed_all(1)
    with EventStorage(0):
        losses = DetectorLoss(detector, seed=5)([draw(0), draw(1)])
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


def test_embeddings_and_first_blocks_do_not_learn_and_the_rest_is_as_before():
    whole, detector = make_detector(), make_detector()
    names = freeze_blocks(detector, 1)
    assert set(names) == {n for n, _ in whole.named_parameters() if n.startswith(FIRST)}
    expected, found = gradients(whole), gradients(detector)
    assert found.keys() == expected.keys() - set(names)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    assert detector.state_dict().keys() == whole.state_dict().keys()


def test_nothing_is_kept_of_frozen_blocks():
    sizes, learns = [], []
    for blocks in (0, 1, 2):
        detector = make_detector()
        freeze_blocks(detector, blocks)
        after: list[bool] = []
        for block in detector.backbone.net.blocks:
            block.register_forward_hook(lambda *a, after=after: after.append(a[2].requires_grad))
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved=saved) -> torch.Tensor:
            saved.append(tensor.nbytes)
            return tensor

        image = detector.preprocess_image([draw(0)]).tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            detector.backbone.net(image)
        sizes.append(sum(saved))
        learns.append(after)
    assert learns == [[True, True], [False, True], [False, False]]
    assert sizes[0] > sizes[1] > sizes[2] == 0


def test_activation_checkpointing_gives_the_same_gradients():
    plain = make_detector(drop_path_rate=0.5)
    checkpointed = make_detector(drop_path_rate=0.5, checkpoint_blocks=(0, 1))
    for detector in (plain, checkpointed):
        freeze_blocks(detector, 1)
    assert_same(gradients(checkpointed), gradients(plain))


def test_the_optimizer_has_no_group_of_them():
    detector = make_detector()
    before = {
        group["lr_multiplier"] for group in adamw(detector, layer_decay_rate=0.5).param_groups
    }
    freeze_blocks(detector, 1)
    groups = adamw(detector, layer_decay_rate=0.5).param_groups
    assert before == {0.5**3, 0.5**2, 0.5, 1.0}
    assert {group["lr_multiplier"] for group in groups} == {0.5, 1.0}
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(p) for p in detector.parameters() if p.requires_grad}


def test_nothing_is_frozen_by_default():
    detector = make_detector()
    assert freeze_blocks(detector, 0) == []
    assert all(parameter.requires_grad for parameter in detector.parameters())


@pytest.mark.parametrize("variant", ["vitae_b", "vitae_s"])
def test_batchnorm_of_frozen_blocks_keeps_its_statistics(variant):
    detector = make_detector(variant)
    names = freeze_blocks(detector, 1)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.eval()
    gradients(detector.train())
    moved = {n for n, value in detector.state_dict().items() if not torch.equal(value, before[n])}
    frozen = tuple({name.rpartition(".")[0] + "." for name in names} - {NET})
    statistics = {name for name in before if name.endswith("num_batches_tracked")}
    assert {name for name in statistics if name.startswith(frozen)} != set()
    assert {name for name in moved if name.startswith(frozen)} == set()
    assert {name for name in statistics if not name.startswith(frozen)} <= moved


def test_propagation_blocks_learn_on():
    detector = make_detector("basic")
    names = freeze_blocks(detector, 2)
    assert not [name for name in names if ".residual." in name]
    found = gradients(detector)
    assert f"{NET}blocks.0.residual.conv1.weight" in found
    assert f"{NET}blocks.1.attn.qkv.weight" not in found


@pytest.mark.parametrize("blocks", [-1, 3])
def test_more_blocks_than_there_are(blocks):
    with pytest.raises(
        InputError,
        match=rf"train\.freeze_blocks: expected 0 to 2, the blocks of the backbone, got {blocks}",
    ):
        freeze_blocks(make_detector(), blocks)


def test_a_backbone_without_layers():
    detector = nn.Module()
    detector.backbone = nn.Conv2d(3, 4, 1)
    with pytest.raises(
        InputError,
        match=r"train\.freeze_blocks: expected a backbone with layer_id\(\) .*got Conv2d",
    ):
        freeze_blocks(detector, 1)
    with pytest.raises(InputError, match=r"got NoneType"):
        freeze_blocks(nn.Linear(1, 1), 1)


def test_a_run_leaves_frozen_weights_and_their_average_alone(tmp_path):
    train(recipe(tmp_path / "start", num_images=4))
    start = str(tmp_path / "start" / "model_final.pth")
    options = dict(num_images=8, init_checkpoint=start, freeze_blocks=1, ema_decay=0.5)
    train(recipe(tmp_path / "frozen", **options))
    before = checkpoint.read(start)["model"]
    after = checkpoint.read(tmp_path / "frozen" / "model_final.pth")
    assert after["model"].keys() == before.keys()
    still = {name for name, value in after["model"].items() if torch.equal(value, before[name])}
    frozen = {name for name in before if name.startswith(FIRST)}
    assert frozen <= still
    assert f"{NET}blocks.1.attn.qkv.weight" not in still
    for name in frozen:
        assert torch.equal(after["ema_state"][name], before[name]), name


def test_a_run_goes_on_with_as_many_frozen_blocks_as_it_began(tmp_path):
    train(recipe(tmp_path, num_images=4, freeze_blocks=1))
    with pytest.raises(InputError, match=r"optimizer state in .*: expected .* groups, got .* in "):
        train(recipe(tmp_path, num_images=8), resume=True)


def test_the_table_of_groups_shows_them():
    cfg = recipe(Path("unused"), freeze_blocks=1)
    lines = [line.split() for line in group_lines(cfg)]
    frozen = {line[0] for line in lines if line[-2:] == ["frozen", "-"]}
    names = {name for name, _ in make_detector().named_parameters()}
    assert frozen == {name for name in names if name.startswith(FIRST)}
