"""Checks of what the recipe says: keys, batch, schedule, optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from vitdet.app.doctor.finding import FAULT, OK, WARNING, Finding
from vitdet.app.doctor.patient import Patient
from vitdet.config import KEYS
from vitdet.engine import durations
from vitdet.engine.groups import named_rates
from vitdet.engine.inference import build
from vitdet.engine.recipe import check_recipe
from vitdet.utils.durations import KEYS as DURATIONS

_SHORTEST_WARMUP = 10  # iterations; AdamW's averages are of no use before
_LONGEST_WARMUP = 0.5  # of the training


def recipe(patient: Patient) -> Iterator[Finding]:
    """Keys, types, values left open."""
    absent = [key for key in KEYS if key not in patient.cfg]
    if absent:
        text = f"no {', '.join(absent)}: this file describes a part"
        yield Finding(FAULT, "parts", text, "Recipes with all parts are under configs/COCO.")
        return
    check_recipe(patient.cfg)
    yield Finding(OK, "recipe", f"all keys are known, {len(patient.cfg.train)} under train")


def batch(patient: Patient) -> Iterator[Finding]:
    """The batch against processes, parts and the learning rate."""
    cfg = patient.cfg
    total, processes = cfg.dataloader.train.total_batch_size, patient.processes
    parts = cfg.train.get("accumulate") or 1
    share = total // processes
    if total < 1 or total % processes:
        text = f"{total} images a step cannot be shared by {processes} processes"
        remedy = "Change dataloader.train.total_batch_size or the number of processes."
        yield Finding(FAULT, "batch", text, remedy)
    elif share % parts:
        text = f"{share} images of a process cannot be cut into train.accumulate={parts} parts"
        yield Finding(FAULT, "batch", text, "Choose a divisor.")
    else:
        text = f"{total} images a step, {share} a process"
        yield Finding(OK, "batch", text + f" in {parts} parts" * (parts > 1))
    if rules := durations.lr_rules(cfg):
        remedy = "Set optimizer.lr; nothing is changed by itself."
        yield Finding(WARNING, "lr rule", rules, remedy)


def schedule(patient: Patient) -> Iterator[Finding]:
    """Durations against each other and the data."""
    cfg = patient.cfg.copy()
    if patient.train is None and _asks_for_data(patient):
        text = "lengths in epochs cannot be known without the data"
        yield Finding(WARNING, "schedule", text, "See the fault of the data.")
        return
    durations.resolve(cfg, patient.train)
    build(cfg.schedule)
    patient.lengths = cfg
    train, total = cfg.train, cfg.dataloader.train.total_batch_size
    text = f"{train.num_images} images, {-(-train.num_images // total)} iterations"
    if patient.train is not None:
        epochs = train.num_images / durations.images_an_epoch(cfg, patient.train)
        text += f", {epochs:.3g} epochs"
    yield Finding(OK, "schedule", text)
    yield from _warm_up(cfg.schedule.get("warmup", 0), train.num_images, total)
    last = max(cfg.schedule.get("milestones", None) or [0])
    if train.num_images - last < total and last:
        text = f"the last milestone, {last} images, is the end of the training"
        yield Finding(WARNING, "schedule", text, "Set schedule.milestones earlier.")
    if not 0 < train.checkpoint_every < train.num_images:
        text = f"train.checkpoint_every={train.checkpoint_every}: no checkpoint before the end"
        yield Finding(WARNING, "schedule", text, "A shorter period loses less when a run stops.")


def _asks_for_data(patient: Patient) -> bool:
    cfg = patient.cfg
    texts = [str(cfg[key.split(".")[0]].get(key.split(".")[1], "")) for key in DURATIONS]
    return cfg.train.get("epochs") is not None or any("epoch" in text for text in texts)


def _warm_up(warmup: float, length: int, batch: int) -> Iterator[Finding]:
    iterations = warmup / batch
    if iterations < _SHORTEST_WARMUP:
        text = f"a warm-up of {iterations:.3g} iterations"
        remedy = 'Give it some hundred: schedule.warmup="250 iterations".'
        yield Finding(WARNING, "schedule", text, remedy)
    elif warmup > _LONGEST_WARMUP * length:
        text = f"the warm-up takes {100 * warmup / length:.0f} % of the training"
        yield Finding(WARNING, "schedule", text, "Shorten schedule.warmup.")


def optimizer(patient: Patient) -> Iterator[Finding]:
    """Groups and rates."""
    if patient.model is None:
        return
    made = build(patient.cfg.optimizer, model=patient.model)
    rates = named_rates(patient.model, made)
    words = ", ".join(f"{name.removeprefix('lr/')} {rate:.3g}" for name, rate in rates.items())
    text = f"{type(made).__name__}, {len(made.param_groups)} groups; lr {words}"
    high = [name for name, rate in rates.items() if rate > 0.01]
    if high:
        yield Finding(WARNING, "optimizer", text, "Above 0.01 transformers rarely learn.")
    else:
        yield Finding(OK, "optimizer", text)
