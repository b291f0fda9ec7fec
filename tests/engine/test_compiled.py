"""Compiled blocks: whole graphs, few of them, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT
from vitdet.engine.compiled import compile_blocks
from vitdet.utils.checks import InputError

# at least two windows along each side: one is a shape of its own to the compiler
SIZES = ((64, 64), (48, 80), (80, 40), (40, 96), (96, 96), (64, 112))
OPTIONS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "window_size": 4,
    "global_block_indexes": (2,),
    "pretrain_img_size": 32,
}


def build(kind: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(**OPTIONS, **options)


# torch's compiler looks at the gradients of tensors that have none, and warns about itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"), [(ViT, {"use_rel_pos": True}), (EVA02ViT, {})], ids=["vit", "eva02"]
)
def test_graphs_stay_few_however_sizes_vary(kind: type[nn.Module], options: Any) -> None:
    net, plain = (build(kind, drop_path_rate=0.3, **options) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    assert compile_blocks(net, backend=counter) == 3
    for size in SIZES:
        net(torch.randn(2, 3, *size))["last_feat"].sum().backward()
    # windows without and with stochastic depth, global blocks with it: for one size, for all, and
    # where a side divides into windows or has the length of the position tables
    assert counter.frame_count <= 9
    made = counter.frame_count
    for size in ((40, 72), (104, 56), (120, 120), (64, 88)):
        net(torch.randn(2, 3, *size))["last_feat"].sum().backward()
    assert counter.frame_count == made
    net.eval()
    plain.eval()
    for size in SIZES[:3]:
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(net(x)["last_feat"], plain(x)["last_feat"])


def test_gradients_and_names_are_those_of_the_plain_net() -> None:
    net, plain = (build(ViT, use_rel_pos=True) for _ in range(2))
    compile_blocks(net, backend="aot_eager")
    x = torch.randn(1, 3, 64, 48)
    for each in (net, plain):
        each(x)["last_feat"].square().sum().backward()
    assert net.state_dict().keys() == plain.state_dict().keys()
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(InputError, match=r"train\.compile: expected a backbone with blocks"):
        compile_blocks(nn.Linear(2, 2))
