"""The kernels against the definition, values and gradients."""

import sys
import types
from importlib.machinery import ModuleSpec

import kernel_cases
import pytest
import torch

from vitdet.backbones.vit import ViT
from vitdet.layers import attention as door
from vitdet.layers import blocks
from vitdet.layers.attention import attention, automatic, eager
from vitdet.layers.positions import RelPos, rel_pos_terms
from vitdet.utils.checks import InputError

B, N, H, W, D = 2, 3, 5, 7, 8
L = H * W


def brute_force(q, k, v, table_h, table_w, size):
    """The definition, one query and one key at a time, in float64."""
    out = torch.zeros(*q.shape, dtype=torch.float64)
    height, width = size
    for b, n, i in torch.cartesian_prod(*(torch.arange(side) for side in q.shape[:3])).tolist():
        logits = torch.zeros(q.shape[2], dtype=torch.float64)
        for j in range(q.shape[2]):
            row = i // width - j // width + height - 1
            column = i % width - j % width + width - 1
            logits[j] = q.shape[-1] ** -0.5 * q[b, n, i] @ k[b, n, j]
            logits[j] += q[b, n, i] @ table_h[row] + q[b, n, i] @ table_w[column]
        out[b, n, i] = logits.softmax(0) @ v[b, n]
    return out


@pytest.mark.parametrize("backend", ["eager", "sdpa", "blocks"])
@pytest.mark.parametrize("size", [(3, 4), (1, 5)])
def test_kernel_equals_definition(backend, size):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, size[0] * size[1], 8, dtype=torch.float64)
    tables = [torch.randn(2 * side - 1, 8, dtype=torch.float64) for side in size]
    out = attention(q, k, v, rel_pos=rel_pos_terms(q, *tables, size), backend=backend)
    torch.testing.assert_close(out, brute_force(q, k, v, *tables, size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_rel_pos", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("case", kernel_cases.CASES, ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_kernel_equals_eager(backend, case, with_rel_pos):
    """Values and gradients of the kernels that run here; tests/gpu has those of CUDA."""
    found = kernel_cases.differences(case, backend, bias=with_rel_pos)
    kernel_cases.check(found, case.dtype, with_rel_pos)


@pytest.mark.slow
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
    given, fused = [], torch.nn.functional.scaled_dot_product_attention

    def noting(*args, **options):
        given.extend(each.shape[-1] for each in args)
        return fused(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    q, k, v = torch.randn(3, 1, 2, sides[0] * sides[1], 8, dtype=torch.float64)
    rel_pos = RelPos(*(torch.randn(1, 2, q.shape[2], side, dtype=torch.float64) for side in sides))
    out = attention(q, k, v, rel_pos=rel_pos, backend="sdpa")
    assert given == [-(-(8 + sum(sides)) // 8) * 8] * 3
    expected = attention(q, k, v, rel_pos=rel_pos, backend="eager")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


# --- optional packages -------------------------------------------------------------------------

SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}


def test_unknown_backend_names_the_nearest():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(InputError, match=r"got 'sdap'\. Did you mean 'sdpa'\?"):
        attention(q, q, q, backend="sdap")
    with pytest.raises(InputError, match=r"one of auto, .*, got 'triton_rel_pos'"):  # it was one
        ViT(**SMALL, attention_backend="triton_rel_pos")


def test_xformers_is_checked_when_a_backbone_is_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    text = r"attention backend 'xformers': there is no such package\. Run `pip install xformers`"
    with pytest.raises(InputError, match=text):
        ViT(**SMALL, attention_backend="xformers")
    module = types.ModuleType("xformers")
    module.__spec__ = ModuleSpec("xformers", None)
    monkeypatch.setitem(sys.modules, "xformers", module)
    net = ViT(**SMALL, attention_backend="xformers")
    with pytest.raises(InputError, match=r"expected inputs that it supports, got q .* on cpu"):
        net(torch.zeros(1, 3, 16, 16))
    with pytest.raises(InputError, match="expected a backbone without relative positions"):
        ViT(**SMALL, use_rel_pos=True, attention_backend="xformers")


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
    torch.testing.assert_close(door.xformers(q, k, v, None, 0.3), expected)


# --- blocks: the same numbers wherever they are cut --------------------------------------------


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, N, L, D)] * 3 + [(B, N, L, H), (B, N, L, W)]
    drawn = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [each.requires_grad_() for each in drawn]


# several heads a block, with a rest; one head; some queries of a head, with a rest; one query
@pytest.mark.parametrize("size", [4 * L * L, L * L, 6 * L, 3])
@pytest.mark.parametrize("with_rel_pos", [True, False])
def test_cut_anywhere(monkeypatch, size, with_rel_pos):
    monkeypatch.setattr(blocks, "_BLOCK", size)
    results = []
    for kernel in (blocks.attention, eager):
        q, k, v, h, w = tensors()
        out = kernel(q, k, v, RelPos(h, w) if with_rel_pos else None, 0.3)
        inputs = [q, k, v, h, w] if with_rel_pos else [q, k, v]
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        results.append([out, *(each.grad for each in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    far = RelPos(500 + 0 * h, w) if with_rel_pos else None
    torch.testing.assert_close(
        blocks.attention(40 * q, k, v, far, 1.0), eager(40 * q, k, v, far, 1.0)
    )


def test_automatic_takes_blocks_with_positions_on_a_cpu():
    q, *_, h, w = (each.detach() for each in tensors(torch.float32))
    assert automatic(q, RelPos(h, w)) == "blocks"
    assert automatic(q.bfloat16(), RelPos(h.bfloat16(), w.bfloat16())) == "blocks"
    assert automatic(q, None) == automatic(q.to("meta"), RelPos(h.to("meta"), w)) == "sdpa"
