"""A trained detector out of a file: its recipe, its class names, its weights; and a slim file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.nn.modules import module as registration

from vitdet import checkpoint
from vitdet.config import (
    CONFIGS,
    build_model,
    change,
    config_text,
    instantiate,
    load_config,
    set_num_classes,
)
from vitdet.data.shapes import CLASSES, drawn_folder
from vitdet.plain_recipes import recipe_of_file
from vitdet.predict import others
from vitdet.utils import thresholds
from vitdet.utils.checks import InputError
from vitdet.weights import read

logger = logging.getLogger(__name__)

# What parts raise that are given values which they cannot take.
_FAILURES = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, MemoryError, ImportError, OmegaConfBaseException),
)
_DRAWN = "datasets/shapes"  # in configs/mini
_MAX_ELEMENTS = 1 << 28  # that a model may have beyond twice those of its file

Names = Sequence[str] | Mapping[int, str]
Classes = tuple[tuple[str, ...], tuple[int, ...]]  # names, and their ids in the data


def load(
    path: str | Path,
    *,
    device: torch.device,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    class_names: Names | None = None,
    weights: str = "model",
    trust: bool = False,
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Build the detector of a file and load its weights exactly.

    Args:
        path: a checkpoint of a run, a file of `save_for_inference`, a converted file, a detector
            of another project (docs/conversion.md), which is converted in memory, or a name as
            `vitdet.weights.locate` takes it: those of the table bring their recipe.
        device: where its parameters are made.
        config: a recipe, for files that hold none and that none of ours is for
            (`vitdet.convert.recipes`); it wins over that of the file.
        overrides: "dotted.key=value", changes to the recipe.
        class_names: for files that hold none, or {category id: name}.
        weights: "model", or "ema" for the moving average of a run with train.ema_decay.
        trust: take a recipe of more than plain data (`vitdet.plain_recipes`), and open a torch
            file of more than tensors: both may run code of the file's author.

    Returns:
        The detector in evaluation mode, the arguments of a `Predictor` that go with it, and what
        this project wrote into the file beside the weights.

    Raises:
        InputError: no recipe or class names, another size, an untrained file.
    """
    source = str(path)
    found = read(path, trust=trust)
    content = found.content
    note = content.get("vitdet")
    note = note if isinstance(note, dict) else {}
    if found.row and found.row.recipe and config is None:
        config = CONFIGS.parent / found.row.recipe
    if config is None and not isinstance(note.get("config"), str):
        row = others.find_recipe(content, source)
        if row is None:
            others.check_detector(content, source)
        else:
            config, overrides = CONFIGS / f"{row.recipe}.py", (*row.overrides, *overrides)
    cfg = _recipe(note, source, config, overrides, trust)
    names, ids = _classes(cfg, note, class_names, source)
    wanted = checkpoint.chosen(content, weights, source=source)
    with building(source):
        set_num_classes(cfg, len(names))
    if "vitdet" not in content:
        key = "model" if weights == "ema" else None
        wanted = others.as_ours(wanted, cfg.model, weights=key, source=source)
    checkpoint.check_trained(wanted, source=source)
    state, _ = checkpoint.weights_of(wanted, source=source)
    with building(source):
        check_size(cfg.model, state, source)
        detector = build_model(cfg.model, device=device)
        mapper = instantiate(cfg.dataloader.test.get("mapper"))
    checkpoint.load_weights(detector, state, source=source)
    if not hasattr(mapper, "augmentations") or not hasattr(mapper, "image_format"):
        raise InputError(
            f"dataloader.test.mapper of {source}: expected a vitdet.data.mapper.Mapper, got "
            f"{type(mapper).__name__}. Use config=..., or Predictor(detector, class_names, ...)."
        )
    about = {"class_names": names, "class_ids": ids, "cfg": cfg}
    about |= {"augmentations": mapper.augmentations.augs, "image_format": mapper.image_format}
    return detector.eval(), about, note


def save_for_inference(source: str | Path, output: str | Path, **options: Any) -> Path:
    """Write a slim file: weights, class names and recipe, and nothing of the training.

    The detector is built and the weights are loaded first, so the file that is written works.

    Args:
        source: a file, as `load` takes it.
        output: .safetensors (no code can be in it), or .pth.
        options: weights, config, overrides, class_names, trust: see `load`.

    Raises:
        InputError: as `load`; an output that is the source, or that cannot be written.
    """
    output = Path(output)
    checkpoint.check_writable(output)
    if output.resolve() == Path(source).resolve():
        raise InputError(f"output {output}: this is the input. Choose another name.")
    detector, loaded, note = load(source, device=torch.device("cpu"), **options)
    about = {
        "format": checkpoint.FORMAT,
        "class_names": list(loaded["class_names"]),
        "class_ids": list(loaded["class_ids"]),
        "config": config_text(loaded["cfg"]),
        "weights": options.get("weights", "model"),
    }
    about |= thresholds.chosen(None, note, about["weights"], str(source)).note()
    versions = note.get("environment")
    if isinstance(versions, dict) and all(isinstance(each, str) for each in versions.values()):
        about["environment"] = versions
    checkpoint.write(output, {"model": detector.state_dict(), "vitdet": about})
    return output


