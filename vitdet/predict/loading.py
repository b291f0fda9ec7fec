"""A trained detector out of a checkpoint: its recipe, its class names, its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from vitdet import checkpoint
from vitdet.config import build_model, config_of, instantiate, load_config, set_num_classes
from vitdet.data.shapes import CLASSES, drawn_folder
from vitdet.plain_recipes import recipe_of_file
from vitdet.utils.checks import InputError, fail

logger = logging.getLogger(__name__)

# What parts raise that are given values which they cannot take.
_FAILURES = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, MemoryError, ImportError, OmegaConfBaseException),
)
_DRAWN = "datasets/shapes"  # in configs/mini
_MAX_ELEMENTS = 1 << 28  # that a model may have beyond twice those of its file


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
        trust: take a recipe of more than plain data (`vitdet.plain_recipes`), and open a torch
            file of more than tensors: both may run code of the file's author.

    Raises:
        InputError: no recipe or class names, another size, an untrained file.
    """
    source = str(path)
    content = checkpoint.read(path, trust=trust)
    about = note_of(content)
    cfg = recipe_of(content, source, config=config, overrides=overrides, trust=trust)
    names, ids = _classes(cfg, about, class_names, source)
    wanted = checkpoint.chosen(content, weights, source=source)
    checkpoint.check_trained(wanted, source=source)
    state, _ = checkpoint.weights_of(wanted, source=source)
    with building(source):
        set_num_classes(cfg, len(names))
        check_size(cfg.model, state, source)
        detector = build_model(cfg.model, device=device)
        mapper = instantiate(cfg.dataloader.test.get("mapper"))
    checkpoint.load_weights(detector, state, source=source)
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

    Of a file's recipe comes what predicting and evaluating need, see `vitdet.plain_recipes`.

    Raises:
        InputError: the file holds none, it is no recipe of a detector, or it is more than plain
            data and the file is not trusted.
    """
    if config is not None:
        cfg = load_config(config, overrides, trust=trust)
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
        content = recipe_of_file(text, f"recipe in {source}", trust=trust)
        cfg = config_of(content, overrides)
    if "model" not in cfg or not isinstance(OmegaConf.select(cfg, "dataloader.test"), DictConfig):
        got = f"the keys {', '.join(map(str, cfg))}"
        remedy = "Take the recipe of a detector; configs/backbones has parts for other projects."
        fail(f"recipe of {source}", expected="model and dataloader.test", got=got, remedy=remedy)
    return cfg


@contextmanager
def building(source: str | None) -> Iterator[None]:
    """Make one line of whatever fails while parts are built or run that a file's recipe names.

    Args:
        source: the file; None leaves errors as they are.
    """
    try:
        yield
    except InputError:
        raise
    except _FAILURES as error:
        if source is None:
            raise
        what = f"the recipe of {source}: its parts do not work ({type(error).__name__}: {error})"
        raise InputError(f"{what}. Use another file, or give its recipe.") from error


def check_size(model: DictConfig, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise an InputError unless a model has the weights of a file; it takes no memory for them.

    Args:
        model: the `model` node of a recipe.
        state: the weights.
        source: their file.
    """
    most = 2 * sum(tensor.numel() for tensor in state.values()) + _MAX_ELEMENTS
    left = {"elements": most, "modules": 20 * len(state) + 2_000}

    def count(what: str, number: int) -> None:
        left[what] -= number
        if left[what] < 0:
            text = f"{source}: its recipe describes a model of far more {what} than its weights"
            raise InputError(f"{text}, at least {most if what == 'elements' else number}.")

    def count_tensor(*given: Any) -> None:  # module, name, tensor or None
        count("elements", 0 if given[2] is None else given[2].numel())

    hooks = (
        register_module_parameter_registration_hook(count_tensor),
        register_module_buffer_registration_hook(count_tensor),
        register_module_module_registration_hook(lambda *_: count("modules", 1)),
    )
    try:
        checkpoint.check_fits(build_model(model, device="meta"), state, source=source)
    finally:
        for hook in hooks:
            hook.remove()


def check_test_data(cfg: DictConfig, source: str) -> None:
    """Raise an InputError unless the test data of a recipe from elsewhere are only read.

    Drawn data are written where they are not there yet, so they have to be there, or to go where
    the recipes of configs/ draw them.
    """
    node = OmegaConf.select(cfg, "dataloader.test.dataset")
    if not isinstance(node, DictConfig):
        raise InputError(f"the recipe of {source} names no test data. Give data with --data.")
    if str(node.get("_target_")).endswith(".shapes_dataset") and node.get("root") != _DRAWN:
        with building(source):
            arguments = {str(name): node[name] for name in node if name != "_target_"}
            folder = drawn_folder(**arguments)
        if not folder.is_dir():
            text = f"the recipe of {source} draws its test data into {folder}, which is not there"
            raise InputError(f"{text}. Give data with --data, or trust its author: --trust.")


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
