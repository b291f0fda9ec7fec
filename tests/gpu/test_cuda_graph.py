"""Backbone and pyramid as one CUDA graph: nothing in them waits for the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitdet.config import build_model, load_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MINI = Path(__file__).resolve().parents[2] / "configs/mini"


@pytest.mark.parametrize("recipe", ["mask_rcnn_vitdet_shapes", "mask_rcnn_eva02_shapes"])
def test_a_replay_computes_new_images(recipe: str) -> None:
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


def test_a_pass_never_waits() -> None:
    backbone = build_model(load_config(MINI / "mask_rcnn_vitdet_shapes.py").model.backbone)
    backbone.cuda().eval()
    images = torch.randn(1, 3, 128, 128, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            backbone(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