def _recipe(
    note: Mapping[str, Any],
    source: str,
    config: str | Path | None,
    overrides: Sequence[str],
    trust: bool,
) -> DictConfig:
    """Return the recipe that is given, or what predicting needs of that of a file."""
    text = note.get("config")
    if config is not None:
        cfg = load_config(config, overrides, trust=trust)
    elif isinstance(text, str):
        plain = recipe_of_file(text, f"recipe in {source}", trust=trust)
        cfg = change(OmegaConf.create(plain), overrides)
    else:
        raise InputError(
            f"weights {source}: no recipe is in the file. Name the one that the weights are for: "
            "config=..., or --config-file (`vitdet inspect FILE` tells which fit)."
        )
    if "model" not in cfg or not isinstance(OmegaConf.select(cfg, "dataloader.test"), DictConfig):
        keys = ", ".join(map(str, cfg))
        text = f"recipe of {source}: expected model and dataloader.test, got the keys {keys}"
        raise InputError(f"{text}. Take the recipe of a detector.")
    return cfg


@contextmanager
def building(source: str | None) -> Iterator[None]:
    """Make one line of whatever fails while parts are built or run that a file's recipe names.

    A source of None leaves errors as they are.
    """
    try:
        yield
    except _FAILURES as error:
        if source is None or isinstance(error, InputError):
            raise
        what = f"the recipe of {source}: its parts do not work ({type(error).__name__}: {error})"
        raise InputError(f"{what}. Use another file, or give its recipe.") from error


def check_size(model: DictConfig, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise an InputError unless the `model` node has the weights of a file; it takes no memory."""
    most = 2 * sum(tensor.numel() for tensor in state.values()) + _MAX_ELEMENTS
    left = {"elements": most, "modules": 20 * len(state) + 2_000}

    def count(what: str, number: int) -> None:
        left[what] -= number
        if left[what] < 0:
            text = f"{source}: its recipe describes a model of far more {what} than its weights"
            raise InputError(f"{text}, at least {most if what == 'elements' else number}.")

    def count_tensor(*given: Any) -> None:  # module, name, tensor or None
        count("elements", 0 if given[2] is None else given[2].numel())

    with ExitStack() as stack:
        for hook in (
            registration.register_module_parameter_registration_hook(count_tensor),
            registration.register_module_buffer_registration_hook(count_tensor),
            registration.register_module_module_registration_hook(lambda *_: count("modules", 1)),
        ):
            stack.callback(hook.remove)
        checkpoint.check_fits(build_model(model, device="meta"), state, source=source)


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


def _classes(cfg: DictConfig, note: Mapping[str, Any], given: Names | None, source: str) -> Classes:
    """Return class names and the ids of the classes in the data, which COCO results have.

    A file that was written before ids went into it gives 1, 2, ..., and a line says so.
    """
    if isinstance(given, Mapping):
        return tuple(given.values()), tuple(given)
    known = _of_dataset(cfg.dataloader.test.get("dataset"))
    names = given if given is not None else note.get("class_names")
    if not isinstance(names, list | tuple) or not names or {type(n) for n in names} != {str}:
        if known[0]:
            return known
        raise InputError(
            f"weights {source}: no class names, in the file or by a recipe of COCO or LVIS. "
            "Give class_names=[...], or --class-names JSON on the command line."
        )
    names, ids = tuple(names), note.get("class_ids")
    ids = ids if isinstance(ids, list) and {type(each) for each in ids} == {int} else []
    if list(names) == note.get("class_names") and len(names) == len(ids) == len(set(ids)):
        return names, tuple(ids)
    if names == known[0]:
        return known
    if given is None:
        logger.warning(
            "%s does not hold the category ids of its data: results have 1 to %d in the order "
            "of its classes (for others: --class-names with the data's COCO json)",
            *(source, len(names)),
        )
    return names, tuple(range(1, len(names) + 1))


def _of_dataset(node: Any) -> Classes:
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
