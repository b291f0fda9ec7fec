"""What the processes of the tests of torchrun, FSDP2 and the first step run; importable by them."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import tiny_recipe
import torch
from detectron2.config import LazyCall as L
from detectron2.structures import Boxes, Instances
from tiny_recipe import TrainLoader, recipe

from vitdet.engine.launch import PREEMPTED_STATUS, launch
from vitdet.engine.parallel import whole
from vitdet.engine.run import evaluate, train
from vitdet.engine.trainer import Trainer
from vitdet.evaluation import CocoEvaluator
from vitdet.utils.distributed import barrier, gather_object, is_main, rank


class MortalLoader(TrainLoader):
    """Rank 1 is killed when it asks for the image `dies_at`, once in the life of `folder`."""

    def __init__(self, dataset, total_batch_size, folder, dies_at, seed=0, start=0):
        super().__init__(dataset, total_batch_size, seed, start)
        self.folder, self.dies_at = Path(folder), dies_at

    def __iter__(self):
        (self.folder / f"pid{os.getpid()}").touch()
        struck = self.folder / "struck"
        for number, batch in enumerate(super().__iter__()):
            now = self.start + number * self.total == self.dies_at
            if now and rank() == 1 and not struck.exists():
                struck.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def even(folder: Path, *, resume: bool = False, drop_path: float = 0.0, blocks=(), **options):
    """Train with even steps, as `workers.train_even_batches`; 5 test images for 2 processes."""
    tiny_recipe.Rectangles.__init__.__defaults__ = (*_DEFAULTS[:2], 5, *_DEFAULTS[3:])
    options = {"num_images": 32, "checkpoint_every": 16, "ema_decay": 0.9, **options}
    cfg = recipe(folder, **options)
    cfg.model.backbone.net.drop_path_rate = drop_path
    cfg.model.backbone.net.checkpoint_blocks = list(blocks)
    cfg.optimizer.eps = 1e-4
    cfg.dataloader.train.total_batch_size = 8
    train(cfg, resume=resume)


_DEFAULTS = tiny_recipe.Rectangles.__init__.__defaults__


def back_to(source: Path, images: int, folder: Path) -> None:
    """Make a folder that looks as the run `source` did when it was ended after some images."""
    if is_main():
        name = f"model_{images:09d}.pth"
        folder.mkdir()
        shutil.copy(source / name, folder)
        (folder / "last_checkpoint").write_text(f"{name}\n")
    barrier()


def ddp_and_fsdp(folder: str) -> None:
    """Runs of both kinds, and resumes from one to the other."""
    root = Path(folder)
    even(root / "ddp")
    even(root / "fsdp", parallel="fsdp")
    even(root / "clipped_ddp", clip_grad_norm=0.1)
    even(root / "clipped_fsdp", parallel="fsdp", clip_grad_norm=0.1, accumulate=2, blocks=(0, 1))
    even(root / "fp16_ddp", precision="fp16")
    even(root / "fp16_fsdp", precision="fp16", parallel="fsdp")
    for source, target in (("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")):
        resumed = root / f"{source}_to_{target}"
        back_to(root / source, 16, resumed)
        even(resumed, resume=True, parallel=target)


def recomputed(folder: str) -> None:
    """Stochastic depth with and without recomputed blocks."""
    even(Path(folder) / "kept", drop_path=0.3)
    even(Path(folder) / "recomputed", drop_path=0.3, blocks=(0, 1))
    even(Path(folder) / "without_depth")


class Gathered(tiny_recipe.CountingEvaluator):
    """Counts the images and scores of all processes, in the main one."""

    def evaluate(self) -> dict:
        parts = gather_object((self.images, self.scores))
        self.images, self.scores = (sum(part[place] for part in parts) for place in (0, 1))
        return super().evaluate() if is_main() else {}


def batch_norm(folder: str) -> None:
    """Train with BatchNorm, as copies and shared out, and evaluate the last file once more.

    Every process writes down the buffers of what it would save.
    """
    collect_results(folder)
    original = Trainer.state_dict

    def state_dict(self: Trainer) -> dict:
        state = original(self)
        kept = {part: whole(state[part]) for part in ("model", "ema_state")}
        names = [name for name, _ in self.detector.named_buffers() if name in kept["model"]]
        found = {part: {name: kept[part][name] for name in names} for part in kept}
        torch.save(found, Path(self.folder) / f"{self.images_seen}_rank{rank()}.pth")
        return state

    Trainer.state_dict = state_dict
    for parallel in ("ddp", "fsdp"):
        root = Path(folder) / parallel
        Trainer.folder = root
        cfg = recipe(root, ema_decay=0.5, checkpoint_every=12, eval_every=12, parallel=parallel)
        cfg.model.backbone.net.update(
            global_block_indexes=[],
            residual_block_indexes=[0, 1],
            propagation="basic",
            propagation_norm="BN",
        )
        cfg.dataloader.evaluator = L(Gathered)(dataset="${..test.dataset}")
        trained = train(cfg)
        for which in ("model", "ema"):
            cfg.train.eval_weights = which
            again = evaluate(cfg, resume=True)
            if is_main():
                text = json.dumps([trained, again])
                (root / f"{which}.json").write_text(text)


def collect_results(folder: str) -> None:
    """Evaluate four images in two processes, and write down whose results each one holds."""
    content = {"categories": [{"id": 1, "name": "a"}], "annotations": []}
    content["images"] = [{"id": n, "height": 8, "width": 8} for n in range(4)]
    file = Path(folder) / f"truth{rank()}.json"
    file.write_text(json.dumps(content))
    records = [{"image_id": n} for n in range(4)]
    parts = {"name": "four", "class_names": ("a",), "class_ids": (1,), "records": records}
    data = SimpleNamespace(**parts, json_file=file, style="coco", truth=None)
    evaluator = CocoEvaluator(data)
    for number in range(rank(), 4, 2):
        found = Instances((8, 8), pred_boxes=Boxes(torch.ones(3, 4)), scores=torch.ones(3))
        found.pred_classes = torch.zeros(3, dtype=torch.int64)
        evaluator.process([{"image_id": number}], [{"instances": found}])
    seen = []
    evaluator._score = lambda truth, results, kind: seen.append(results) or {}
    evaluator.evaluate()
    dicts = [each for each in gc.get_objects() if type(each) is dict]
    held = [each["image_id"] for each in dicts if {"score", "image_id"} <= each.keys()]
    (Path(folder) / f"held{rank()}.json").write_text(json.dumps([sorted(set(held)), len(held)]))


class WaitingLoader(TrainLoader):
    """Waits before the batch at image 12 until a file `go_on` is in `folder` or a signal came."""

    def __init__(self, dataset, total_batch_size, folder, seed=0, start=0):
        super().__init__(dataset, total_batch_size, seed, start)
        self.folder = Path(folder)

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if self.start + number * self.total == 8 and not (self.folder / "go_on").exists():
                told = signal.getsignal(signal.SIGTERM).__self__  # notice of this training
                (self.folder / f"waits{os.getpid()}").touch()
                while told.signal is None:
                    time.sleep(0.05)
            yield batch


def waiting_in_the_middle(args: argparse.Namespace) -> None:
    """Train, waiting in the third step for a signal."""
    folder = Path(args.folder)
    cfg = recipe(folder / "out")
    cfg.dataloader.train = L(WaitingLoader)(
        dataset=L(tiny_recipe.rectangles)(), total_batch_size=4, folder=str(folder), seed=3
    )
    train(cfg, resume=args.resume)


def launch_alone(folder: Path) -> None:
    """Do the same in two processes that nobody disturbs."""
    args = argparse.Namespace(folder=str(folder), resume=False)
    launch(waiting_in_the_middle, 2, args=(args,))


def leave_when_told(folder: str) -> None:
    """Leave with the status of a preempted run once SIGTERM has come, which rank 0 asks for."""
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    (Path(folder) / f"pid{rank()}").write_text(str(os.getpid()))
    barrier()
    if rank() == 0:
        os.kill(os.getppid(), signal.SIGTERM)  # the launcher passes it on
    told.wait()
    (Path(folder) / f"left{rank()}").touch()
    sys.exit(PREEMPTED_STATUS)
