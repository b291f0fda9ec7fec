"""Train and evaluate what a config describes. `train_net.py` and the tests come in here."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vitdet import checkpoint
from vitdet.config import KEYS, build_model, save_config, set_num_classes
from vitdet.engine.checkpoints import FINAL, Checkpoints, last_checkpoint
from vitdet.engine.compiled import compile_blocks
from vitdet.engine.hooks import Evaluations
from vitdet.engine.inference import Results, TestSet, build, flatten
from vitdet.engine.logs import logging_to
from vitdet.engine.metrics import Metrics, Progress
from vitdet.engine.trainer import Trainer
from vitdet.engine.weights import EVAL_WEIGHTS, check_complete, chosen, load_weights
from vitdet.utils.checks import InputError, fail, nearest
from vitdet.utils.distributed import barrier, is_main, world_size
from vitdet.utils.env import describe, seed_all
from vitdet.utils.files import write_text

logger = logging.getLogger(__name__)

TRAIN_KEYS = frozenset(
    {
        *("output_dir", "init_checkpoint", "seed", "device", "precision", "num_images", "ddp"),
        *("checkpoint_every", "keep_checkpoints", "eval_every", "log_every", "clip_grad_norm"),
    }
)
# What a recipe may leave out (configs saved before there were these keys do), and what holds then.
OPTIONAL_TRAIN_KEYS = {"ema_decay": None, "eval_weights": "model", "compile": False}


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
    """
    _check(cfg)
    _check_batch(cfg)
    output_dir = Path(cfg.train.output_dir)
    previous = _previous(output_dir, resume)
    with logging_to() as log_to:
        dataset = build(cfg.dataloader.train.dataset)
        test = TestSet(cfg, expected_classes=tuple(dataset.class_names))
        trainer = _build_trainer(cfg, dataset.class_names)
        _load(trainer, cfg, previous, dataset.class_names, resume=resume)
        # Inputs are right: only now does the run leave something on the disk.
        log_to(_made_folder(output_dir) / "log.txt")
        note = _record(cfg, output_dir, dataset.class_names)
        loader = build(cfg.dataloader.train, dataset=dataset, start=trainer.images_seen)
        metrics = Metrics(output_dir, images_seen=trainer.images_seen)

        def evaluate_now() -> Results:
            results = test.evaluate(trainer.detector, cfg.train.precision)
            if trainer.ema is not None:
                with trainer.ema.applied():
                    averaged = test.evaluate(trainer.detector, cfg.train.precision, "ema/")
                results = {**results, **averaged}
            metrics.write(trainer.images_seen, flatten(results))
            return results

        batch = cfg.dataloader.train.total_batch_size
        hooks = [
            Progress(metrics, every=cfg.train.log_every),
            Checkpoints(
                output_dir,
                every=cfg.train.checkpoint_every,
                keep=cfg.train.keep_checkpoints,
                total_batch_size=batch,
                note=note,
            ),
            Evaluations(every=cfg.train.eval_every, total_batch_size=batch, evaluate=evaluate_now),
        ]
        try:
            trainer.run(iter(loader), cfg.train.num_images, hooks)
            results = evaluate_now()
        finally:
            metrics.close()
        _write_results(output_dir, test.name, FINAL, results)
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
    _check(cfg)
    output_dir = Path(cfg.train.output_dir)
    source = last_checkpoint(output_dir) if resume else None
    if source is None and not cfg.train.init_checkpoint:
        fail(
            "weights to evaluate",
            expected="train.init_checkpoint=FILE, or --resume with a run in train.output_dir",
            got=f"neither (train.output_dir={output_dir})",
            remedy="Add one of the two.",
        )
    with logging_to() as log_to:
        test = TestSet(cfg)
        set_num_classes(cfg, len(test.class_names))
        detector = build_model(cfg.model, device=str(pick_device(cfg.train.device)))
        source = source or Path(cfg.train.init_checkpoint)
        which = _optional(cfg, "eval_weights")
        content = chosen(checkpoint.read(source), which, str(source))
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


def _previous(output_dir: Path, resume: bool) -> Path | None:
    found = last_checkpoint(output_dir)
    if found is not None and not resume:
        fail(
            f"train.output_dir={output_dir}",
            expected="a folder without a run",
            got=f"one that holds {found.name}",
            remedy="Add --resume to continue that run, or choose another train.output_dir.",
        )
    return found


def _check(cfg: DictConfig) -> None:
    """Check what would otherwise be found out late, or never."""
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
    total = cfg.dataloader.train.total_batch_size
    if total <= 0 or total % world_size():
        fail(
            "dataloader.train.total_batch_size",
            expected=f"a multiple of the {world_size()} processes",
            got=total,
            remedy="Change it or the number of processes.",
        )


def _build_trainer(cfg: DictConfig, class_names: tuple[str, ...]) -> Trainer:
    set_num_classes(cfg, len(class_names))
    seed_all(cfg.train.seed)
    detector = build_model(cfg.model, device=str(pick_device(cfg.train.device)))
    if _optional(cfg, "compile"):
        compile_blocks(detector)
    return Trainer(
        detector,
        build(cfg.optimizer, model=detector),
        build(cfg.schedule),
        precision=cfg.train.precision,
        seed=cfg.train.seed,
        clip_grad_norm=cfg.train.clip_grad_norm,
        ema_decay=_optional(cfg, "ema_decay"),
        ddp=dict(cfg.train.ddp or {}),
    )


def _load(
    trainer: Trainer,
    cfg: DictConfig,
    previous: Path | None,
    class_names: tuple[str, ...],
    *,
    resume: bool,
) -> None:
    """Fill a new trainer from the last checkpoint, else from `train.init_checkpoint`."""
    if resume and previous is None:
        logger.info("no checkpoint in %s: starting a new run", cfg.train.output_dir)
    source = previous or cfg.train.init_checkpoint
    if not source:
        logger.info("no train.init_checkpoint: starting from random weights")
        return
    content = checkpoint.read(source)
    load_weights(trainer.detector, content, str(source), class_names)
    if previous is not None:
        trainer.load_state_dict(content, source=str(source))
    logger.info("loaded %s (%d images seen)", source, trainer.images_seen)


def _record(cfg: DictConfig, output_dir: Path, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Write config.yaml and environment.json; return what checkpoints keep of them."""
    environment = describe()
    if is_main():
        save_config(cfg, output_dir / "config.yaml")
        write_text(output_dir / "environment.json", json.dumps(environment, indent=1) + "\n")
    barrier()
    config = (output_dir / "config.yaml").read_text(encoding="utf-8")
    return {"class_names": list(class_names), "config": config, "environment": environment}


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
