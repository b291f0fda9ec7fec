"""How fast parameters learn, and the compiled blocks: the same numbers."""

from __future__ import annotations

import pytest
import torch
from tiny_recipe import recipe
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitdet.backbones.vit import ViT
from vitdet.config import build_model
from vitdet.engine.parameters import compile_blocks, group_lines
from vitdet.utils.checks import InputError

NET = "backbone.net."
FIRST = (f"{NET}pos_embed", f"{NET}patch_embed.", f"{NET}blocks.0.")

# --- groups and rates ----------------------------------------------------------------------------


def cells(lines):
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


def build():
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
def test_graphs_stay_few_and_gradients_are_those_of_the_plain_net():
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
