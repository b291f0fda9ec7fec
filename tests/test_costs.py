"""What `vitdet.costs` says without computing is what a computed step takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from vitdet import costs
from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.msvit import MsViT
from vitdet.backbones.vit import ViT
from vitdet.config import build_model, load_config

MINI = Path(__file__).resolve().parents[1] / "configs/mini"
SMALL: dict[str, Any] = {"img_size": 128, "patch_size": 8, "embed_dim": 64, "depth": 4}
SMALL |= {"num_heads": 2, "window_size": 6, "global_block_indexes": [3], "pretrain_img_size": 128}
STAGES: dict[str, Any] = {"embed_dim": [16, 32, 64], "depth": [1, 1, 1], "num_heads": [1, 1, 2]}
STAGES |= {"patch_size": [4, 2, 2], "num_global_tokens": [1] * 3, "attention_size": [7] * 3}
STAGES |= {"img_size": 128, "out_features": ["layer1", "layer2", "layer3"]}
NETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "vit": (ViT, SMALL),
    "vit with relative positions": (ViT, SMALL | {"use_rel_pos": True}),
    "eva02": (EVA02ViT, SMALL),
    "vil": (MsViT, STAGES),
}


def computed(net: nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """Return bytes kept and at the peak of a step that is computed."""
    with costs.LiveBytes([images, *net.parameters(), *net.buffers()]) as alive:
        out = list(net(images).values())
        kept = alive.live
        loss = sum(each.float().mean() for each in out)
        del out
        assert isinstance(loss, torch.Tensor)
        loss.backward()
    return kept, alive.peak


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("blocks", [[], [0, 2]])
def test_predicted_bytes_are_those_of_a_computed_step(name: str, blocks: list[int]) -> None:
    kind, arguments = NETS[name]
    net = kind(**arguments, checkpoint_blocks=blocks).train()
    kept, peak = computed(net, torch.randn(2, 3, 128, 96))
    with torch.device("meta"):
        shapes = kind(**arguments, checkpoint_blocks=blocks).train()
    found = costs.step_memory(shapes, lambda x: list(shapes(x).values()), (2, 3, 128, 96))
    if name == "vit with relative positions":  # whose kernel works in blocks, with copies
        assert (found.kept, found.peak) == pytest.approx((kept, peak), rel=0.08)
    else:
        assert (found.kept, found.peak) == (kept, peak)


def test_bytes_of_a_product_by_hand() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Sigmoid())
    found = costs.step_memory(net, net, (10, 4))
    assert found.kept == 4 * 10 * 8  # the output, which its backward needs; x is held anyway
    assert found.flops == 2 * 2 * 10 * 4 * 8  # forward, and the gradient of the weight
    # at the most: output, gradients of output and input of the sigmoid, or then of the weight
    assert 4 * 2 * 10 * 8 < found.peak <= 4 * (3 * 10 * 8 + 4 * 8)


def test_recomputing_every_block_keeps_one_input_a_block() -> None:
    sizes = {}
    for blocks in ([], range(4)):
        with torch.device("meta"):
            net = ViT(**SMALL, checkpoint_blocks=blocks).train()
        found = costs.step_memory(net, lambda x, net=net: net(x)["last_feat"], (1, 3, 128, 128))
        sizes[len(blocks)] = found
    tokens = 4 * 16 * 16 * 64
    assert 4 * tokens <= sizes[4].kept < 7 * tokens  # inputs of four blocks, the map, positions
    assert sizes[0].kept > 3 * sizes[4].kept
    assert sizes[4].peak < sizes[0].peak
    assert sizes[4].flops > sizes[0].flops


def objects(count: int) -> Instances:
    torch.manual_seed(0)
    corners = 80 * torch.rand(count, 2)
    truth = Instances((128, 128), gt_boxes=Boxes(torch.cat([corners, corners + 40], 1)))
    truth.gt_classes = torch.zeros(count, dtype=torch.int64)
    truth.gt_masks = BitMasks(torch.ones(count, 128, 128, dtype=torch.bool))
    return truth


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_of_a_whole_detector_is_near_that_of_a_computed_step(
    dtype: torch.dtype | None,
) -> None:
    """Sampling, pooling and losses, which are left out, make the difference."""
    model = load_config(MINI / "mask_rcnn_vitdet_shapes.py").model
    predicted = costs.training_memory(model, batch=2, dtype=dtype)
    detector = build_model(model).train()
    images = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
    batch = [{"image": image, "instances": objects(8)} for image in images]
    held = [images, *detector.parameters(), *detector.buffers()]
    with EventStorage(), costs.LiveBytes(held) as alive:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            losses = detector(batch)
        sum(losses.values()).backward()
    assert predicted.peak == pytest.approx(alive.peak, rel=0.15)


def test_checkpointed_names_the_module() -> None:
    model = load_config(MINI / "mask_rcnn_vitdet_shapes.py").model
    assert costs.checkpointed(build_model(model, device="meta")) == "backbone.net"
    assert costs.checkpointed(nn.Linear(1, 1)) == ""
