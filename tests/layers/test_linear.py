"""The linear layer: the numbers of `F.linear`, by the route that each case should take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vitdet.layers.linear import Linear, linear


class Seen(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def small_products_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitdet.layers.linear._WORK", 512 * 12 * 8)


def routes(layer: Linear, x: torch.Tensor) -> set[str]:
    with Seen() as seen:
        layer(x)
    return seen.names & {"convolution", "addmm", "linear", "mm"}


@pytest.mark.parametrize("shape", [(2, 16, 24, 12), (700, 12), (3, 5, 12), (2, 600, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float32, requires_grad=True)
    layer = Linear(12, 20, bias=bias)
    got = layer(x)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    outside = torch.randn_like(got)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, outside),
        torch.autograd.grad(expected, inputs, outside),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_input_that_is_not_contiguous() -> None:
    x = torch.randn(12, 40, 20).permute(1, 2, 0)
    layer = Linear(12, 8)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_many_float32_tokens_are_a_convolution() -> None:
    layer = Linear(12, 8)
    assert routes(layer, torch.randn(8, 8, 8, 12)) == {"convolution"}


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (torch.randn(511, 12), torch.float32),
        (torch.randn(0, 12), torch.float32),
        (torch.randn(600, 12, dtype=torch.float64), torch.float64),
        (torch.randn(600, 12, dtype=torch.bfloat16), torch.bfloat16),
    ],
)
def test_everything_else_is_not(x: torch.Tensor, dtype: torch.dtype) -> None:
    layer = Linear(12, 8).to(dtype)
    assert "convolution" not in routes(layer, x)
    assert layer(x).shape == (x.shape[0], 8)


def test_autocast_keeps_its_own_route() -> None:
    layer = Linear(12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(600, 12), layer.weight, layer.bias).dtype == torch.bfloat16
        assert "convolution" not in routes(layer, torch.randn(600, 12))


def test_an_exported_graph_has_a_linear_layer() -> None:
    program = torch.export.export(Linear(12, 8), (torch.randn(600, 12),))
    called = {str(node.target) for node in program.graph.nodes}
    assert "aten.linear.default" in called
    assert not any("conv" in name for name in called)


def test_without_onednn_it_is_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "convolution" not in routes(Linear(12, 8), torch.randn(600, 12))
