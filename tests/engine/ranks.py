"""What the ranks of the tests run (`pair.in_pair`, `launch`, torchrun); importable by them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

import tiny_recipe
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils.tensorboard  # imported by the first run otherwise, in every process
from detectron2.config import LazyCall as L
from pair import as_new
from tiny_recipe import SIZE, TrainLoader, detector_node, draw, recipe
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.tensor import DTensor

from vitdet.config import build_model
from vitdet.data.augment import fixed_resize, large_scale_jitter
from vitdet.data.loaders import build_test_loader, build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import CLASSES, shapes_dataset
from vitdet.engine.checkpoints import usable
from vitdet.engine.launch import launch
from vitdet.engine.run import evaluate, train
from vitdet.engine.signals import Preempted, Watch
from vitdet.engine.trainer import Trainer
from vitdet.utils import files
from vitdet.utils.checks import InputError, exit_status
from vitdet.utils.distributed import barrier, gather_object, hold_back, is_main, rank, serve_parent

# --- steps ---------------------------------------------------------------------------------------


def train_even_batches(folder, *, resume=False, drop_path=0.0, blocks=(), poison_at=-1, **options):
    """Five steps of 8 images without stochastic depth, whatever the number of processes.

    AdamW divides a gradient by its own size. With the default eps of 1e-8 one that is rounding
    noise would move its weight by the learning rate, up or down as the order of a sum wills.
    """
    cfg = recipe(Path(folder), **{"num_images": 40, **options})
    cfg.model.backbone.net.update(drop_path_rate=drop_path, checkpoint_blocks=list(blocks))
    cfg.optimizer.eps = 1e-4
    cfg.dataloader.train.update(total_batch_size=8, poison_at=poison_at)
    train(cfg, resume=resume)


def bad_gradient_of_rank_1(_):
    """The loss is finite in both processes, the gradient of process 1 is not."""
    from test_bad_steps import batch_of, roots

    roots().step(batch_of(1.0 - rank()))


def count_reductions(folder):
    """Write how many gradient buckets a step sends, of whole batches and of batches in parts."""
    counts = []
    for accumulate in (1, 2):
        detector = build_model(detector_node())
        optimizer = torch.optim.SGD(detector.parameters(), lr=0.0)
        trainer = Trainer(detector, optimizer, lambda _: 1.0, accumulate=accumulate)
        sent = []

        def hook(sent, bucket):  # torch refuses annotations that are text
            sent.append(bucket.index())
            return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

        trainer.loss.register_comm_hook(sent, hook)
        trainer.run(iter([[draw(2 * rank()), draw(2 * rank() + 1)]]), 4)
        counts.append(len(sent))
    (Path(folder) / f"rank{rank()}.txt").write_text(" ".join(map(str, counts)))


# --- the project's own loader --------------------------------------------------------------------


def shapes_recipe(folder, shapes, **options):
    """The embedded data, one reading process, two images a step, a checkpoint after each."""
    settings = {"checkpoint_every": 2, "keep_checkpoints": 2, "eval_every": 40, "log_every": 1}
    settings |= {"best_metric": "bbox/AP50", "ema_decay": 0.9, "num_images": 100_000}
    cfg = recipe(folder, **{**settings, **options})
    cfg.model.roi_heads.num_classes = len(CLASSES)
    data = partial(L(shapes_dataset), root=str(shapes), size=SIZE)
    jitter = L(large_scale_jitter)(size=SIZE, min_scale=0.5, max_scale=1.5)
    cfg.dataloader.train = L(build_train_loader)(
        dataset=data(split="train", num_images=12),
        mapper=L(Mapper)(augmentations=jitter, is_train=True),
        total_batch_size=2,
        num_workers=1,
        seed="${train.seed}",
    )
    cfg.dataloader.test = L(build_test_loader)(
        dataset=data(split="val", num_images=2),
        mapper=L(Mapper)(augmentations=L(fixed_resize)(height=SIZE, width=SIZE), is_train=False),
        num_workers=1,
    )
    cfg.dataloader.evaluator = L(tiny_recipe.CountingEvaluator)(dataset="${..test.dataset}")
    return cfg


def train_shapes(folder, data, num_images, resume):
    """Train on drawn shapes, all switches on; write down every image: `images.<rank>.jsonl`."""
    original = Trainer.step

    def step(self, batch):
        with (Path(folder) / f"images.{rank()}.jsonl").open("a") as file:
            for record in batch:
                name = Path(record["file_name"]).name
                pixels = int(record["image"].long().sum())
                file.write(json.dumps([record["position"], name, pixels]) + "\n")
        original(self, batch)

    options = {"checkpoint_every": 8, "keep_checkpoints": 9, "accumulate": 2, "clip_grad_norm": 1.0}
    cfg = shapes_recipe(Path(folder), Path(data), num_images=num_images, **options)
    cfg.dataloader.train.update(total_batch_size=4, num_workers=2)
    Path(folder).mkdir(parents=True, exist_ok=True)
    Trainer.step = step
    try:
        train(cfg, resume=resume)
    finally:
        Trainer.step = original


def train_counted(folder, shapes, told, options):
    """Begin or go on; `told` counts this process's steps, and what it flushed to the disk."""
    as_new()
    os.setsid()  # with its helpers a process group of its own
    step, flush = Trainer.step, files._flush

    def counted_step(self, batch):
        step(self, batch)
        told[0] += 1

    def counted_flush(path):
        told[1] += 1
        time.sleep(0.005)  # a slow disk, so that a kill finds it busy
        flush(path)

    Trainer.step, files._flush = counted_step, counted_flush
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # it is in log.txt
        train(shapes_recipe(Path(folder), Path(shapes), **options), resume=True)


