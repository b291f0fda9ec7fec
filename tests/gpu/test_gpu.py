"""On a GPU: every attention kernel against eager, and a backbone as one CUDA graph."""

import sys
from pathlib import Path

import pytest
import torch

from vitdet.config import build_model, load_config
from vitdet.layers.attention import KERNELS, attention, can_run
from vitdet.layers.positions import RelPos

sys.path.append(str(Path(__file__).parents[1] / "layers"))
import kernel_cases
from kernel_cases import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MINI = Path(__file__).resolve().parents[2] / "configs/mini"
CASES = [
    *kernel_cases.CASES,
    Case((64, 64), 64, "bfloat16"),
    Case((14, 14), 64, "bfloat16", batch=25, heads=12),
    Case((33, 100), 80, "float16"),
    Case((50, 84), 64),
    Case((20, 128), 128, "bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "eager"])
def test_kernel_equals_eager(backend, bias, case):
    q = torch.zeros(1, 1, 1, case.head_dim, dtype=getattr(torch, case.dtype), device="cuda")
    if not can_run(backend, q, RelPos(q, q) if bias else None):
        pytest.skip("not for these inputs on this device")
    found = kernel_cases.differences(case, backend, "cuda", bias)
    kernel_cases.check(found, case.dtype, bias)


def test_no_l_x_l_matrix_is_held():
    q, k, v = torch.randn(3, 1, 2, 64 * 64, 64, device="cuda", dtype=torch.bfloat16)
    h, w = torch.randn(2, 1, 2, 64 * 64, 64, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v, h, w)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(*leaves[:3], rel_pos=RelPos(*leaves[3:]), backend="auto")
    out.sum().backward()
    matrix = 2 * (64 * 64) ** 2 * 2
    assert torch.cuda.max_memory_allocated() - before < matrix


def test_compiled_in_one_graph():
    whole = torch.compile(attention, fullgraph=True)
    q, k, v = torch.randn(3, 1, 2, 60, 64, device="cuda", dtype=torch.bfloat16)
    h = torch.randn(1, 2, 60, 6, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(1, 2, 60, 10, device="cuda", dtype=torch.bfloat16)
    expected = attention(q, k, v, rel_pos=RelPos(h, w), backend="auto")
    torch.testing.assert_close(whole(q, k, v, rel_pos=RelPos(h, w)), expected)


@pytest.mark.parametrize("recipe", ["mask_rcnn_vitdet_shapes", "mask_rcnn_eva02_shapes"])
def test_a_replay_computes_new_images(recipe):
    model = load_config(MINI / f"{recipe}.py").model.backbone
    backbone = build_model(model, device="cuda").eval()
    images = torch.randn(1, 3, 128, 128, device="cuda")
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up outside the graph
            for _ in range(3):
                backbone(images)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = backbone(images)
        images.normal_()
        graph.replay()
        for name, expected in backbone(images).items():
            torch.testing.assert_close(captured[name], expected)


def test_a_pass_never_waits():
    backbone = build_model(load_config(MINI / "mask_rcnn_vitdet_shapes.py").model.backbone)
    backbone.cuda().eval()
    images = torch.randn(1, 3, 128, 128, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            backbone(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
