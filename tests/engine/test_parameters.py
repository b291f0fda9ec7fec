"""Which parameters learn, how fast, and the compiled blocks: the same numbers."""

from __future__ import annotations

import pytest
import torch
from detectron2.utils.events import EventStorage
from test_run import assert_same
from test_variants import VARIANTS
from tiny_recipe import detector_node, draw, recipe
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitdet import checkpoint
from vitdet.backbones.vit import ViT
from vitdet.config import build_model
from vitdet.engine.losses import DetectorLoss
from vitdet.engine.parameters import compile_blocks, freeze_blocks, group_lines
from vitdet.engine.run import train
from vitdet.utils.checks import InputError
from vitdet.utils.env import seed_all

NET = "backbone.net."
FIRST = (f"{NET}pos_embed", f"{NET}patch_embed.", f"{NET}blocks.0.")

# --- frozen blocks -------------------------------------------------------------------------------


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
    whole, detector = make_detector(drop_path_rate=0.5), make_detector(drop_path_rate=0.5)
    checkpointed = make_detector(drop_path_rate=0.5, checkpoint_blocks=(0, 1))
    assert freeze_blocks(detector, 0) == []
    names = freeze_blocks(detector, 1)
    assert set(names) == {n for n, _ in whole.named_parameters() if n.startswith(FIRST)}
    expected, found = gradients(whole), gradients(detector)
    assert found.keys() == expected.keys() - set(names)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    assert detector.state_dict().keys() == whole.state_dict().keys()
    freeze_blocks(checkpointed, 1)
    assert_same(gradients(checkpointed), found)


def test_batchnorm_of_frozen_blocks_keeps_its_statistics():
    detector = make_detector("vitae_b")
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


def test_blocks_that_cannot_be_frozen():
    detector = nn.Module()
    detector.backbone = nn.Conv2d(3, 4, 1)
    for model, blocks, text in (
        (make_detector(), 3, "expected 0 to 2 blocks, got 3"),
        (detector, 1, r"Conv2d has no layer_id\(\)"),
    ):
        with pytest.raises(InputError, match=rf"train\.freeze_blocks: {text}"):
            freeze_blocks(model, blocks)


def test_a_run_leaves_frozen_weights_and_their_average_alone(tmp_path):
    train(recipe(tmp_path / "start", num_images=4))
    start = str(tmp_path / "start" / "model_final.pth")
    options = dict(num_images=8, init_checkpoint=start, freeze_blocks=1, ema_decay=0.5)
    train(recipe(tmp_path / "frozen", **options))
    before = checkpoint.read(start)["model"]
    after = checkpoint.read(tmp_path / "frozen" / "model_final.pth")
    still = {name for name, value in after["model"].items() if torch.equal(value, before[name])}
    frozen = {name for name in before if name.startswith(FIRST)}
    assert frozen <= still
    assert f"{NET}blocks.1.attn.qkv.weight" not in still
    for name in frozen:
        assert torch.equal(after["ema_state"][name], before[name]), name
    with pytest.raises(InputError, match=r"optimizer"):  # it goes on as it began
        train(recipe(tmp_path / "frozen", num_images=12, ema_decay=0.5), resume=True)


# --- groups and rates ----------------------------------------------------------------------------


def cells(lines: list[str]) -> dict[str, tuple[str, str, str]]:
    """{name: (shape, lr, weight decay)} of a table."""
    rows = [line.rsplit(maxsplit=2) for line in lines[1:-1]]
    return {left.split()[0]: (left.split(maxsplit=1)[1], lr, wd) for left, lr, wd in rows}


def test_every_parameter_has_a_line(tmp_path):
    cfg = recipe(tmp_path)  # AdamW at 1e-3, layer decay 0.7 of 2 blocks
    lines = list(group_lines(cfg))
    parameters = dict(build_model(cfg.model, "meta").named_parameters())
    table = cells(lines)
    assert list(table) == list(parameters)
    assert lines[0].split() == ["name", "shape", "lr", "weight", "decay"]
    assert table[f"{NET}pos_embed"] == ("1 x 17 x 32", "0.000343", "0")
    assert table[f"{NET}blocks.1.attn.qkv.weight"] == ("96 x 32", "0.0007", "0.1")
    assert table[f"{NET}blocks.0.norm1.bias"] == ("32", "0.00049", "0")
    assert table["roi_heads.box_predictor.cls_score.bias"] == ("3", "0.001", "0.1")
    assert len({len(line) for line in lines[:-1]}) == 1  # columns stand below each other
    count, total = len(parameters), sum(value.numel() for value in parameters.values())
    assert lines[-1].startswith(f"{count} parameters with {total} numbers; {count} with")
    assert lines[-1].endswith(", in 7 groups")  # of 3 layers, with and without decay; the rest
    cfg.train.freeze_blocks = 1
    table = cells(list(group_lines(cfg)))
    frozen = {name for name, row in table.items() if row[1:] == ("frozen", "-")}
    assert frozen == {name for name in table if name.startswith(FIRST)}
    cfg.model.backbone.net.update(embed_dim=1280, depth=200, num_heads=16)  # 15 GB as numbers
    cfg.dataloader.train.dataset = cfg.dataloader.test.dataset = "???"
    assert len(cells(list(group_lines(cfg)))) > 2000  # no data and no memory are needed
    del cfg["optimizer"]
    with pytest.raises(InputError, match=r"print-groups: expected an optimizer, got only .*model"):
        list(group_lines(cfg))


# --- compiled blocks -----------------------------------------------------------------------------

# at least two windows along each side: one is a shape of its own to the compiler
SIZES = ((64, 64), (48, 80), (80, 40), (96, 96))


def build() -> ViT:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    blocks = {"window_size": 4, "global_block_indexes": (2,), "pretrain_img_size": 32}
    return ViT(**sizes, **blocks, use_rel_pos=True)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# torch's compiler looks at the gradients of tensors that have none, and warns about itself.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@compiles
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_graphs_stay_few_and_gradients_are_those_of_the_plain_net() -> None:
    net, plain = build(), build()
    counter = CompileCounterWithBackend("eager")
    assert compile_blocks(net, backend=counter) == 3
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        for each in (net, plain):
            each.zero_grad()
            each(x)["last_feat"].square().sum().backward()
        for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    # windows and global blocks: for one size, for all, and where a side divides into windows or has
    # the length of the position tables
    assert counter.frame_count <= 9
    made = counter.frame_count
    for size in ((40, 72), (104, 56)):
        net(torch.randn(2, 3, *size))["last_feat"].sum().backward()
    assert counter.frame_count == made
    assert net.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(InputError, match=r"train\.compile: the backbone has no blocks"):
        compile_blocks(nn.Linear(2, 2))