def told_in_an_evaluation(folder):
    """Get SIGTERM in both processes while they evaluate."""

    def told(*_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it should have left")

    tiny_recipe.CountingEvaluator.process = told
    with suppress(Preempted):
        train(recipe(Path(folder), eval_every=12))


# --- DDP and FSDP2 -------------------------------------------------------------------------------


def ddp_and_fsdp(folder):
    """Runs of both kinds, and resumes from one to the other; two test on three and two images."""
    root = Path(folder)
    defaults = tiny_recipe.Rectangles.__init__.__defaults__
    tiny_recipe.Rectangles.__init__.__defaults__ = (*defaults[:2], 5, *defaults[3:])
    even = partial(train_even_batches, num_images=32, checkpoint_every=16, ema_decay=0.9)
    even(root / "one", drop_path=0.3)
    even(root / "recomputed", drop_path=0.3, blocks=(0, 1))
    even(root / "free_ddp")
    kinds = {
        "ddp": {"clip_grad_norm": 0.1},
        "fsdp": {"clip_grad_norm": 0.1, "parallel": "fsdp", "accumulate": 2, "blocks": (0, 1)},
    }
    for name, options in kinds.items():
        even(root / name, **options)
        even(root / f"fp16_{name}", precision="fp16", num_images=16, parallel=name)
    for source, target in (("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")):
        resumed = root / f"{source}_to_{target}"
        if is_main():  # as the run was when it had seen 16 images
            resumed.mkdir()
            shutil.copy(root / source / "model_000000016.pth", resumed)
            (resumed / "last_checkpoint").write_text("model_000000016.pth\n")
        barrier()
        even(resumed, resume=True, **kinds[target])


def tuned(folder, start, parallel):
    """Train adapters; stop and go on."""
    options = {"tune": "lora", "init_checkpoint": start, "ema_decay": 0.5, "parallel": parallel}
    for num_images in (16, 32):
        train_even_batches(folder, num_images=num_images, resume=num_images > 16, **options)


class Gathered(tiny_recipe.CountingEvaluator):
    """Counts the images and scores of all processes, in the main one."""

    def evaluate(self):
        parts = gather_object((self.images, self.scores))
        self.images, self.scores = (sum(part[place] for part in parts) for place in (0, 1))
        return super().evaluate() if is_main() else {}


def batch_norm(folder):
    """Train with BatchNorm, as copies and sharded, and evaluate the last file once more.

    Every process writes down the buffers of what it would save.
    """
    original = Trainer.state_dict

    def state_dict(self):
        state = original(self)
        names = {name for name, _ in self.detector.named_buffers()}
        found = {
            part: {
                name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
                for name, value in state[part].items()
                if name in names
            }
            for part in ("model", "ema_state")
        }
        torch.save(found, Path(self.folder) / f"{self.images_seen}_rank{rank()}.pth")
        return state

    Trainer.state_dict = state_dict
    for parallel in ("ddp", "fsdp"):
        root = Trainer.folder = Path(folder) / parallel
        cfg = recipe(root, ema_decay=0.5, checkpoint_every=12, eval_every=12, parallel=parallel)
        cfg.model.backbone.net.update(
            **{"global_block_indexes": [], "residual_block_indexes": [0, 1]},
            **{"propagation": "basic", "propagation_norm": "BN"},
        )
        cfg.dataloader.evaluator = L(Gathered)(dataset="${..test.dataset}")
        trained = train(cfg)
        for which in ("model", "ema"):
            cfg.train.eval_weights = which
            again = evaluate(cfg, resume=True)
            if is_main():
                (root / f"{which}.json").write_text(json.dumps([trained, again]))


# --- ends ----------------------------------------------------------------------------------------


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


def report_usable(folder):
    """Write down what this process would go on from, and what it knows about the others."""
    try:
        found = usable(Path(folder))
        text = "none" if found is None else f"{found.path.name} {found.content['images_seen']}"
    except InputError as error:
        text = str(error)
    (Path(folder) / f"rank{rank()}.txt").write_text(text)


def end_in(how, folder):
    """Let one of two ranks end in some way while the other waits."""
    (Path(folder) / f"pid{rank()}").write_text(str(os.getpid()))
    barrier()
    launcher = multiprocessing.parent_process().pid
    if rank() == 1:
        if how == "error":
            raise InputError("image x.jpg: expected a JPEG, got text. Remove it.")
        if how == "bug":
            raise ZeroDivisionError("a bug")
        os.kill(launcher if how == "kill the launcher" else os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def train_config(cfg):
    """Train a recipe that is there."""
    train(cfg, resume=True)


def launched(function, args, told):
    """Launch two forked ranks from this forked process, and end with the status of a command."""
    as_new()
    os.setpgrp()
    mp.start_processes = partial(_start, mp.start_processes)
    sys.stderr = Path(told).open("w", buffering=1)  # noqa: SIM115
    sys.exit(exit_status(lambda: launch(function, 2, args=args) or 0))


def _start(start, *args, start_method, **options):
    return start(*args, start_method="fork", **options)


def stuck(folder, seconds, told):
    """Ask for a batch that does not come, or comes later than the limit in none of its steps."""
    sys.stderr = Path(told).open("w", buffering=1)  # noqa: SIM115
    watch = Watch(Path(folder), 0.5)

    def batches():
        yield from "abc"
        time.sleep(seconds)
        yield "d"

    for _ in watch.over(batches()):
        watch.after_step(None)
        time.sleep(0.9)  # an evaluation has no limit
    watch.stop()
    (Path(folder) / "done").touch()


def helper(pipe, threads):
    """Serve the parent, with a thread as the import of a BLAS starts one; answer in the pipe."""
    if threads:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    serve_parent()
    while True:
        pipe.send(os.getpid())
        pipe.recv()


def parent_of_helpers(method, told):
    """Start helpers; they outlive signals but for those of this process. Then be killed."""
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["ranks"])
    pipes, helpers = [], []
    with hold_back():
        for threads in (False, True):
            ours, theirs = context.Pipe()
            helpers.append(context.Process(target=helper, args=(theirs, threads), daemon=True))
            helpers[-1].start()
            pipes.append(ours)
    pids = [pipe.recv() for pipe in pipes]
    sender = context.Process(target=send, args=(pids, (signal.SIGTERM, signal.SIGUSR1)))
    sender.start()
    sender.join()
    send(pids, (signal.SIGUSR1, signal.SIGINT))
    for pipe in pipes:
        pipe.send("are you there?")
        pipe.recv()
    helpers[1].terminate()
    helpers[1].join()
    Path(told).write_text(f"{pids[0]} {helpers[1].exitcode}")
    os.kill(os.getpid(), signal.SIGKILL)


def send(pids, numbers):
    """Send signals to processes."""
    for pid in pids:
        for number in numbers:
            os.kill(pid, number)
