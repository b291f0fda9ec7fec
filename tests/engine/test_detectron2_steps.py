"""Twenty steps of `engine.run.train` against detectron2's own loop, in float64: the same weights.

Theirs: ViT, SimpleFeaturePyramid, DatasetMapper, get_default_optimizer_params, SimpleTrainer and
LRScheduler. The images come in the order of our stream, and each is augmented and sampled under the
seed that ours has for it.
"""

import copy
import sys
from functools import partial

import pytest
import tiny_recipe
import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.data.dataset_mapper import DatasetMapper
from detectron2.data.datasets.coco import load_coco_json
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import LRScheduler
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT, get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from tiny_recipe import SIZE, detector_node, recipe
from torch import nn

from vitdet import checkpoint
from vitdet.config import instantiate
from vitdet.data.augment import large_scale_jitter
from vitdet.data.loaders import ImageStream, build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import CLASSES, shapes_dataset
from vitdet.engine.run import train
from vitdet.engine.trainer import Trainer
from vitdet.utils.env import random_state, seed_all, seed_from

STEPS, WARM_UP, MILESTONES, LR, SEED = 20, 5, [12, 16], 1e-3, 3


@pytest.fixture
def float64(monkeypatch):
    """Let detectron2 and torchvision compute in float64 where they ask for float32."""
    roi_align = sys.modules["detectron2.layers.roi_align"]
    aligned, nms = roi_align.roi_align, torchvision.ops.boxes.nms
    entropy = F.binary_cross_entropy_with_logits
    for owner, name, own in (
        (roi_align, "roi_align", lambda x, boxes, *a: aligned(x, boxes.to(x.dtype), *a)),
        (torchvision.ops.boxes, "nms", lambda b, s, t: nms(b.float(), s.float(), t)),
        (F, "binary_cross_entropy_with_logits", lambda x, y, **k: entropy(x, y.to(x.dtype), **k)),
    ):
        monkeypatch.setattr(owner, name, own)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def theirs():
    node = detector_node()
    ours = ("checkpoint_blocks", "norm_eps")
    net = {key: value for key, value in node.backbone.net.items() if key not in ours}
    blocks = range(net["depth"])
    seen = net.pop("global_block_indexes")
    net["window_block_indexes"] = [block for block in blocks if block not in seen]
    node.roi_heads.num_classes = len(CLASSES)
    node.backbone._target_ = SimpleFeaturePyramid
    net |= {"_target_": ViT, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}  # as in its recipes
    node.backbone.net = net
    with random_state(11):
        model = instantiate(node).train()
    for parameter in model.parameters():  # position tables begin at 0
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def our_steps(folder, monkeypatch):
    states, rates = [], []
    step = Trainer.step

    def recorded(self, batch):
        step(self, batch)
        states.append({name: value.clone() for name, value in self.detector.state_dict().items()})
        lr = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        rates.append({name: lr[id(p)] for name, p in self.detector.named_parameters()})

    monkeypatch.setattr(Trainer, "step", recorded)
    cfg = recipe(folder / "out")
    cfg.model = detector_node()
    cfg.dataloader.train = L(build_train_loader)(
        dataset=L(shapes_dataset)(
            root=str(folder / "data"), split="train", num_images=6, size=SIZE
        ),
        mapper=L(Mapper)(augmentations=L(large_scale_jitter)(size=SIZE), is_train=True, fast=False),
        total_batch_size=1,
        num_workers=0,
        seed="${train.seed}",
    )
    cfg.optimizer.lr = LR
    cfg.schedule.update(num_images=STEPS, milestones=MILESTONES, warmup=WARM_UP)
    cfg.train.update(num_images=STEPS, seed=SEED, init_checkpoint=str(folder / "init.pth"))
    cfg.dataloader.test = L(tiny_recipe.TestLoader)(
        dataset=L(tiny_recipe.Rectangles)(class_names=CLASSES, num_images=1)
    )
    cfg.dataloader.evaluator = L(tiny_recipe.CountingEvaluator)(dataset="${..test.dataset}")
    train(cfg)
    return states, rates


class Recorded(HookBase):
    def __init__(self):
        self.states = []
        self.rates = []

    def before_step(self):
        groups = self.trainer.optimizer.param_groups
        lr = {id(p): group["lr"] for group in groups for p in group["params"]}
        self.rates.append({name: lr[id(p)] for name, p in self.trainer.model.named_parameters()})

    def after_step(self):
        state = self.trainer.model.state_dict()
        self.states.append({name: value.clone() for name, value in state.items()})


class Images:
    """Ours in our order: batches of one."""

    def __init__(self, records):
        self.records = records
        size = {"target_height": SIZE, "target_width": SIZE}
        jitter = [
            T.RandomFlip(horizontal=True),
            T.ResizeScale(min_scale=0.1, max_scale=2.0, **size),
            T.FixedSizeCrop(crop_size=(SIZE, SIZE), pad=False),
        ]
        masks = {"use_instance_mask": True, "instance_mask_format": "bitmask"}
        self.mapper = DatasetMapper(
            is_train=True, augmentations=jitter, image_format="RGB", recompute_boxes=True, **masks
        )

    def __iter__(self):
        for position, index in ImageStream(len(self.records), SEED).positions():
            seed_all(seed_from(SEED, position))
            image = self.mapper(copy.deepcopy(self.records[index]))
            seed_all(
                seed_from(SEED, position)
            )  # the proposals of an image are sampled under it too
            yield [image]


class Loop(SimpleTrainer):
    def _write_metrics(self, *_, **__):
        pass


def their_steps(model, data):
    records = load_coco_json(
        str(data.json_file), str(data.json_file.parent / "images"), "their_steps"
    )
    rate = partial(get_vit_lr_decay_rate, num_layers=2, lr_decay_rate=0.7)
    groups = get_default_optimizer_params(
        model,
        base_lr=LR,
        weight_decay_norm=0.0,
        lr_factor_func=rate,
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
    steps = MultiStepParamScheduler(
        values=[1.0, 0.1, 0.01], milestones=MILESTONES, num_updates=STEPS
    )
    schedule = WarmupParamScheduler(steps, warmup_factor=0.001, warmup_length=WARM_UP / STEPS)
    recorded = Recorded()
    loop = Loop(model, Images(records), optimizer)
    loop.register_hooks([recorded, LRScheduler(scheduler=schedule)])
    loop.train(0, STEPS)
    return recorded


def test_twenty_steps_are_detectron2s(tmp_path, monkeypatch, float64):
    data = shapes_dataset(tmp_path / "data", "train", num_images=6, size=SIZE)
    model = theirs()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.write(tmp_path / "init.pth", {"model": first})
    states, rates = our_steps(tmp_path, monkeypatch)
    expected = their_steps(model, data)
    assert len(states) == len(expected.states) == STEPS
    for mine, lr in zip(rates, expected.rates, strict=True):
        assert mine == pytest.approx(lr, rel=1e-12)
    for mine, state in zip(states, expected.states, strict=True):
        assert mine.keys() == state.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=1e-12, msg=name)
    moved = {name: (value - first[name]).abs().max().item() for name, value in states[-1].items()}
    assert min(value for name, value in moved.items() if "pixel" not in name) > 1e-5
