"""SwiGLU by its formula."""

from __future__ import annotations

import torch

from vitdet.layers.mlp import SwiGLU


def test_swiglu_equals_its_formula():
    torch.manual_seed(0)
    layer = SwiGLU(6, 10, norm_eps=1e-3).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate = x @ layer.w1.weight.T + layer.w1.bias
    hidden = gate / (1 + torch.exp(-gate)) * (x @ layer.w2.weight.T + layer.w2.bias)
    centred = hidden - hidden.mean(-1, keepdim=True)
    hidden = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    hidden = hidden * layer.ffn_ln.weight + layer.ffn_ln.bias
    expected = hidden @ layer.w3.weight.T + layer.w3.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
