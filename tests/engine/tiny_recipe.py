"""A real detector and drawn data, small enough for a step in 0.1 s; new processes import it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.structures import BitMasks, Boxes, Instances
from omegaconf import DictConfig, OmegaConf

from vitdet.backbones.vit import ViT
from vitdet.config import save_config
from vitdet.optim import MultiStep, adamw
from vitdet.pyramid import SimpleFeaturePyramid
from vitdet.utils.distributed import rank, world_size
from vitdet.utils.env import random_state, seed_from

SIZE = 64


@dataclass
class Rectangles:
    """Coloured rectangles, drawn from (seed, position)."""

    name: str = "rectangles"
    class_names: tuple[str, ...] = ("dark", "light")
    num_images: int = 6
    records: list = field(default_factory=list)


def rectangles(
    class_names: tuple[str, ...] = ("dark", "light"), name: str = "rectangles"
) -> Rectangles:
    return Rectangles(name=name, class_names=tuple(class_names))


def draw(position: int) -> dict:
    generator = np.random.default_rng(position)
    image = generator.integers(100, 120, (3, SIZE, SIZE), dtype=np.uint8)
    boxes, classes, masks = [], [], []
    for _ in range(int(generator.integers(1, 4))):
        x, y = generator.integers(0, SIZE // 2, 2)
        w, h = generator.integers(10, SIZE // 2, 2)
        label = int(generator.integers(0, 2))
        image[:, y : y + h, x : x + w] = 20 + 200 * label
        mask = np.zeros((SIZE, SIZE), bool)
        mask[y : y + h, x : x + w] = True
        boxes.append([x, y, x + w, y + h])
        classes.append(label)
        masks.append(mask)
    truth = Instances((SIZE, SIZE))
    truth.gt_boxes = Boxes(torch.tensor(np.array(boxes), dtype=torch.float32))
    truth.gt_classes = torch.tensor(classes)
    truth.gt_masks = BitMasks(torch.from_numpy(np.stack(masks)))
    return {
        "image": torch.from_numpy(image),
        "instances": truth,
        "height": SIZE,
        "width": SIZE,
        "image_id": position,
        "file_name": f"rectangle_{position}.jpg",
        "position": position,
    }


class TrainLoader:
    def __init__(
        self,
        dataset: Rectangles,
        total_batch_size: int,
        seed: int = 0,
        start: int = 0,
        poison_at: int = -1,
    ) -> None:
        self.total, self.seed, self.start, self.poison_at = total_batch_size, seed, start, poison_at

    def __iter__(self):
        position, share = self.start, self.total // world_size()
        while True:
            first = position + rank() * share
            batch = []
            for index in range(first, first + share):
                with random_state(seed_from(self.seed, index)):
                    record = draw(index)
                    if index == self.poison_at:
                        record["image"] = record["image"].float() * float("nan")
                    batch.append(record)
            yield batch
            position += self.total


class TestLoader:
    def __init__(self, dataset: Rectangles) -> None:
        self.dataset = dataset

    def __iter__(self):
        for index in range(rank(), self.dataset.num_images, world_size()):
            yield [draw(10_000 + index)]


class CountingEvaluator:
    """ "AP" is the number of images seen; scores go into a checksum."""

    def __init__(self, dataset: Rectangles) -> None:
        self.dataset = dataset

    def reset(self) -> None:
        self.images, self.scores = 0, 0.0

    def process(self, inputs: list, outputs: list) -> None:
        self.images += len(inputs)
        self.scores += sum(float(o["instances"].scores.numpy().sum()) for o in outputs)

    def evaluate(self) -> dict:
        values = {"AP": float(self.images), "AP50": self.scores, "APs": float("nan")}
        found = {"over_all": self.images / 100, "by_class": {}}
        per_class = dict.fromkeys(self.dataset.class_names, 1.0)
        return {"bbox": {**values, "per_class": per_class, "thresholds": found}}


def pooler():
    return L(ROIPooler)(
        output_size=4,
        scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32),
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )


def matcher(thresholds: list[float], labels: list[int], low: bool):
    return L(Matcher)(thresholds=thresholds, labels=labels, allow_low_quality_matches=low)


def detector_node(drop_path_rate: float = 0.0, checkpoint_blocks: tuple[int, ...] = ()):
    net = L(ViT)(
        **dict(img_size=SIZE, patch_size=16, embed_dim=32, depth=2, num_heads=2, window_size=2),
        **dict(global_block_indexes=(1,), use_rel_pos=True, pretrain_img_size=SIZE),
        drop_path_rate=drop_path_rate,
        checkpoint_blocks=checkpoint_blocks,
    )
    backbone = L(SimpleFeaturePyramid)(
        net=net,
        out_channels=32,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=L(LastLevelMaxPool)(),
        square_pad=SIZE,
    )
    rpn = L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels=32, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[8], [16], [32], [48], [64]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=matcher([0.3, 0.7], [0, -1, 1], True),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=32,
        positive_fraction=0.5,
        pre_nms_topk=(100, 50),
        post_nms_topk=(50, 20),
        nms_thresh=0.7,
    )
    shape = L(ShapeSpec)(channels=32, height=4, width=4)
    roi_heads = L(StandardROIHeads)(
        num_classes=2,
        batch_size_per_image=16,
        positive_fraction=0.25,
        proposal_matcher=matcher([0.5], [0, 1], False),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=pooler(),
        box_head=L(FastRCNNConvFCHead)(input_shape=shape, conv_dims=[], fc_dims=[32]),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=32),
            test_score_thresh=0.0,
            test_topk_per_image=10,
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
        ),
        mask_in_features=["p2", "p3", "p4", "p5"],
        mask_pooler=pooler(),
        mask_head=L(MaskRCNNConvUpsampleHead)(
            input_shape=shape, num_classes="${..num_classes}", conv_dims=[16, 16]
        ),
    )
    return L(GeneralizedRCNN)(
        backbone=backbone,
        proposal_generator=rpn,
        roi_heads=roi_heads,
        pixel_mean=[120.0, 120.0, 120.0],
        pixel_std=[60.0, 60.0, 60.0],
        input_format="RGB",
    )


def recipe(output_dir: Path, **train):
    """The whole recipe: 24 images, 4 a step."""
    milestones = [16] if train.get("num_images", 24) >= 16 else []
    return OmegaConf.create(
        {
            "model": detector_node(drop_path_rate=0.2),
            "dataloader": {
                "train": L(TrainLoader)(
                    dataset=L(rectangles)(), total_batch_size=4, seed="${train.seed}"
                ),
                "test": L(TestLoader)(dataset=L(rectangles)()),
                "evaluator": L(CountingEvaluator)(dataset="${..test.dataset}"),
            },
            "optimizer": L(adamw)(lr=1e-3, layer_decay_rate=0.7),
            "schedule": L(MultiStep)(
                num_images=train.get("num_images", 24), milestones=milestones, warmup=4
            ),
            "train": {
                **{"output_dir": str(output_dir), "seed": 3, "device": "cpu", "precision": "fp32"},
                **{"num_images": 24, "checkpoint_every": 0, "eval_every": 0, "log_every": 2},
                "ddp": {},
                **train,
            },
        },
        flags={"allow_objects": True},
    )


def write_recipe(path: Path, output_dir: Path, **train) -> Path:
    """Write the recipe to a .yaml; return the path of one in Python beside it that reads it.

    The parts are the tests' own, and a .yaml alone may name those of configs/ only.
    """
    return own_recipe(recipe(output_dir, **train), path)


def own_recipe(cfg: DictConfig, path: Path) -> Path:
    """Do so with a recipe that is there."""
    save_config(cfg, path)
    script = path.with_suffix(".py")
    script.write_text(
        "from vitdet.config import KEYS, load_config\n"
        f"_cfg = load_config({str(path)!r}, trust=True)\n"
        "model, dataloader, optimizer, schedule, train = (_cfg[key] for key in KEYS)\n"
    )
    return script
