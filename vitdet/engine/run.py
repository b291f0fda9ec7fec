"""Train and evaluate what a config describes. `train_net.py` and the tests come in here."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vitdet import checkpoint
from vitdet.config import KEYS, build_model, set_num_classes
from vitdet.engine import durations, model_card, record, sharded, startup
from vitdet.engine.bad_images import BadImageList
from vitdet.engine.bad_steps import BadSteps
from vitdet.engine.checkpoints import FINAL, Checkpoints, last_checkpoint
from vitdet.engine.compiled import compile_blocks
from vitdet.engine.first_step import FirstStep
from vitdet.engine.freezing import freeze_blocks
from vitdet.engine.hooks import Evaluations, Record
from vitdet.engine.inference import Results, TestSet, build, flatten
from vitdet.engine.logs import logging_to
from vitdet.engine.looks import Looks
from vitdet.engine.metrics import Progress, open_metrics
from vitdet.engine.parallel import check_parallel, is_shared_out, shard
from vitdet.engine.rollback import enable_rollback
from vitdet.engine.run_folder import Found, usable
from vitdet.engine.selection import Selection
from vitdet.engine.settings import check_types
from vitdet.engine.signals import Preemption, noticed
from vitdet.engine.trainer import Trainer
from vitdet.engine.weights import EVAL_WEIGHTS, check_complete, chosen, load_weights
from vitdet.engine.writers import check_loggers
from vitdet.utils.checks import InputError, fail, nearest
from vitdet.utils.distributed import is_main, world_size
from vitdet.utils.durations import parse
from vitdet.utils.env import seed_all
from vitdet.utils.files import disk_errors, write_text

logger = logging.getLogger(__name__)

TRAIN_KEYS = frozenset(
    {
        *("output_dir", "init_checkpoint", "seed", "device", "precision", "num_images", "ddp"),
        *("checkpoint_every", "keep_checkpoints", "eval_every", "log_every", "clip_grad_norm"),
    }
)
# What a recipe may leave out (configs saved before there were these keys do), and what holds then.
OPTIONAL_TRAIN_KEYS = {
    **{"ema_decay": None, "eval_weights": "model", "compile": False, "looks_every": 0},
    **{"epochs": None, "reference_batch": None},  # engine/durations.py
    **{"async_checkpoints": True, "sharded_checkpoints": False},
    **{"best_metric": None, "early_stopping": None},
    **{"hash_images": False, "allow_changed_data": False},  # engine/record.py
    **{"loggers": [], "tags": []},  # engine/writers.py
    **{"accumulate": 1, "freeze_blocks": 0, "on_bad_step": "stop", "max_bad_steps": 10},
    **{"parallel": "ddp", "first_step_timeout": 1800.0},
}


def train(cfg: DictConfig, *, resume: bool = False) -> Results:
    """Train, evaluate, and leave checkpoints, metrics, config and versions in the output folder.

    Args:
        cfg: a recipe (`vitdet.config.load_config`). Its number of classes is set from the data.
        resume: continue from the last checkpoint of `train.output_dir`, bit for bit on a CPU;
            without one, begin with `train.init_checkpoint`.

    Returns:
        {"bbox": {"AP": percent, ...}, "segm": {...}} of the final weights on the test data (on the
        main process; other processes get what the evaluator returns there). With
        `train.ema_decay` also "ema/bbox" and "ema/segm", of the averaged weights.

    Raises:
        InputError: anything in config, data or files that a user can repair.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was written (`vitdet.engine.signals`).
    """
    check_recipe(cfg)
    _check_batch(cfg)
    output_dir = Path(cfg.train.output_dir)
    _check_new(output_dir, resume)
    selection = _selection(cfg)
    with disk_errors(output_dir), noticed() as notice, logging_to() as log_to, ExitStack() as open_:
        dataset = build(cfg.dataloader.train.dataset)
        written = durations.resolve(cfg, dataset)
        test = _test_set(cfg, tuple(dataset.class_names), selection)
        trainer = _build_trainer(cfg, dataset.class_names)
        data = record.of_data(dataset, test.dataset, images=_optional(cfg, "hash_images"))
        evaluated = Record(output_dir)
        bad_images = BadImageList(output_dir, every=cfg.train.log_every)
        beside = (evaluated, bad_images)
        _load(trainer, cfg, dataset.class_names, data, beside, resume=resume)
        # Inputs are right: only now does the run leave something on the disk.
        log_to(_made_folder(output_dir) / "log.txt")
        note = record.write(cfg, output_dir, dataset.class_names, data, written)
        startup.mark_begun()
        start = trainer.images_seen
        loader = bad_images.of(build(cfg.dataloader.train, dataset=dataset, start=start))
        metrics = open_.enter_context(open_metrics(cfg, note, trainer.images_seen))

        def evaluate_now() -> Results:
            results = test.evaluate(trainer.detector, cfg.train.precision)
            if trainer.ema is not None:
                with trainer.ema.applied():
                    averaged = test.evaluate(trainer.detector, cfg.train.precision, "ema/")
                results = {**results, **averaged}
            metrics.write(trainer.images_seen, flatten(results))
            return results

        batch = cfg.dataloader.train.total_batch_size
        every = _optional(cfg, "looks_every")
        looks = Looks(output_dir / "looks", every=every, total_batch_size=batch, test=test)
        checkpoints = Checkpoints(
            output_dir,
            every=cfg.train.checkpoint_every,
            keep=cfg.train.keep_checkpoints,
            total_batch_size=batch,
            note=note,
            background=_optional(cfg, "async_checkpoints"),
            parts=_optional(cfg, "sharded_checkpoints"),
            beside=lambda: {**evaluated.state_dict(), **bad_images.state_dict()},
        )
        evaluations = Evaluations(
            every=cfg.train.eval_every,
            total_batch_size=batch,
            evaluate=evaluate_now,
            record=evaluated,
            selection=selection,
            checkpoints=checkpoints,
        )
        progress = open_.enter_context(closing(Progress(metrics, every=cfg.train.log_every)))
        watch = FirstStep(output_dir, _optional(cfg, "first_step_timeout"))
        # A checkpoint before all that takes long, so that a signal finds its work done.
        hooks = [
            *(watch, progress, checkpoints, Preemption(notice, checkpoints.save_now)),
            *(evaluations, looks, bad_images),
        ]
        try:
            enable_rollback(trainer, checkpoints, dataset.class_names)
            goal = evaluations.before_train(trainer, cfg.train.num_images)
            trainer.run(watch.over(looks.watching(loader), trainer), goal, hooks)
            results = evaluations.now(trainer)
            checkpoints.wait()
        finally:
            watch.stop()
            checkpoints.close()
            bad_images.close()
        _finish(cfg, test, note, results, evaluated)
    return results


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
    with disk_errors(output_dir), logging_to() as log_to:
        test = TestSet(cfg)
        set_num_classes(cfg, len(test.class_names))
        detector = build_model(cfg.model, device=str(pick_device(cfg.train.device)))
        source, content = previous or _read(Path(cfg.train.init_checkpoint))
        which = _optional(cfg, "eval_weights")
        content = chosen(content, which, str(source))
        check_complete(content, str(source))
        load_weights(detector, content, str(source), test.class_names)
        log_to(_made_folder(output_dir) / "log.txt")
        prefix = "" if which == "model" else "ema/"
        results = test.evaluate(detector, cfg.train.precision, prefix)
        _write_results(output_dir, test.name, str(source), results)
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


def _selection(cfg: DictConfig) -> Selection:
    stopping = _optional(cfg, "early_stopping")
    return Selection(
        _optional(cfg, "best_metric"),
        None if stopping is None else dict(stopping),
        eval_every=int(parse("train.eval_every", cfg.train.eval_every).value > 0),
        average=_optional(cfg, "ema_decay") is not None,
    )


def check_recipe(cfg: DictConfig) -> None:
    """Check what would otherwise be found out late, or never; no data, no model.

    Raises:
        InputError: keys that are missing or unknown, values left open or of a wrong type.
    """
    absent = [key for key in KEYS if key not in cfg]
    if absent:
        fail(
            "recipe to train or evaluate",
            expected=", ".join(KEYS),
            got=f"no {', '.join(absent)}",
            remedy="This file describes a part: configs/COCO has whole recipes.",
        )
    missing = _missing(OmegaConf.to_container(cfg), "")
    if missing:
        fail(
            "recipe",
            expected=f"a value for {', '.join(missing)}",
            got="???",
            remedy=f"Give it as {missing[0]}=VALUE on the command line.",
        )
    given = {str(key) for key in cfg.train} - set(OPTIONAL_TRAIN_KEYS)
    if given != TRAIN_KEYS:
        absent, unknown = sorted(TRAIN_KEYS - given), sorted(given - TRAIN_KEYS)
        close = [nearest(key, {*TRAIN_KEYS, *OPTIONAL_TRAIN_KEYS}) for key in unknown]
        fail(
            "recipe key train",
            expected=", ".join(sorted({*TRAIN_KEYS, *OPTIONAL_TRAIN_KEYS})),
            got=f"{', '.join(absent) or 'nothing'} missing, "
            f"{', '.join(unknown) or 'nothing'} unknown",
            remedy=f"Did you mean {close[0]}?" if close and close[0] else "Correct the recipe.",
        )
    if _optional(cfg, "eval_weights") not in EVAL_WEIGHTS:
        fail(
            "train.eval_weights",
            expected=" or ".join(EVAL_WEIGHTS),
            got=cfg.train.eval_weights,
            remedy="ema is the moving average of a run with train.ema_decay.",
        )
    check_types(cfg.train, OPTIONAL_TRAIN_KEYS)
    check_loggers(_optional(cfg, "loggers"))
    check_parallel(*(_optional(cfg, key) for key in ("parallel", "compile", "looks_every")))
    durations.check(cfg)
    _selection(cfg)


def _optional(cfg: DictConfig, key: str) -> Any:
    return cfg.train.get(key, OPTIONAL_TRAIN_KEYS[key])


def _missing(node: Any, key: str) -> list[str]:
    """Names of the values that a recipe leaves open ("???")."""
    if node == "???":
        return [key]
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return []
    prefix = f"{key}." if key else ""
    return [name for part in node for name in _missing(node[part], f"{prefix}{part}")]


def _check_batch(cfg: DictConfig) -> None:
    total, parts = cfg.dataloader.train.total_batch_size, max(_optional(cfg, "accumulate"), 1)
    if total <= 0 or total % (world_size() * parts):
        times = f" times train.accumulate={parts}" if parts > 1 else ""
        fail(
            "dataloader.train.total_batch_size",
            expected=f"a multiple of the {world_size()} processes{times}",
            got=total,
            remedy="Change it or the number of processes.",
        )


def _build_trainer(cfg: DictConfig, class_names: tuple[str, ...]) -> Trainer:
    set_num_classes(cfg, len(class_names))
    seed_all(cfg.train.seed)
    detector = build_model(cfg.model, device=str(pick_device(cfg.train.device)))
    freeze_blocks(detector, _optional(cfg, "freeze_blocks"))
    if _optional(cfg, "compile"):
        compile_blocks(detector)
    if _optional(cfg, "parallel") == "fsdp":
        shard(detector)
    return Trainer(
        detector,
        build(cfg.optimizer, model=detector),
        build(cfg.schedule),
        precision=cfg.train.precision,
        seed=cfg.train.seed,
        clip_grad_norm=cfg.train.clip_grad_norm,
        accumulate=_optional(cfg, "accumulate"),
        bad_steps=BadSteps(
            _optional(cfg, "on_bad_step"),
            limit=_optional(cfg, "max_bad_steps"),
            folder=Path(cfg.train.output_dir) / "bad_steps",
        ),
        ema_decay=_optional(cfg, "ema_decay"),
        ddp=dict(cfg.train.ddp or {}),
    )


def _load(
    trainer: Trainer,
    cfg: DictConfig,
    class_names: tuple[str, ...],
    data: dict[str, record.Fingerprint],
    beside: Iterable[Record | BadImageList],
    *,
    resume: bool,
) -> None:
    """Fill a new trainer, and what goes on `beside` it, from the last checkpoint of the run.

    Without one the weights are those of `train.init_checkpoint`.
    """
    read_parts = sharded.read
    if is_shared_out(trainer.detector):  # no process has room for the whole
        read_parts = partial(sharded.read, detector=trainer.detector, optimizer=trainer.optimizer)
    previous = usable(Path(cfg.train.output_dir), read_parts)
    if resume and previous is None:
        logger.info("no checkpoint in %s: starting a new run", cfg.train.output_dir)
    if previous is None and not cfg.train.init_checkpoint:
        logger.info("no train.init_checkpoint: starting from random weights")
        return
    source, content = previous or _read(Path(cfg.train.init_checkpoint))
    if previous is not None:
        allow = _optional(cfg, "allow_changed_data")
        record.check_data(data, content, str(source), allow=allow)
    load_weights(trainer.detector, content, str(source), class_names)
    if previous is not None:
        trainer.load_state_dict(content, source=str(source))
        for each in beside:
            each.load(content, trainer.images_seen)
    logger.info("loaded %s (%d images seen)", source, trainer.images_seen)


def _finish(
    cfg: DictConfig, test: TestSet, note: dict[str, Any], results: Results, evaluated: Record
) -> None:
    """Leave what is said of the finished run: results.json and the model card."""
    folder = Path(cfg.train.output_dir)
    _write_results(folder, test.name, FINAL, results)
    model_card.write(folder, cfg, note, results, evaluated.values)


def _write_results(output_dir: Path, dataset: str, source: str, results: Results) -> None:
    if not is_main():
        return
    content = {"dataset": dataset, "checkpoint": source, "results": _json_ready(results)}
    write_text(output_dir / "results.json", json.dumps(content, indent=1) + "\n")


def _json_ready(value: Any) -> Any:
    """JSON has no NaN (the AP of a class without instances): it becomes null."""
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    number = float(value)
    return number if math.isfinite(number) else None


def _made_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return path
    except OSError as error:
        raise InputError(
            f"train.output_dir={path}: expected a folder that can be made, got {error.strerror}. "
            "Choose another one."
        ) from error
