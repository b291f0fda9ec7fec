"""A trained detector out of a checkpoint: its recipe, its class names, its weights."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.data import MetadataCatalog
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch import nn

from vitdet import checkpoint
from vitdet.config import build_model, instantiate, load_config, set_num_classes
from vitdet.data.shapes import CLASSES
from vitdet.utils.checks import fail

logger = logging.getLogger(__name__)

# What a recipe out of a file may build: a name of these packages that is defined in them. Others
# could be anything ("os.system"), and a checkpoint may come from anyone.
_OURS = ("backbones", "pyramid", "heads", "layers", "data", "evaluation")
_KNOWN = (
    *(f"vitdet.{name}" for name in _OURS),
    *("detectron2.modeling", "detectron2.layers", "detectron2.data.transforms", "torch.nn"),
)


@dataclass(frozen=True)
class Loaded:
    """What `load` returns.

    Attributes:
        detector: with its weights, in evaluation mode.
        class_names: of its class indexes.
        class_ids: the number of each class in COCO results.
        cfg: the recipe.
        mapper: of the recipe's test data: how an image becomes an input.
        note: what this project wrote into the file beside the weights.
    """

    detector: nn.Module
    class_names: tuple[str, ...]
    class_ids: tuple[int, ...]
    cfg: DictConfig
    mapper: Any
    note: dict[str, Any]


def load(
    path: str | Path,
    *,
    device: torch.device,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    weights: str = "model",
    trust: bool = False,
) -> Loaded:
    """Build the detector of a file and load its weights exactly.

    Args:
        path: a checkpoint of a run, a file of `save_for_inference`, or a converted file.
        device: where its parameters are made.
        config: a recipe, for files that hold none; it wins over that of the file.
        overrides: "dotted.key=value", changes to the recipe.
        class_names: for files that hold none, or {category id: name}.
        weights: "model", or "ema" for the moving average of a run with train.ema_decay.
        trust: build parts that the file's recipe names outside vitdet and detectron2, and open a
            torch file of more than tensors: both may run code of the file's author.

    Raises:
        InputError: no recipe or class names, another size, an untrained file.
    """
    source = str(path)
    content = checkpoint.read(path, trust=trust)
    about = note_of(content)
    cfg = recipe_of(content, source, config=config, overrides=overrides, trust=trust)
    names, ids = _classes(cfg, about, class_names, source)
    set_num_classes(cfg, len(names))
    detector = build_model(cfg.model, device=device)
    wanted = checkpoint.chosen(content, weights, source=source)
    checkpoint.check_trained(wanted, source=source)
    state, _ = checkpoint.weights_of(wanted, source=source)
    checkpoint.load_weights(detector, state, source=source)
    mapper = instantiate(cfg.dataloader.test.get("mapper"))
    if not hasattr(mapper, "augmentations") or not hasattr(mapper, "image_format"):
        fail(
            f"dataloader.test.mapper of {source}",
            expected="a vitdet.data.mapper.Mapper, whose augmentations resize an image",
            got=type(mapper).__name__,
            remedy="Use config=..., or make a Predictor(detector, class_names, augmentations=...).",
        )
    return Loaded(detector.eval(), names, ids, cfg, mapper, about)


def note_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what this project wrote into a file beside the weights, {} for none."""
    about = content.get("vitdet")
    return about if isinstance(about, dict) else {}


def recipe_of(
    content: Mapping[str, Any],
    source: str,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    trust: bool = False,
) -> DictConfig:
    """Return the recipe of a file's content, or the one that is given instead.

    Of a file's recipe come the keys `model`, `train`, and `dataloader` without its training half.

    Raises:
        InputError: the file holds none, it is no recipe of a detector, or it names parts that are
            neither vitdet's nor detectron2's and the file is not trusted.
    """
    if config is not None:
        cfg = load_config(config, overrides)
    else:
        text = note_of(content).get("config")
        if not isinstance(text, str):
            fail(
                f"weights {source}",
                expected="the recipe in the file, as in checkpoints of a run",
                got="none",
                remedy="Name the recipe that the weights are for: config=..., or --config-file on "
                "the command line (configs/; `vitdet inspect FILE` tells which fit).",
            )
        cfg = _of_text(text, source, overrides, trust=trust)
    if "model" not in cfg or "dataloader" not in cfg:
        got = f"the keys {', '.join(map(str, cfg))}"
        remedy = "Take the recipe of a detector; configs/backbones has parts for other projects."
        fail(f"recipe of {source}", expected="model and dataloader", got=got, remedy=remedy)
    return cfg


