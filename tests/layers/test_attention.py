"""The kernels against the definition, values and gradients."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import pytest
import torch

from vitdet.backbones.eva01 import EVA01ViT
from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT
from vitdet.layers.attention import KERNELS, attention
from vitdet.layers.kernels import sdpa, xformers
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


@pytest.mark.parametrize("backend", [name for name in CPU if name != "eager"])
@pytest.mark.parametrize("with_rel_pos", [True, False])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("size", [(14, 14), (5, 9)])
def test_kernel_equals_eager(backend, with_rel_pos, head_dim, size):
    L = size[0] * size[1]
    gradients, outputs = [], []
    for name in ("eager", backend):
        torch.manual_seed(1)
        q, k, v = (torch.randn(2, 3, L, head_dim, requires_grad=True) for _ in range(3))
        h = torch.randn(2, 3, L, size[0], requires_grad=True)
        w = torch.randn(2, 3, L, size[1], requires_grad=True)
        rel_pos = RelPos(h, w) if with_rel_pos else None
        out = attention(q, k, v, rel_pos=rel_pos, backend=name)
        (out * torch.randn_like(out)).sum().backward()
        outputs.append(out.detach())
        gradients.append([x.grad for x in (q, k, v, h, w) if x.grad is not None])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=2e-6)
    assert len(gradients[0]) == (5 if with_rel_pos else 3)
    for ours, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


def test_blocks_of_queries_equal_one_block(monkeypatch):
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, 2, 35, 16)
    rel_pos = RelPos(torch.randn(1, 2, 35, 5), torch.randn(1, 2, 35, 7))
    whole = sdpa.blocked(q, k, v, rel_pos, 0.25)
    monkeypatch.setattr(sdpa, "_BLOCK", 2 * 35 * 4)  # four queries at a time
    torch.testing.assert_close(sdpa.blocked(q, k, v, rel_pos, 0.25), whole, rtol=0, atol=1e-6)


def test_bfloat16_is_near_float32():
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 2, 2, 36, 32)
    rel_pos = RelPos(torch.randn(2, 2, 36, 6), torch.randn(2, 2, 36, 6))
    exact = attention(q, k, v, rel_pos=rel_pos, backend="eager")
    low = [x.bfloat16() for x in (q, k, v)]
    out = attention(*low, rel_pos=RelPos(*(x.bfloat16() for x in rel_pos)), backend="sdpa")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05)


def test_unknown_backend_names_the_nearest():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(InputError, match=r"got 'sdap'\. Did you mean 'sdpa'\?"):
        attention(q, q, q, backend="sdap")


@pytest.mark.parametrize("backbone", [ViT, EVA01ViT, EVA02ViT])
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


@pytest.mark.parametrize("backbone", [ViT, EVA01ViT])
def test_xformers_takes_no_relative_positions_is_told_when_building(backbone, monkeypatch):
    module = types.ModuleType("xformers")
    module.__spec__ = ModuleSpec("xformers", None)
    monkeypatch.setitem(sys.modules, "xformers", module)
    small = {"depth": 1, "embed_dim": 16, "num_heads": 2, "attention_backend": "xformers"}
    assert backbone(**small).blocks[0].attn.backend == "xformers"
    text = r"'xformers': expected a backbone without relative positions, got use_rel_pos=True\. Use"
    with pytest.raises(InputError, match=text):
        backbone(**small, use_rel_pos=True)


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
