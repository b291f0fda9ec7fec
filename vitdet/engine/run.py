"""Train and evaluate what a config describes. `train_net.py` and the tests come in here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vitdet import checkpoint
from vitdet.config import build_model, set_num_classes
from vitdet.engine import record
from vitdet.engine.bad_steps import BadSteps
from vitdet.engine.checkpoints import FINAL, LAST, Checkpoints, Found, last_checkpoint, usable
from vitdet.engine.compiled import compile_blocks
from vitdet.engine.dry_run import try_steps
from vitdet.engine.freezing import freeze_blocks
from vitdet.engine.hooks import RECORD, Evaluations, Record
from vitdet.engine.inference import Results, TestSet, build, build_dataset, flatten
from vitdet.engine.length import set_length
from vitdet.engine.logs import logging_to
from vitdet.engine.metrics import Metrics, Progress, open_metrics
from vitdet.engine.parallel import shard
from vitdet.engine.recipe import check_batch, check_recipe, selection_of
from vitdet.engine.selection import Selection
from vitdet.engine.signals import Preemption, noticed
from vitdet.engine.trainer import Trainer
from vitdet.engine.watch import Watch
from vitdet.engine.weights import load_weights
from vitdet.settings import optional
from vitdet.utils.checks import InputError, fail, os_error_text
from vitdet.utils.distributed import main_only
from vitdet.utils.env import seed_all
from vitdet.utils.files import locked, make_way

logger = logging.getLogger(__name__)


def train(cfg: DictConfig, *, resume: bool = False, dry_run: bool = False) -> Results:
    """Train, evaluate, and leave checkpoints, metrics, config and versions in the output folder.

    Args:
        cfg: a recipe (`vitdet.config.load_config`). Its number of classes is set from the data.
        resume: continue from the last checkpoint of `train.output_dir`, bit for bit on a CPU;
            without one, begin with `train.init_checkpoint`.
        dry_run: build everything, take two steps, print what a training takes, and keep nothing
            (`vitdet.engine.dry_run`); returns {}.

    Returns:
        {"bbox": {"AP": percent, ...}, "segm": {...}} of the final weights on the test data (on the
        main process; other processes get what the evaluator returns there). With
        `train.ema_decay` also "ema/bbox" and "ema/segm", of the averaged weights.

    Raises:
        InputError: anything in config, data or files that a user can repair.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was written (`vitdet.engine.signals`).
    """
    check_recipe(cfg)
    check_batch(cfg)
    output_dir = Path(cfg.train.output_dir)
    _check_new(output_dir, resume)
    selection = selection_of(cfg)
    with _one_line_errors(), noticed() as notice, logging_to() as log_to, ExitStack() as open_:
        if is_there := not dry_run and output_dir.is_dir():
            open_.enter_context(alone_in(output_dir))
        dataset = build_dataset(cfg.dataloader.train.dataset)
        names = tuple(dataset.class_names)
        set_length(cfg, dataset)
        test = _test_set(cfg, names, selection)
        trainer = _build_trainer(cfg, names)
        data = {"train": record.counts(dataset), "test": record.counts(test.dataset)}
        evaluated = Record(output_dir)
        previous = _load(trainer, cfg, names, data, evaluated, resume=resume)
        start = trainer.images_seen
        loader = build(cfg.dataloader.train, dataset=dataset, start=start)
        if dry_run:
            try_steps(cfg, trainer, loader, dataset, test.dataset)
            return {}
        # Inputs are right: only now does the run leave something on the disk.
        if not is_there:
            open_.enter_context(alone_in(output_dir))
            _check_new(output_dir, resume)
        make_way(output_dir, _FILES)
        log_to(output_dir / "log.txt")
        note = record.write(cfg, output_dir, dataset, data)
        del dataset  # the loader has its own copy, in one piece
        metrics = open_.enter_context(open_metrics(cfg, note, trainer.images_seen))
        checkpoints = _checkpoints(cfg, note, evaluated)
        checkpoints.resumed(previous)
        preemption = Preemption(notice, checkpoints.save_now)
        evaluations = Evaluations(
            every=cfg.train.eval_every,
            total_batch_size=cfg.dataloader.train.total_batch_size,
            evaluate=lambda: _evaluated(trainer, test, cfg.train, metrics, preemption),
            record=evaluated,
            selection=selection,
            checkpoints=checkpoints,
        )
        progress = open_.enter_context(closing(Progress(metrics, every=cfg.train.log_every)))
        watch = Watch(output_dir, optional(cfg.train, "step_timeout"))
        # A checkpoint before all that takes long, so that a signal finds its work done.
        hooks = [watch, progress, checkpoints, preemption, evaluations]
        notice.training = True
        try:
            goal = evaluations.before_train(trainer, cfg.train.num_images)
            trainer.run(watch.over(iter(loader)), goal, hooks)
            results = evaluations.now(trainer)
            checkpoints.wait()
        finally:
            watch.stop()
            checkpoints.close()
        record.write_results(output_dir, test, FINAL, results)
    return results


# What a run writes again and again, or goes on with, beside its checkpoints.
_FILES = (
    *("log.txt", "metrics.json", "config.yaml", "environment.json", "run.json", LAST),
    *(RECORD, "results.json", record.PREDICTIONS),
)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Make one line of what disks and reading processes do, in whichever process of a run.

    Raises:
        InputError: the file, and what the system said.
    """
    try:
        yield
    except OSError as error:
        raise InputError(os_error_text(error)) from error
    except RuntimeError as error:
        text = str(error)
        if not text.startswith("DataLoader"):
            raise
        raise InputError(
            f"reading of images: {text.splitlines()[0]} Too little memory, a full /dev/shm and a "
            "disk that hangs end such processes: lower dataloader.train.num_workers, or look at "
            "the disk of the images."
        ) from error


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Make the folder of a run, and hold its lock within the block (the main process does).

    A new folder that nothing has come into goes at the end.

    Raises:
        InputError: it cannot be made, or another run holds it.
    """
    with ExitStack() as held:

        def take() -> None:
            try:
                if not output_dir.exists():
                    output_dir.mkdir(parents=True)
                    held.callback(_remove_empty, output_dir)
                held.enter_context(locked(output_dir))
            except OSError as error:
                raise InputError(f"train.output_dir: {os_error_text(error)}") from error

        main_only(take)
        yield


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _evaluated(
    trainer: Trainer, test: TestSet, train: DictConfig, metrics: Metrics, preemption: Preemption
) -> Results:
    """Return the results of the weights, and of their moving average under names of its own."""
    precision = optional(train, "eval_precision")
    with preemption.evaluating(trainer):
        results = test.evaluate(trainer.detector, precision)
        if trainer.ema is not None:
            with trainer.ema.applied():
                results |= test.evaluate(trainer.detector, precision, "ema/")
    metrics.write(trainer.images_seen, flatten(results))
    return results


def _checkpoints(cfg: DictConfig, note: dict[str, Any], evaluated: Record) -> Checkpoints:
    return Checkpoints(
        Path(cfg.train.output_dir),
        every=cfg.train.checkpoint_every,
        keep=cfg.train.keep_checkpoints,
        total_batch_size=cfg.dataloader.train.total_batch_size,
        note=note,
        background=optional(cfg.train, "async_checkpoints"),
        beside=evaluated.state_dict,
    )


def evaluate(cfg: DictConfig, *, resume: bool = False) -> Results:
    """Evaluate `train.init_checkpoint`, or with `resume` the last checkpoint of the output folder.

    `train.eval_weights` says which weights of the file: "model", or "ema" for their average.

    Returns:
        As `train`, of "ema" under the names "ema/bbox" and so on; also written to `results.json`
        in the output folder.

    Raises:
        InputError: anything in config, data or files that a user can repair.
    """
    check_recipe(cfg)
    output_dir = Path(cfg.train.output_dir)
    previous = usable(output_dir) if resume else None
    if previous is None and not cfg.train.init_checkpoint:
        fail(
            "weights to evaluate",
            expected="train.init_checkpoint=FILE, or --resume with a run in train.output_dir",
            got=f"neither (train.output_dir={output_dir})",
            remedy="Add one of the two.",
        )
    with _one_line_errors(), logging_to() as log_to, ExitStack() as open_:
        test = TestSet(cfg)
        set_num_classes(cfg, len(test.class_names))
        detector = build_model(cfg.model, device=str(pick_device(cfg.train.device)))
        source, content = previous or _read(Path(cfg.train.init_checkpoint))
        which = optional(cfg.train, "eval_weights")
        content = checkpoint.chosen(content, which, source=str(source))
        checkpoint.check_trained(content, source=str(source))
        load_weights(detector, content, str(source), test.class_names)
        open_.enter_context(alone_in(output_dir))
        make_way(output_dir, ("log.txt", "results.json", record.PREDICTIONS))
        log_to(output_dir / "log.txt")
        prefix = "" if which == "model" else "ema/"
        results = test.evaluate(detector, optional(cfg.train, "eval_precision"), prefix)
        record.write_results(output_dir, test, str(source), results)
    return results


def pick_device(name: str) -> torch.device:
    """Return the device of this process for `train.device`: "auto", "cpu" or "cuda"."""
    if name not in ("auto", "cpu", "cuda"):
        fail("train.device", expected="auto, cpu or cuda", got=name, remedy="Use auto.")
    if name == "cuda" and not torch.cuda.is_available():
        fail(
            "train.device",
            expected="a GPU that torch can use",
            got="none",
            remedy="Use train.device=auto, or install a torch build for your GPU's driver.",
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _device(train: DictConfig) -> torch.device:
    device = pick_device(train.device)
    if device.type == "cpu" and train.precision == "fp16":
        logger.warning("train.precision=fp16 is slow on a CPU: train.precision=auto is fast there")
    return device


def _check_new(output_dir: Path, resume: bool) -> None:
    if resume:
        return
    found = last_checkpoint(output_dir)
    if found is not None:
        fail(
            f"train.output_dir={output_dir}",
            expected="a folder without a run",
            got=f"one that holds {found.name}",
            remedy="Add --resume to continue that run, or choose another train.output_dir.",
        )


def _read(path: Path) -> Found:
    return Found(path, checkpoint.read(path))


def _test_set(cfg: DictConfig, class_names: tuple[str, ...], selection: Selection) -> TestSet:
    test = TestSet(cfg, expected_classes=class_names)
    selection.check_evaluator(test.evaluator)
    return test


def _build_trainer(cfg: DictConfig, class_names: tuple[str, ...]) -> Trainer:
    set_num_classes(cfg, len(class_names))
    seed_all(cfg.train.seed)
    detector = build_model(cfg.model, device=str(_device(cfg.train)))
    freeze_blocks(detector, optional(cfg.train, "freeze_blocks"))
    if optional(cfg.train, "compile"):
        compile_blocks(detector)
    if optional(cfg.train, "parallel") == "fsdp":
        shard(detector)
    schedule, length = build(cfg.schedule), cfg.train.num_images
    return Trainer(
        detector,
        build(cfg.optimizer, model=detector),
        lambda images_seen: schedule(images_seen / length),
        precision=cfg.train.precision,
        seed=cfg.train.seed,
        clip_grad_norm=cfg.train.clip_grad_norm,
        accumulate=optional(cfg.train, "accumulate"),
        bad_steps=BadSteps(
            optional(cfg.train, "on_bad_step"),
            limit=optional(cfg.train, "max_bad_steps"),
            folder=Path(cfg.train.output_dir) / "bad_steps",
        ),
        ema_decay=optional(cfg.train, "ema_decay"),
        ddp=dict(cfg.train.ddp or {}),
    )


def _load(
    trainer: Trainer,
    cfg: DictConfig,
    class_names: tuple[str, ...],
    data: dict[str, record.Counts],
    evaluated: Record,
    *,
    resume: bool,
) -> Path | None:
    """Fill a new trainer, and the record of evaluations, from the last checkpoint of the run.

    Without one the weights are those of `train.init_checkpoint`. Returns that checkpoint's path.
    """
    previous = usable(Path(cfg.train.output_dir))
    if resume and previous is None:
        logger.info("no checkpoint in %s: starting a new run", cfg.train.output_dir)
    if previous is None and not cfg.train.init_checkpoint:
        logger.info("no train.init_checkpoint: starting from random weights")
        return None
    source, content = previous or _read(Path(cfg.train.init_checkpoint))
    if previous is not None:
        allow = optional(cfg.train, "allow_changed_data")
        record.check_data(data, content, str(source), allow=allow)
    load_weights(trainer.detector, content, str(source), class_names)
    if previous is not None:
        trainer.load_state_dict(content, source=str(source))
        evaluated.load(content, trainer.images_seen)
    logger.info("loaded %s (%d images seen)", source, trainer.images_seen)
    return None if previous is None else source
