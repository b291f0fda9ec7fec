"""What processes started by the tests of the step run; importable by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import LazyCall as L
from tiny_recipe import SIZE, detector_node, draw, recipe, rectangles
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from workers import train_even_batches

from vitdet.config import build_model
from vitdet.data.augment import large_scale_jitter
from vitdet.data.loaders import build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import CLASSES, shapes_dataset
from vitdet.engine.run import train
from vitdet.engine.trainer import Trainer
from vitdet.utils.distributed import rank


def train_in_parts(folder: str, accumulate: int, parallel: str) -> None:
    """As `train_even_batches`, every process taking its images in parts."""
    train_even_batches(folder, accumulate=accumulate, parallel=parallel)


def count_reductions(folder: str) -> None:
    """Write how many gradient buckets a step sends, of whole batches and of batches in parts."""
    counts = []
    for accumulate in (1, 2):
        detector = build_model(detector_node())
        optimizer = torch.optim.SGD(detector.parameters(), lr=0.0)
        trainer = Trainer(detector, optimizer, lambda _: 1.0, accumulate=accumulate)
        sent: list[int] = []

        def hook(sent, bucket):  # torch refuses annotations that are text
            sent.append(bucket.index())
            return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

        trainer.loss.register_comm_hook(sent, hook)
        trainer.run(iter([[draw(2 * rank()), draw(2 * rank() + 1)]]), 4)
        counts.append(len(sent))
    (Path(folder) / f"rank{rank()}.txt").write_text(" ".join(map(str, counts)))


def shapes_recipe(folder: Path, data: Path, **train_options: Any) -> Any:
    """The tiny detector on drawn shapes through the project's own loader, all switches on."""
    cfg = recipe(
        folder,
        **{
            "num_images": 24,
            "checkpoint_every": 8,
            "log_every": 2,
            "ema_decay": 0.75,
            "accumulate": 2,
            "clip_grad_norm": 1.0,
            **train_options,
        },
    )
    cfg.dataloader.train = L(build_train_loader)(
        dataset=L(shapes_dataset)(root=str(data), split="train", num_images=10, size=SIZE),
        mapper=L(Mapper)(
            augmentations=L(large_scale_jitter)(size=SIZE, min_scale=0.5, max_scale=1.5),
            is_train=True,
        ),
        total_batch_size=4,
        num_workers=2,
        seed="${train.seed}",
    )
    cfg.dataloader.test.dataset = L(rectangles)(class_names=list(CLASSES))
    return cfg


def train_shapes(folder: str, data: str, resume: bool, **train_options: Any) -> None:
    """Train, and write down every image that is trained on: `images.<rank>.jsonl`."""
    original = Trainer.step

    def step(self: Trainer, batch: list) -> None:
        with (Path(folder) / f"images.{rank()}.jsonl").open("a") as file:
            for record in batch:
                name = Path(record["file_name"]).name
                pixels = int(record["image"].long().sum())
                file.write(json.dumps([record["position"], name, pixels]) + "\n")
        original(self, batch)

    Path(folder).mkdir(parents=True, exist_ok=True)
    Trainer.step = step
    try:
        train(shapes_recipe(Path(folder), Path(data), **train_options), resume=resume)
    finally:
        Trainer.step = original


def train_shapes_until(folder: str, data: str, num_images: int, resume: bool) -> None:
    """As `train_shapes`, to a number of images, without a change of the lr at the end."""
    train_shapes(folder, data, resume, num_images=num_images)


def train_with_poison(folder: str, position: int, parallel: str = "ddp") -> None:
    """Five steps of 8 images, one of which is not a number, without stochastic depth."""
    cfg = recipe(Path(folder), num_images=40, on_bad_step="skip", parallel=parallel)
    cfg.model.backbone.net.drop_path_rate = 0.0
    cfg.optimizer.eps = 1e-4
    cfg.dataloader.train.update(total_batch_size=8, poison_at=position)
    train(cfg)


def bad_gradient_of_rank_1(_: str) -> None:
    """The loss is finite in both processes, the gradient of process 1 is not."""
    from test_bad_steps import batch_of, roots

    roots().step(batch_of(1.0 - rank()))
