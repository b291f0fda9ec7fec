"""A real detector and drawn data, small enough for a step in 0.1 s; new processes import it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances
from omegaconf import OmegaConf

from vitdet.config import build_model, save_config
from vitdet.optim import MultiStep, adamw
from vitdet.utils.distributed import rank, world_size
from vitdet.utils.env import random_state, seed_all, seed_from

SIZE = 64
MODELS = Path(__file__).resolve().parents[2] / "configs/common/models"
MASK_RCNN = LazyConfig.load(str(MODELS / "mask_rcnn_vitdet.py"), "model")
cascade = LazyConfig.load(str(MODELS / "cascade.py"), "cascade")


@dataclass
class Rectangles:
    """Coloured rectangles, drawn from (seed, position)."""

    name: str = "rectangles"
    class_names: tuple[str, ...] = ("dark", "light")
    num_images: int = 6
    records: list = field(default_factory=list)


def rectangles(class_names=("dark", "light"), name="rectangles"):
    return Rectangles(name=name, class_names=tuple(class_names))


def draw(position):
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
    def __init__(self, dataset, total_batch_size, seed=0, start=0, poison_at=-1):
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
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        for index in range(rank(), self.dataset.num_images, world_size()):
            yield [draw(10_000 + index)]


class CountingEvaluator:
    """ "AP" is the number of images seen; scores go into a checksum."""

    def __init__(self, dataset):
        self.dataset = dataset

    def reset(self):
        self.images, self.scores = 0, 0.0

    def process(self, inputs, outputs):
        self.images += len(inputs)
        self.scores += sum(float(o["instances"].scores.numpy().sum()) for o in outputs)

    def evaluate(self):
        values = {"AP": float(self.images), "AP50": self.scores, "APs": float("nan")}
        found = {"over_all": self.images / 100, "by_class": {}}
        per_class = dict.fromkeys(self.dataset.class_names, 1.0)
        return {"bbox": {**values, "per_class": per_class, "thresholds": found}}


def detector_node(drop_path_rate=0.0, checkpoint_blocks=()):
    """The Mask R-CNN of the recipes, without norms in its heads."""
    node = deepcopy(MASK_RCNN)
    node.update(pixel_mean=[120.0] * 3, pixel_std=[60.0] * 3)
    node.backbone.update(in_feature="last_feat", out_channels=32, square_pad=SIZE)
    node.backbone.net.update(
        **dict(img_size=SIZE, pretrain_img_size=SIZE, embed_dim=32, depth=2, num_heads=2),
        **dict(window_size=2, global_block_indexes=(1,), drop_path_rate=drop_path_rate),
        checkpoint_blocks=checkpoint_blocks,
    )
    rpn, heads = node.proposal_generator, node.roi_heads
    rpn.head.update(in_channels=32, conv_dims=[-1])
    rpn.anchor_generator.sizes = [[8], [16], [32], [48], [64]]
    rpn.update(batch_size_per_image=32, pre_nms_topk=(100, 50), post_nms_topk=(50, 20))
    heads.update(num_classes=2, batch_size_per_image=16)
    heads.box_pooler.output_size = heads.mask_pooler.output_size = 4
    shape = L(ShapeSpec)(channels=32, height=4, width=4)
    heads.box_head.update(input_shape=shape, conv_dims=[], fc_dims=[32], conv_norm="")
    heads.mask_head.update(input_shape=shape, conv_dims=[16, 16], conv_norm="")
    heads.box_predictor.update(test_score_thresh=0.0, test_topk_per_image=10)
    heads.box_predictor.input_shape.channels = 32
    return node


def tiny_detector(change=None, **options):
    """The detector for training with weights that are always the same, its node changed before."""
    node = detector_node(**options)
    if change is not None:
        change(node)
    seed_all(0)
    return build_model(node).train()


def recipe(output_dir, **train):
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


def write_recipe(path, output_dir, **train):
    """Write the recipe to a .yaml; return the path of one in Python beside it that reads it.

    The parts are the tests' own, and a .yaml alone may name those of configs/ only.
    """
    return own_recipe(recipe(output_dir, **train), path)


def own_recipe(cfg, path):
    """Do so with a recipe that is there."""
    save_config(cfg, path)
    script = path.with_suffix(".py")
    script.write_text(
        "from vitdet.config import KEYS, load_config\n"
        f"_cfg = load_config({str(path)!r}, trust=True)\n"
        "model, dataloader, optimizer, schedule, train = (_cfg[key] for key in KEYS)\n"
    )
    return script
