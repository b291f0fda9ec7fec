"""Train and evaluate what a config describes. `train_net.py` and the tests come in here."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vitdet import checkpoint
from vitdet.config import build_model, save_config, set_num_classes
from vitdet.engine.hooks import (
    Checkpoints,
    Evaluations,
    Metrics,
    Progress,
    last_checkpoint,
    write_text,
)
from vitdet.engine.inference import Results, TestSet, build, flatten
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError, fail, nearest
from vitdet.utils.distributed import barrier, is_main, world_size
from vitdet.utils.env import describe, seed_all

logger = logging.getLogger(__name__)

TRAIN_KEYS = frozenset(
    {
        *("output_dir", "init_checkpoint", "seed", "device", "precision", "num_images", "ddp"),
        *("checkpoint_every", "keep_checkpoints", "eval_every", "log_every", "clip_grad_norm"),
    }
)


def train(cfg: DictConfig, *, resume: bool = False) -> Results:
    """Train, evaluate, and leave checkpoints, metrics, config and versions in the output folder.

    Args:
        cfg: a recipe (`vitdet.config.load_config`). Its number of classes is set from the data.
        resume: continue from the last checkpoint of `train.output_dir`, bit for bit on a CPU;
            without one, begin with `train.init_checkpoint`.

    Returns:
        {"bbox": {"AP": percent, ...}, "segm": {...}} of the final weights on the test data (on the
        main process; other processes get what the evaluator returns there).

    Raises:
        InputError: anything in config, data or files that a user can repair.
    """
    _check(cfg)
    _check_batch(cfg)
    output_dir = Path(cfg.train.output_dir)
    previous = _previous(output_dir, resume)
    with _logging() as log_to:
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
        _write_results(output_dir, test.name, "model_final.pth", results)
    return results


def evaluate(cfg: DictConfig, *, resume: bool = False) -> Results:
    """Evaluate `train.init_checkpoint`, or with `resume` the last checkpoint of the output folder.

    Returns:
        As `train`; also written to `results.json` in the output folder.

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
    with _logging() as log_to:
        test = TestSet(cfg)
        set_num_classes(cfg, len(test.class_names))
        detector = build_model(cfg.model, device=str(pick_device(cfg.train.device)))
        source = source or Path(cfg.train.init_checkpoint)
        content = checkpoint.read(source)
        _check_complete(content, str(source))
        load_weights(detector, content, str(source), test.class_names)
        log_to(_made_folder(output_dir) / "log.txt")
        results = test.evaluate(detector, cfg.train.precision)
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


def load_weights(
    detector: nn.Module, content: Mapping[str, Any], source: str, class_names: Iterable[str]
) -> None:
    """Load the weights of a file's content exactly; its class names, if any, must be ours.

    Raises:
        InputError: another size, class count, format, or other class names.
    """
    state, initialised = checkpoint.weights_of(content, source=source)
    checkpoint.load_weights(detector, state, source=source, initialised=initialised)
    about = content.get("vitdet")
    theirs = about.get("class_names") if isinstance(about, dict) else None
    if theirs is not None and list(theirs) != list(class_names):
        pairs = zip_longest(theirs, class_names, fillvalue="no class")
        first = next((a, b) for a, b in pairs if a != b)
        fail(
            f"class names of {source}",
            expected=f"those of the data set, {first[1]} among them",
            got=f"{first[0]} in its place",
            remedy="Use the data set that the file was trained on; to start another training from "
            "these weights, pass them through converter.py, which drops the names.",
        )


def _check_complete(content: Mapping[str, Any], source: str) -> None:
    """Stop an evaluation of weights that are meant to be trained first."""
    _, initialised = checkpoint.weights_of(content, source=source)
    if initialised:
        fail(
            f"weights to evaluate, {source}",
            expected="a trained detector",
            got=f"a start of training: {len(initialised)} tensors ({initialised[0]}, ...) are left "
            "to initialisation",
            remedy="Train from it first, and evaluate the checkpoint of that run.",
        )


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
    missing = _missing(OmegaConf.to_container(cfg), "")
    if missing:
        fail(
            "recipe",
            expected=f"a value for {', '.join(missing)}",
            got="???",
            remedy=f"Give it as {missing[0]}=VALUE on the command line.",
        )
    given = {str(key) for key in cfg.train}
    if given != TRAIN_KEYS:
        absent, unknown = sorted(TRAIN_KEYS - given), sorted(given - TRAIN_KEYS)
        close = [nearest(key, TRAIN_KEYS) for key in unknown]
        fail(
            "recipe key train",
            expected=", ".join(sorted(TRAIN_KEYS)),
            got=f"{', '.join(absent) or 'nothing'} missing, "
            f"{', '.join(unknown) or 'nothing'} unknown",
            remedy=f"Did you mean {close[0]}?" if close and close[0] else "Correct the recipe.",
        )


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
    return Trainer(
        detector,
        build(cfg.optimizer, model=detector),
        build(cfg.schedule),
        precision=cfg.train.precision,
        seed=cfg.train.seed,
        clip_grad_norm=cfg.train.clip_grad_norm,
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


@contextmanager
def _logging() -> Iterator[Callable[[Path], None]]:
    """Send the main process's log lines to stdout; yields what also sends all of them to a file."""
    # detectron2's image lists make recent torch say a line about tracing: no news for a user.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    package = logging.getLogger("vitdet")
    level = package.level
    style = logging.Formatter("[%(asctime)s] %(message)s", "%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = []
    earlier = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)

    def add(handler: logging.Handler) -> None:
        handler.setFormatter(style)
        package.addHandler(handler)
        handlers.append(handler)

    def log_to(path: Path) -> None:
        if is_main():
            file = logging.FileHandler(path, encoding="utf-8")
            add(file)
            for record in earlier.buffer:
                file.handle(record)
            package.removeHandler(earlier)

    if is_main():
        add(logging.StreamHandler(sys.stdout))
        add(earlier)
    package.setLevel(logging.INFO if is_main() else logging.WARNING)
    try:
        yield log_to
    finally:
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()
        package.setLevel(level)