def _of_text(text: str, source: str, overrides: Sequence[str], *, trust: bool) -> DictConfig:
    """Return what predicting and evaluating need of a recipe's text, checked before loading."""
    try:
        whole = yaml.safe_load(text)
    except yaml.YAMLError:
        whole = None
    if not isinstance(whole, dict) or not isinstance(whole.get("dataloader"), dict):
        remedy = "Give the recipe: config=..., or --config-file on the command line."
        fail(f"recipe in {source}", expected="model and dataloader", got="none", remedy=remedy)
    data = {key: value for key, value in whole["dataloader"].items() if key != "train"}
    needed = {key: value for key, value in whole.items() if key in ("model", "train")}
    needed["dataloader"] = data
    if not trust:
        _check_parts(needed, source)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(needed), encoding="utf-8")
        return load_config(file, overrides)


def _check_parts(recipe: Mapping[str, Any], source: str) -> None:
    """Refuse a recipe that would call anything but parts of a detector and its test data."""
    for target in sorted(set(_targets(recipe))):
        if not _is_known(target):
            fail(
                f"recipe in {source}",
                expected="parts of this vitdet and detectron2 only",
                got=target,
                remedy="Only if you trust its author: trust=True (--trust) builds it, and may run "
                "code of theirs. Or give a recipe of your own with config=.",
            )


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        node = list(node.values())
    for item in node if isinstance(node, list) else ():
        yield from _targets(item)


def _is_known(target: str) -> bool:
    """Whether a dotted name is defined in one of the packages (and not only visible in it)."""
    if not any(target.startswith(f"{package}.") for package in _KNOWN):
        return False
    try:
        found = locate(target)
    except ImportError:
        return False
    home = f"{getattr(found, '__module__', '')}."
    return callable(found) and any(home.startswith(f"{package}.") for package in _KNOWN)


def _classes(
    cfg: DictConfig,
    about: Mapping[str, Any],
    given: Sequence[str] | Mapping[int, str] | None,
    source: str,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return class names and the ids of the classes in the data, which COCO results have.

    A file that was written before ids went into it gives 1, 2, ..., and a line says so.
    """
    known, ids = _of_dataset(cfg.dataloader.test.get("dataset"))
    if isinstance(given, Mapping):
        return tuple(given.values()), tuple(given)
    names = given if given is not None else about.get("class_names")
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        if list(names) == about.get("class_names") and _are_ids(about.get("class_ids"), len(names)):
            return tuple(names), tuple(about["class_ids"])
        if tuple(names) == known:
            return known, ids
        if given is None:
            logger.warning(
                "%s does not hold the category ids of its data: results have 1 to %d in the order "
                "of its classes (for others: --class-names with the data's COCO json)",
                *(source, len(names)),
            )
        return tuple(names), tuple(range(1, len(names) + 1))
    if not known:
        fail(
            f"weights {source}",
            expected="class names in the file, or a recipe of COCO or LVIS",
            got="neither",
            remedy="Give class_names=[...], or --class-names JSON on the command line.",
        )
    return known, ids


def _are_ids(ids: Any, count: int) -> bool:
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        return False
    return len(ids) == len(set(ids)) == count


def _of_dataset(node: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return names and ids of the classes of a data set that has always the same, else nothing."""
    target = str(node.get("_target_")) if isinstance(node, DictConfig) else ""
    if target.endswith("shapes_dataset"):
        return CLASSES, tuple(range(1, len(CLASSES) + 1))
    name = node.get("name") if isinstance(node, DictConfig) else None
    if "named_dataset" not in target or name not in MetadataCatalog.list():
        return (), ()
    known = MetadataCatalog.get(name)
    indexes = known.get("thing_dataset_id_to_contiguous_id") or {}
    names = tuple(known.get("thing_classes") or ())
    by_index = {index: number for number, index in indexes.items()}
    return names, tuple(by_index.get(index, index + 1) for index in range(len(names)))
