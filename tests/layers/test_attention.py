"""The kernels against the definition, values and gradients."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import kernel_cases
import pytest
import torch

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT
from vitdet.layers.attention import KERNELS, attention
from vitdet.layers.kernels import xformers
from vitdet.layers.rel_pos import RelPos, rel_pos_terms, rel_pos_vectors, resize_rel_pos
from vitdet.utils.checks import InputError

# Those that run here, with and without a bias.
CPU = [
    name
    for name, kernel in KERNELS.items()
    if kernel.can_run(torch.zeros(1), None)
    and kernel.can_run(torch.zeros(1), RelPos(torch.zeros(1), torch.zeros(1)))
]


def brute_force(q, k, v, table_h, table_w, size, scale):
    """The definition, one query and one key at a time, in float64."""
    B, N, L, _ = q.shape
    height, width = size
    out = torch.zeros(B, N, L, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for i in range(L):
                logits = torch.zeros(L, dtype=torch.float64)
                for j in range(L):
                    row = i // width - j // width + height - 1
                    column = i % width - j % width + width - 1
                    logits[j] = scale * q[b, n, i] @ k[b, n, j]
                    logits[j] += q[b, n, i] @ table_h[row] + q[b, n, i] @ table_w[column]
                out[b, n, i] = logits.softmax(0) @ v[b, n]
    return out


def test_reference_and_default_run_everywhere():
    assert {"eager", "sdpa"} <= {*CPU}


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("size", [(3, 4), (4, 3), (1, 5)])
def test_kernel_equals_definition(backend, size):
    torch.manual_seed(0)
    L = size[0] * size[1]
    q, k, v = torch.randn(3, 2, 2, L, 8, dtype=torch.float64)
    table_h = torch.randn(2 * size[0] - 1, 8, dtype=torch.float64)
    table_w = torch.randn(2 * size[1] - 1, 8, dtype=torch.float64)
    rel_pos = rel_pos_terms(q, table_h, table_w, size)
    out = attention(q, k, v, rel_pos=rel_pos, backend=backend)
    expected = brute_force(q, k, v, table_h, table_w, size, 8**-0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_rel_pos", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("case", kernel_cases.CASES, ids=str)
@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "eager"])
def test_kernel_equals_eager(backend, case, with_rel_pos):
    """Values and gradients of every kernel that can run here; tests/gpu has those of CUDA."""
    q = torch.zeros(1, 1, 1, 16, dtype=getattr(torch, case.dtype), requires_grad=True)
    if not KERNELS[backend].can_run(q, RelPos(q, q) if with_rel_pos else None):
        pytest.skip("not for these inputs on a CPU")
    found = kernel_cases.differences(case, backend, bias=with_rel_pos)
    kernel_cases.check(found, case.dtype, with_rel_pos)


def test_unknown_backend_names_the_nearest():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(InputError, match=r"got 'sdap'\. Did you mean 'sdpa'\?"):
        attention(q, q, q, backend="sdap")


@pytest.mark.parametrize("backbone", [ViT, EVA02ViT])
def test_xformers_not_installed_is_told_when_building(backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    text = (
        r"attention backend 'xformers': expected the package xformers, got no such package\. "
        r"Run `pip install xformers`, or use backend 'auto'\."
    )
    with pytest.raises(InputError, match=text):
        backbone(depth=1, embed_dim=16, num_heads=2, attention_backend="xformers")
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(InputError, match=text):
        attention(q, q, q, backend="xformers")


def test_xformers_takes_no_relative_positions_is_told_when_building(monkeypatch):
    module = types.ModuleType("xformers")
    module.__spec__ = ModuleSpec("xformers", None)
    monkeypatch.setitem(sys.modules, "xformers", module)
    small = {"depth": 1, "embed_dim": 16, "num_heads": 2, "attention_backend": "xformers"}
    assert ViT(**small).blocks[0].attn.backend == "xformers"
    text = r"'xformers': expected a backbone without relative positions, got use_rel_pos=True\. Use"
    with pytest.raises(InputError, match=text):
        ViT(**small, use_rel_pos=True)


def test_xformers_is_given_its_own_layout_and_our_scale(monkeypatch):
    """With its function replaced by the definition over (B, L, N, D), as its documentation says."""

    def definition(query, key, value, scale):
        logits = torch.einsum("blnd,bmnd->bnlm", query, key) * scale
        return torch.einsum("bnlm,bmnd->blnd", logits.softmax(-1), value)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = definition
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    torch.manual_seed(5)
    q, k, v = torch.randn(3, 2, 3, 7, 8)
    expected = attention(q, k, v, scale=0.3, backend="eager")
    torch.testing.assert_close(xformers.attention(q, k, v, None, 0.3), expected)


needs_xformers = pytest.mark.skipif(
    find_spec("xformers") is None, reason="xformers is not installed"
)


@needs_xformers
def test_xformers_needs_cuda_and_no_bias():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(InputError, match=r"'xformers': expected inputs that it supports, got q .*"):
        attention(q, q, q, backend="xformers")
    rel_pos = RelPos(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    with pytest.raises(InputError, match=r"on cpu, with a position bias\. Use backend 'auto'"):
        attention(q, q, q, rel_pos=rel_pos, backend="xformers")


@pytest.mark.gpu
@needs_xformers
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("head_dim", [32, 64, 88])
def test_xformers_equals_eager(head_dim):
    gradients, outputs = [], []
    for name in ("eager", "xformers"):
        torch.manual_seed(4)
        q, k, v = (torch.randn(2, 3, 400, head_dim, device="cuda") for _ in range(3))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention(q, k, v, backend=name)
        (out * torch.randn_like(out)).sum().backward()
        outputs.append(out.detach())
        gradients.append([x.grad for x in leaves])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    for ours, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=5e-5)


def test_kernel_that_needs_relative_positions_is_told_when_building(monkeypatch):
    module = types.ModuleType("triton")
    module.__spec__ = ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", module)
    small = {"depth": 1, "embed_dim": 16, "num_heads": 2, "attention_backend": "triton_rel_pos"}
    assert ViT(**small, use_rel_pos=True).blocks[0].attn.backend == "triton_rel_pos"
    with pytest.raises(InputError, match="expected a backbone with relative positions, got use_r"):
        ViT(**small, use_rel_pos=False)


def test_triton_not_installed_is_told_when_building(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(InputError, match=r"expected the package triton, got no such package\. Run"):
        ViT(depth=1, embed_dim=16, num_heads=2, attention_backend="triton_rel_pos")


def test_auto_does_not_cut_a_compiled_graph():
    q, k, v = torch.randn(3, 1, 2, 6, 16)
    rel_pos = RelPos(torch.randn(1, 2, 6, 2), torch.randn(1, 2, 6, 3))
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for bias in (rel_pos, None):
        expected = attention(q, k, v, rel_pos=bias, backend="eager")
        torch.testing.assert_close(compiled(q, k, v, rel_pos=bias), expected)


@pytest.mark.parametrize("sides", [(3, 4), (4, 4), (5, 6)])
def test_joined_vectors_are_a_multiple_of_eight(sides, monkeypatch):
    """CUDA's fused kernels take no others; torch then holds an L x L matrix."""
    given = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def noting(*args, **options):
        given.extend(each.shape[-1] for each in args)
        return fused(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    L = sides[0] * sides[1]
    q, k, v = torch.randn(3, 1, 2, L, 8, dtype=torch.float64)
    rel_pos = RelPos(*(torch.randn(1, 2, L, side, dtype=torch.float64) for side in sides))
    out = attention(q, k, v, rel_pos=rel_pos, backend="sdpa")
    assert given == [-(-(8 + sum(sides)) // 8) * 8] * 3
    expected = attention(q, k, v, rel_pos=rel_pos, backend="eager")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_table_rows_are_offsets():
    table = torch.arange(5.0)[:, None]  # S = 3: offsets -2 to 2
    vectors = rel_pos_vectors(table, 3)[..., 0]
    assert vectors.tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]


def test_crop_keeps_the_offsets_and_interpolation_stretches_them():
    table = torch.arange(-6.0, 7.0)[:, None]  # S = 7, the value is the offset
    assert resize_rel_pos(table, 4, "crop")[:, 0].tolist() == [-3, -2, -1, 0, 1, 2, 3]
    stretched = resize_rel_pos(table, 4, "interpolate")[:, 0]
    assert stretched[3] == 0
    assert stretched[4] == pytest.approx(13 / 7)  # one of our tokens is 13 / 7 of the table's
    assert resize_rel_pos(table, 7) is table
    with pytest.raises(InputError, match="expected at most 7 tokens along an axis, got 8"):
        resize_rel_pos(table, 8, "crop")
