"""Train and evaluate what a config describes. `train_net.py` and the tests come in here."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from vitdet import checkpoint
from vitdet.config import build_model, instantiate, set_num_classes
from vitdet.engine import recipe, tune
from vitdet.engine.bad_steps import BadSteps
from vitdet.engine.checkpoints import FINAL, Checkpoints, last_checkpoint, usable
from vitdet.engine.dry_run import try_steps
from vitdet.engine.ending import closing_lines, objects_by_class
from vitdet.engine.evaluate import (
    Evaluations,
    Results,
    TestSet,
    build_dataset,
    check_metric,
    flatten,
    write_results,
)
from vitdet.engine.log import Metrics, Progress, logging_to
from vitdet.engine.parallel import shard
from vitdet.engine.parameters import compile_blocks
from vitdet.engine.signals import Signals, Watch
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError, os_error_text
from vitdet.utils.distributed import is_main, main_only
from vitdet.utils.env import seed_all
from vitdet.utils.files import locked
from vitdet.utils.precision import pick_device

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
        InputError: anything that a user can repair.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was written (`vitdet.engine.signals`).
    """
    cfg = recipe.check_recipe(cfg)
    recipe.check_batch(cfg)
    options, batch = cfg.train, cfg.dataloader.train.total_batch_size
    output_dir = Path(options.output_dir)
    check_new(output_dir, resume)
    with _one_line_errors(), Signals() as signals, logging_to() as log_to, ExitStack() as stack:
        if not dry_run:
            stack.enter_context(alone_in(output_dir))
            check_new(output_dir, resume)  # a run may have ended there since
        dataset, test, data = _read_data(cfg)
        trainer = _build_trainer(cfg)
        previous = _load(trainer, cfg, data, resume=resume)
        loader = instantiate(cfg.dataloader.train, dataset=dataset, start=trainer.images_seen)
        if dry_run:
            try_steps(cfg, trainer, loader, data)
            return {}
        log_to(output_dir / "log.txt")
        note = recipe.write_record(cfg, output_dir, dataset, data)
        objects = objects_by_class(dataset)
        del dataset  # the loader has its own copy, in one piece
        metrics = stack.enter_context(Metrics(output_dir, trainer.images_seen))
        checkpoints = Checkpoints(
            output_dir,
            every=options.checkpoint_every,
            keep=options.keep_checkpoints,
            total_batch_size=batch,
            note=note,
            resumed=previous,
        )
        stack.callback(checkpoints.close)
        signals.save = checkpoints.save_now
        evaluate_now = partial(_evaluated, trainer, test, options, metrics, signals)
        evaluations = Evaluations(options, batch, checkpoints, evaluate_now)
        progress = Progress(metrics, options.log_every, batch, options.num_images)
        watch = Watch(output_dir, options.step_timeout)
        stack.enter_context(progress)
        stack.callback(watch.stop)
        # A checkpoint before all that takes long, so that a signal finds its work done.
        hooks = [watch, progress, checkpoints, signals, evaluations]
        trainer.run(watch.over(iter(loader)), evaluations.before_train(trainer), hooks)
        results = evaluations.now(trainer)
        checkpoints.wait()
        write_results(output_dir, test, FINAL, results)
        if is_main():
            lines = closing_lines(cfg, trainer, evaluations, test, results, data, objects)
            logger.info("%s", "\n".join(lines))
    return results


def evaluate(cfg: DictConfig, *, resume: bool = False) -> Results:
    """Evaluate `train.init_checkpoint`, or with `resume` the last checkpoint of the output folder.

    `train.eval_weights` says which weights of the file: "model", or "ema" for their average.

    Results and errors are those of `train`; `results.json` in the output folder has them, too.
    """
    cfg = recipe.check_recipe(cfg)
    output_dir, which = Path(cfg.train.output_dir), cfg.train.eval_weights
    previous = usable(output_dir) if resume else None
    if previous is None and not cfg.train.init_checkpoint:
        text = "expected train.init_checkpoint=FILE, or --resume with a run in train.output_dir"
        raise InputError(f"weights to evaluate: {text}={output_dir}, got neither.")
    with _one_line_errors(), logging_to() as log_to, ExitStack() as stack:
        test = TestSet(cfg)
        set_num_classes(cfg, len(test.class_names))
        device = pick_device(cfg.train.device)
        detector = build_model(cfg.model, device=str(device))
        start = Path(cfg.train.init_checkpoint or "")
        source, content = previous or (start, checkpoint.read(start))
        content = checkpoint.chosen(content, which, source=str(source))
        checkpoint.check_trained(content, source=str(source))
        _load_weights(detector, content, str(source), test.class_names)
        stack.enter_context(alone_in(output_dir))
        log_to(output_dir / "log.txt")
        prefix = "" if which == "model" else "ema/"
        results = test.evaluate(detector, cfg.train.eval_precision, prefix)
        write_results(output_dir, test, str(source), results)
    return results


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Make one line of what disks and reading processes do, in whichever process of a run."""
    try:
        yield
    except OSError as error:
        raise InputError(os_error_text(error)) from error
    except RuntimeError as error:
        text = str(error)
        if not text.startswith("DataLoader"):
            raise
        why = "Memory, /dev/shm or disk may be at fault. Lower dataloader.train.num_workers."
        raise InputError(f"reading of images: {text.splitlines()[0]} {why}") from error


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Make the folder of a run, and hold its lock within the block (the main process does).

    New folders that nothing has come into go at the end.

    Raises:
        InputError: it cannot be made, or another run holds it.
    """
    with ExitStack() as held:

        def remove_empty(folder: Path) -> None:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

        def take() -> None:
            try:
                for folder in reversed((output_dir, *output_dir.parents)):
                    if not folder.exists():
                        folder.mkdir()
                        held.callback(remove_empty, folder)
                for path in output_dir.iterdir():  # opening a pipe would wait for ever
                    if path.exists() and not (path.is_file() or path.is_dir()):
                        text = "expected a file or a folder, got a pipe or a device. Move it away."
                        raise InputError(f"{path} in train.output_dir: {text}")
                held.enter_context(locked(output_dir))
            except OSError as error:
                raise InputError(f"train.output_dir: {os_error_text(error)}") from error

        main_only(take)
        yield


def check_new(output_dir: Path, resume: bool) -> None:
    """Raise InputError where a new run would come into a folder that holds one."""
    found = None if resume else last_checkpoint(output_dir)
    if found is not None:
        text = f"expected a folder without a run, got one that holds {found.name}"
        raise InputError(f"train.output_dir={output_dir}: {text}. Add --resume, or choose another.")


def _read_data(cfg: DictConfig) -> tuple[Any, TestSet, dict[str, recipe.Counts]]:
    """Return the data, and their numbers; the recipe gets what follows from them and is frozen."""
    dataset = build_dataset(cfg.dataloader.train.dataset)
    test = TestSet(cfg, expected_classes=tuple(dataset.class_names))
    check_metric(cfg.train, test.evaluator)
    recipe.set_length(cfg, dataset)
    set_num_classes(cfg, len(dataset.class_names))
    recipe.set_absolute_paths(cfg)
    OmegaConf.set_readonly(cfg, True)
    return dataset, test, {"train": recipe.counts(dataset), "test": recipe.counts(test.dataset)}


def _build_trainer(cfg: DictConfig) -> Trainer:
    options = cfg.train
    seed_all(options.seed)
    device = pick_device(options.device)
    if device.type == "cpu" and options.precision == "fp16":
        logger.warning("train.precision=fp16 is slow on a CPU: train.precision=auto is fast there")
    detector = build_model(cfg.model, device=str(device))
    tune.set_up(detector, options)
    if options.compile:
        compile_blocks(detector)
    if options.parallel == "fsdp":
        shard(detector)
    schedule, length = instantiate(cfg.schedule), options.num_images
    return Trainer(
        detector,
        instantiate(cfg.optimizer, model=detector),
        lambda images_seen: schedule(images_seen / length),
        precision=options.precision,
        seed=options.seed,
        clip_grad_norm=options.clip_grad_norm,
        accumulate=options.accumulate,
        bad_steps=BadSteps(
            options.on_bad_step,
            limit=options.max_bad_steps,
            folder=Path(options.output_dir) / "bad_steps",
        ),
        ema_decay=options.ema_decay,
        ddp=dict(options.ddp or {}),
    )


def _load(
    trainer: Trainer, cfg: DictConfig, data: dict[str, recipe.Counts], *, resume: bool
) -> Path | None:
    """Fill a new trainer from the run's last checkpoint, whose path is returned, or its start."""
    previous = usable(Path(cfg.train.output_dir))
    if resume and previous is None:
        logger.info("no checkpoint in %s: starting a new run", cfg.train.output_dir)
    if previous is None and not cfg.train.init_checkpoint:
        if cfg.train.tune != "all":
            text = "expected weights to start from (train.init_checkpoint, --weights), got none"
            raise InputError(f"train.tune={cfg.train.tune}: {text}: nothing would learn them.")
        logger.info("no train.init_checkpoint: starting from random weights")
        return None
    start = Path(cfg.train.init_checkpoint or "")
    source, content = previous or (start, checkpoint.read(start))
    if previous is not None:
        recipe.check_data(data, content, str(source), allow=cfg.train.allow_changed_data)
        content = tune.of_file(trainer.detector, content, str(source))
    _load_weights(trainer.detector, content, str(source), data["train"]["class_names"])
    if previous is not None:
        trainer.load_state_dict(content, source=str(source))
    logger.info("loaded %s (%d images seen)", source, trainer.images_seen)
    return None if previous is None else source


def _load_weights(
    detector: nn.Module, content: Mapping[str, Any], source: str, class_names: Iterable[str]
) -> None:
    """Load the weights of a file's content exactly; its class names, if any, must be ours."""
    state, initialised = checkpoint.weights_of(content, source=source)
    initialised = [*initialised, *tune.adapter_names(detector)]
    checkpoint.load_weights(detector, state, source=source, initialised=initialised)
    about = content.get("vitdet")
    theirs = about.get("class_names") if isinstance(about, dict) else None
    if theirs is not None and list(theirs) != list(class_names):
        pairs = zip_longest(theirs, class_names, fillvalue="no class")
        first = next((a, b) for a, b in pairs if a != b)
        raise InputError(
            f"class names of {source}: expected those of the data set, {first[1]} among them, got "
            f"{first[0]} in its place. Use the file's data, or converter.py, which drops the names."
        )


def _evaluated(
    trainer: Trainer, test: TestSet, options: Any, metrics: Metrics, signals: Signals
) -> Results:
    with signals.evaluating(trainer):
        with tune.merging(trainer.detector):
            results = test.evaluate(trainer.detector, options.eval_precision)
        if trainer.ema is not None:
            with trainer.ema.applied(), tune.merging(trainer.detector):
                results |= test.evaluate(trainer.detector, options.eval_precision, "ema/")
    metrics.write(trainer.images_seen, flatten(results))
    return results
